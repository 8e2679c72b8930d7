"""From an address to a bound socket."""

import errno
import fcntl
import grp
import os
import pwd
import socket
import stat
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from preforkd import datagrams
from preforkd.addresses import NOWHERE, SCHEMES, Address
from preforkd_workers.spec import Listener


class ListenError(Exception):
    """The system refused to bind; the message says which address, why, and what to do."""

    @property
    def is_taken(self) -> bool:
        """Whether somebody has the address already."""
        return isinstance(self.__cause__, OSError) and self.__cause__.errno == errno.EADDRINUSE


class Rules(Struct, frozen=True):
    """How to bind: the settings of a service that concern its listeners."""

    request_queue_size: int = 1024
    allow_reuse_address: bool = True
    allow_reuse_port: bool = False
    receive_buffer: int = 0  # bytes; 0: as the system has it


class Bound(Struct, eq=False):
    """A listener of ours, with what we must remove at the end."""

    listener: Listener
    path: str = ""
    inode: tuple[int, int] = (0, 0)
    address: Address = NOWHERE  # as it was asked for
    rules: Rules = Rules()
    name: str = ""  # in the service manager's store; empty: never there
    is_kept: bool = False  # by the service manager, so that its file must stay

    def serves(self, address: Address) -> bool:
        """Whether this is the listener for an address, and still: its file may have been removed, or be another's."""
        if self.path and file_of(self.address) != self.inode:
            return False
        return self.address.url == address.url if address.place is None else self.address.place == address.place

    def stands_in_the_way_of(self, address: Address) -> bool:
        """Whether it has the port of that address, so that another one on it cannot be bound meanwhile."""
        ours = urlsplit(self.listener.url)
        return ours.scheme == address.scheme and ours.port is not None and ours.port == address.port

    def cannot_become(self, address: Address) -> str | None:
        """Why a listener that is open cannot be changed to what is asked for at the same place, if it cannot."""
        if self.address.options.get("v6only", "0") != address.options.get("v6only", "0"):
            return f"{address.url}: v6only of an open listener cannot change; needs a restart"
        if self.address.scheme != address.scheme:
            return f"{address.url}: {self.address.scheme} cannot become {address.scheme} in place; needs a restart"
        try:
            _owner(address)
            if address.group is not None and datagrams.is_tied_to_another(self.listener.socket, address):
                return f"{address.url}: the interface of an open listener of IPv6 cannot change; needs a restart"
        except OSError as error:
            return f"{address.url}: {error.strerror}"
        return None

    def become(self, address: Address, rules: Rules) -> None:
        """Take over what is asked for anew at the same place. Raises OSError."""
        if rules != self.rules and self.listener.socket.type == socket.SOCK_STREAM:
            self.listener.socket.listen(rules.request_queue_size)
        if rules.receive_buffer != self.rules.receive_buffer:
            datagrams.set_receive_buffer(self.listener.socket, rules.receive_buffer)
            datagrams.tell_receive_buffer(self.listener.socket, self.listener.url, rules.receive_buffer)
        if address.group is not None and address.options != self.address.options:
            datagrams.rejoin(self.listener.socket, self.address, address)
        if self.path and address.options != self.address.options:
            _own(self.path, address)
            os.chmod(self.path, _mode(address))
        self.address, self.rules = address, rules

    @property
    def is_ours_alone(self) -> bool:
        """Whether nobody else has it: not whoever has passed it to us, nor the service manager."""
        return self.address.scheme != "fd" and not self.is_kept

    def retire(self) -> None:
        """Close it for all who have it, workers that drain included."""
        if self.address.scheme != "fd":  # or else it is not only ours
            # Of a datagram socket only the reading side: whoever drains answers through it.
            is_stream = self.listener.socket.type == socket.SOCK_STREAM
            with suppress(OSError):  # a datagram socket is not connected, and it is done all the same
                self.listener.socket.shutdown(socket.SHUT_RDWR if is_stream else socket.SHUT_RD)
        self.is_kept = False
        self.close()

    def close(self) -> None:
        """Close it, and remove its socket file if that is still the one that we made, and if it leads nowhere now."""
        self.listener.socket.close()
        if self.is_kept:
            return
        with suppress(FileNotFoundError):
            if self.path and _inode(self.path) == self.inode:
                os.unlink(self.path)


