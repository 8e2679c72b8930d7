"""What a datagram listener has beside its address: a receive buffer, and membership of a multicast group.

Everything here may be asked of a socket that is open and in use; it never opens or closes one.
"""

import errno
import os
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address

from preforkd import log
from preforkd.addresses import Address, ip_of
from preforkd.backlog import sample

# asm-generic/socket.h, linux/in.h, linux/in6.h
_SO_RCVBUFFORCE = 33
_SO_BINDTOIFINDEX = 62
_IP_MULTICAST_ALL = 49
_IPV6_MULTICAST_ALL = 29

_DEFAULT = "/proc/sys/net/core/rmem_default"
_ADVICE = "raise net.core.rmem_max (sysctl), or give the master CAP_NET_ADMIN"
_NAME_ONE = "name its interface, such as ?interface=eth0"


def set_receive_buffer(listener: socket.socket, asked: int) -> None:
    """Have room for so many bytes of datagrams; 0: for as many as the system gives to everybody.

    Beyond net.core.rmem_max where we may (CAP_NET_ADMIN), else up to it. A Unix socket has no such room of its own:
    there the sender's buffer and net.unix.max_dgram_qlen count (unix(7)).
    """
    if not _has_buffer(listener):
        return
    wanted = asked or int(_content(_DEFAULT)) // 2  # the kernel doubles what it is told, and not its default
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted)
    except PermissionError:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)


def tell_receive_buffer(listener: socket.socket, url: str, asked: int) -> None:
    """Log what the kernel has granted, in the measure in which it was asked for, and what to do when that is less."""
    if asked and _has_buffer(listener):
        granted = listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2  # it tells twice of it (socket(7))
        log.event("receive_buffer", url=url, asked=asked, granted=granted, advice=_ADVICE if granted < asked else None)


def tell_what_is_left(listener: socket.socket, url: str) -> None:
    """Log that datagrams are lost, if some have been taken by nobody as we close their listener."""
    if listener.type != socket.SOCK_DGRAM:
        return
    with suppress(OSError):  # there is none
        listener.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        log.event("datagrams_left", url=url, bytes=sample(listener)[0])


def _has_buffer(listener: socket.socket) -> bool:
    return listener.type == socket.SOCK_DGRAM and listener.family != socket.AF_UNIX


def join(listener: socket.socket, address: Address) -> None:
    """Become a member of the group that the listener is bound to, on its interface or one of the kernel's choice.

    It gets what comes by its own membership, not what comes by that of others on this machine (IP_MULTICAST_ALL of
    ip(7)). In IPv6 the kernel compares groups but not interfaces, so there it is tied to the one that is named.
    Raises OSError.
    """
    level, option, request = _membership(address, socket.IP_ADD_MEMBERSHIP, socket.IPV6_JOIN_GROUP)
    listener.setsockopt(level, _IP_MULTICAST_ALL if level == socket.IPPROTO_IP else _IPV6_MULTICAST_ALL, 0)
    if level == socket.IPPROTO_IPV6 and address.options.get("interface"):
        listener.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, interface_of(address))
    try:
        listener.setsockopt(level, option, request)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        own = address.options.get("interface")
        reason = f"no interface has the address {own}" if own else f"no route leads to the group; {_NAME_ONE}"
        raise OSError(errno.ENODEV, reason) from None


def rejoin(listener: socket.socket, before: Address, after: Address) -> None:
    """Change the interface. Nothing that comes by both is missed. Raises OSError; then it is as before."""
    _be_member(listener, after)
    with suppress(OSError):  # the interface may have gone
        listener.setsockopt(*_membership(before, socket.IP_DROP_MEMBERSHIP, socket.IPV6_LEAVE_GROUP))
    _be_member(listener, after)  # for what was left may be that: the kernel's choice is not for ever


def _be_member(listener: socket.socket, address: Address) -> None:
    try:
        join(listener, address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:  # a member already, by whatever name of the interface
            raise


def is_tied_to_another(listener: socket.socket, address: Address) -> bool:
    """Whether the socket is tied to an interface, as for a group of IPv6, which is not the one that is named.

    Raises OSError when there is none of that name.
    """
    index = interface_of(address)
    return listener.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX) not in (0, index)


def interface_of(address: Address) -> int:
    """The index of the interface that the address names, by name or by an IPv6 address of it; 0: neither.

    Raises OSError when there is none.
    """
    name = address.options.get("interface", "")
    if not name:
        return 0
    with suppress(OSError):
        return socket.if_nametoindex(name)
    wanted = ip_of(name)
    if isinstance(wanted, IPv4Address):
        return 0  # the kernel finds whose it is
    for index, its_address in _addresses_of_ipv6():
        if its_address == wanted:
            return index
    raise OSError(errno.ENODEV, f"there is no interface {name!r}")


def _membership(address: Address, for_ipv4: int, for_ipv6: int) -> tuple[int, int, bytes]:
    """The arguments for joining or leaving: struct ip_mreqn of ip(7), struct ipv6_mreq of ipv6(7)."""
    group = ip_address(address.host)
    if isinstance(group, IPv6Address):
        return socket.IPPROTO_IPV6, for_ipv6, group.packed + struct.pack("=I", interface_of(address))
    own = ip_of(address.options.get("interface", ""))
    packed = own.packed if isinstance(own, IPv4Address) else bytes(4)
    return socket.IPPROTO_IP, for_ipv4, group.packed + packed + struct.pack("=i", interface_of(address))


def _addresses_of_ipv6() -> list[tuple[int, IPv6Address]]:
    """The index of the interface, and the address, of each that this machine has (proc(5), /proc/net/if_inet6)."""
    if not os.path.exists("/proc/net/if_inet6"):
        return []
    lines = [line.split() for line in _content("/proc/net/if_inet6").splitlines()]
    return [(int(fields[1], 16), IPv6Address(bytes.fromhex(fields[0]))) for fields in lines]


def _content(path: str) -> str:
    with open(path) as file:
        return file.read()
