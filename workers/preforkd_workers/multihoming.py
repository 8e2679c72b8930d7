"""The way back of a datagram: from which of this machine's addresses it is to be answered.

A socket that is bound to no address in particular, or to a multicast group, gets what comes to any address, and answers
from whichever the routes prefer. A client that has asked another one does not take that for its answer. The kernel
tells where each datagram came to, and takes it as where an answer is to leave from (IP_PKTINFO of ip(7), IPV6_PKTINFO
of ipv6(7)).
"""

import socket
from ipaddress import ip_address

_IP_PKTINFO = 8  # linux/in.h; in the socket module since CPython 3.14

# Room for both: a datagram of IPv4 at a socket of IPv6 comes with both.
SPACE = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(20)

_GROUP = 0xFF  # the first byte of a multicast address (RFC 4291, 2.7)
_LINK_LOCAL = b"\xfe\x80"

WayBack = list[tuple[int, int, bytes]]  # as sendmsg wants it


def is_needed(listener: socket.socket) -> bool:
    """Whether a datagram may have come to this socket by one address of many."""
    if listener.type != socket.SOCK_DGRAM or listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    host = ip_address(listener.getsockname()[0].partition("%")[0])
    return host.is_unspecified or host.is_multicast


def ask_for(listener: socket.socket) -> None:
    """Have the kernel tell. It tells all who hold the socket, and is heard by nobody who does not ask (recvmsg)."""
    listener.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)


def way_back(told: list[tuple[int, int, bytes]]) -> WayBack | None:
    """What to send an answer with; None when the kernel is to choose, as for a group of IPv6.

    Without the interface, or the answer would leave by it though the routes lead elsewhere; but an address of a link
    means nothing without.
    """
    found = None
    for level, kind, data in told:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            # struct in_pktinfo: interface, address to answer from, address in the header, which may be a group.
            return [(level, kind, bytes(4) + data[4:8] + bytes(4))]
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and data[0] != _GROUP:
            found = [(level, kind, data if data.startswith(_LINK_LOCAL) else data[:16] + bytes(4))]
    return found