def bind(address: Address, rules: Rules) -> Bound:
    """Open the listener. A stale socket file is replaced, a live one and any other file are left alone.

    Raises ListenError.
    """
    try:
        if address.scheme == "fd":
            return Bound(_inherited(address, rules), address=address, rules=rules)
        made = _unix(address) if address.path else Bound(_inet(address, rules))
        return Bound(_listening(made.listener.socket, rules), made.path, made.inode, address, rules)
    except OSError as error:
        raise ListenError(f"{address.url}: {_explain(error, address)}") from error
    except UnicodeError:
        raise ListenError(f"{address.url}: no host can have such a name") from None


def taken_back(address: Address, rules: Rules, number: int) -> Bound:
    """A listener of ours that was kept for us, as ``bind`` had made it. Raises ListenError when it is none any more."""
    try:
        listener = _listening(socket.socket(fileno=number), rules)
        path = "" if not address.path or address.path.startswith("@") else os.path.abspath(address.path)
        return Bound(listener, path, _inode(path) if path else (0, 0), address, rules)
    except OSError as error:
        raise ListenError(f"{address.url}: {_explain(error, address)}") from error


def file_of(address: Address) -> tuple[int, int] | None:
    """Device and inode of the socket file that is at this address now; None when it has none."""
    if not address.path or address.path.startswith("@"):
        return None
    with suppress(OSError):
        return _inode(os.path.abspath(address.path))
    return None


def is_yet_to_be_passed(address: Address) -> bool:
    """Whether only who starts the daemon knows what it is: what has a name, or becomes a standard stream."""
    if address.scheme != "fd" or address.name:
        return bool(address.name)
    return address.number <= 2 and not stat.S_ISSOCK(os.fstat(address.number).st_mode)


def unbound(address: Address, of_passed: int = socket.SOCK_STREAM) -> Listener:
    """A socket of the family and type that the address has, for trying a target without binding.

    ``of_passed``: the type of what is yet to be passed.
    Raises ListenError when there is no such host or descriptor.
    """
    try:
        if is_yet_to_be_passed(address):
            return Listener(address.url, socket.socket(socket.AF_INET, of_passed))
        if address.scheme == "fd":
            return Listener(address.url, socket.socket(fileno=os.dup(address.number)))
        family, kind = SCHEMES[address.scheme] or (0, 0)
        if not address.path:
            family, _ = _resolve(address)
            datagrams.interface_of(address)
        return Listener(address.url, socket.socket(family, kind))
    except OSError as error:
        raise ListenError(f"{address.url}: {_explain(error, address)}") from error


def _resolve(address: Address) -> tuple[int, tuple[Any, ...]]:
    """The family and the socket address of a host and port. Raises OSError when there is no such host."""
    _, kind = SCHEMES[address.scheme] or (0, 0)
    family, _, _, _, sockaddr = socket.getaddrinfo(address.host, address.port, type=kind, flags=socket.AI_PASSIVE)[0]
    if address.group is not None and family == socket.AF_INET6:
        return family, (*sockaddr[:3], datagrams.interface_of(address))
    return family, sockaddr


def _inet(address: Address, rules: Rules) -> Listener:
    _, kind = SCHEMES[address.scheme] or (0, 0)
    family, sockaddr = _resolve(address)
    made = socket.socket(family, kind)
    try:
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address.options.get("v6only", "0")))
        # On UDP it would let a second one in (socket(7)), which is what those who listen to a group want.
        if rules.allow_reuse_address and (kind == socket.SOCK_STREAM or address.group is not None):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if rules.allow_reuse_port:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(sockaddr)
        if address.group is not None:
            datagrams.join(made, address)
    except BaseException:
        made.close()
        raise
    return Listener("", made)


def _unix(address: Address) -> Bound:
    family, kind = SCHEMES[address.scheme] or (0, 0)
    made = socket.socket(family, kind)
    try:
        if address.path.startswith("@"):
            made.bind("\0" + address.path[1:])
            return Bound(Listener("", made))
        _remove_stale(address.path, kind)
        before = os.umask(0o777 & ~_mode(address))
        try:
            made.bind(address.path)
        finally:
            os.umask(before)
        path = os.path.abspath(address.path)
        bound = Bound(Listener("", made), path, _inode(path))
        try:
            _own(path, address)
        except BaseException:
            bound.close()
            raise
        return bound
    except BaseException:
        made.close()
        raise


def _mode(address: Address) -> int:
    return int(address.options.get("mode", "0666"), 8)


def _own(path: str, address: Address) -> None:
    if "user" in address.options or "group" in address.options:
        os.chown(path, *_owner(address))


def _owner(address: Address) -> tuple[int, int]:
    return _user(address.options.get("user")), _group(address.options.get("group"))


def _remove_stale(path: str, kind: int) -> None:
    """Remove the file of a socket on which nobody accepts any more. Raises OSError when it is anything else."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "a file that is no socket is there; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(path)
    if outcome != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, "address in use: another process listens there")
    os.unlink(path)


def _inherited(address: Address, rules: Rules) -> Listener:
    """A listener that whoever started us has opened; its family and type are asked from the kernel."""
    if not stat.S_ISSOCK(os.fstat(address.number).st_mode):
        raise OSError(errno.ENOTSOCK, "is no socket; have whoever starts this pass a listening one")
    return _listening(socket.socket(fileno=_out_of_the_way(address.number)), rules)


def _out_of_the_way(number: int) -> int:
    """Keep a descriptor from the programs that we or a handler run, and the standard streams from being a listener.

    FastCGI, and so supervisord, passes one as standard input, which every mold, worker and program has.
    """
    if number > 2:
        os.set_inheritable(number, False)
        return number
    moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, number)
    os.close(null)
    return moved


def _listening(made: socket.socket, rules: Rules) -> Listener:
    """Ready for the lanes: a stream socket listens and does not wait, a datagram socket stays in blocking mode."""
    if made.type == socket.SOCK_STREAM:
        made.listen(rules.request_queue_size)
        made.setblocking(False)
    elif rules.receive_buffer:
        datagrams.set_receive_buffer(made, rules.receive_buffer)
    return Listener(url_of(made), made)


def url_of(bound: socket.socket) -> str:
    """The address that a socket is bound to, as this module writes it."""
    name = bound.getsockname()
    kind = bound.type
    if bound.family == socket.AF_UNIX:
        path = os.fsdecode(name)
        return f"{'unix' if kind == socket.SOCK_STREAM else 'unix-dgram'}:{path.replace(chr(0), '@', 1)}"
    host = f"[{name[0]}]" if bound.family == socket.AF_INET6 else name[0]
    return f"{'tcp' if kind == socket.SOCK_STREAM else 'udp'}://{host}:{name[1]}"


def _inode(path: str) -> tuple[int, int]:
    found = os.stat(path, follow_symlinks=False)
    return found.st_dev, found.st_ino


def _user(name: str | None) -> int:
    try:
        return -1 if name is None else int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise OSError(errno.EINVAL, f"there is no user {name!r}") from None


def _group(name: str | None) -> int:
    try:
        return -1 if name is None else int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise OSError(errno.EINVAL, f"there is no group {name!r}") from None


def _explain(error: OSError, address: Address) -> str:
    """What to do about a refusal, where the system's words do not say it."""
    match error.errno:
        case errno.EADDRINUSE if not address.path:
            return "address in use: stop whoever listens there, or choose another port"
        case errno.EACCES if 0 < address.port < 1024:
            return "permission denied: a port below 1024 needs root, CAP_NET_BIND_SERVICE, or a socket passed as fd:N"
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address"
        case errno.EBADF:
            return "no such descriptor is open; have whoever starts this pass it"
        case errno.ENOENT:
            return f"no such directory: {os.path.dirname(os.path.abspath(address.path))}"
    return error.strerror or str(error)
