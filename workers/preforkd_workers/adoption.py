"""Adopted sockets: a server class that makes, binds and listens for itself is given the master's socket instead.

While a target is imported and constructed, the ``socket`` module that socketserver sees is replaced by one whose
``socket()`` makes adoptable sockets. Such a socket *becomes* a listener, and from then on its ``bind`` and ``listen``
do nothing: ``server_bind`` and ``server_activate`` run as written.
"""

import _socket
import errno
import os
import socket
import socketserver
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from preforkd_workers import multihoming
from preforkd_workers.spec import Listener

# Of how many clients of a socket the way back is remembered: those that were heard of last.
MOST_CLIENTS = 4096

# What the kernel says when it is to send from an address that this machine has no more: in IPv6, in IPv4.
_NOT_OURS = errno.EINVAL, errno.ENETUNREACH


_JOINS = (socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP), (socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP)


class AdoptableSocket(socket.socket):
    """A socket that may become a listener, at once or when it is bound to the listener's address."""

    adopted = False
    on_offer: Sequence[Listener] = ()
    ask: "Callable[[AdoptableSocket, Any], Listener | None] | None" = None  # for a copy of the listener of an address
    on_truncation: Callable[[], None] = staticmethod(lambda: None)  # for a datagram that was longer than its reader
    connection_class: type[socket.socket] | None = None  # of what it accepts, if that is to be a special one

    ways_back: OrderedDict[Any, multihoming.WayBack]  # of a MultihomedSocket, by client

    def become(self, listener: Listener) -> None:
        """Turn into the listener, under the descriptor number that this object has had so far."""
        number = self.detach()
        os.dup2(listener.socket.fileno(), number, inheritable=False)
        socket.socket.__init__(self, fileno=number)  # anew: family and type are the listener's
        self.settimeout(listener.socket.gettimeout())
        self.adopted = True
        if multihoming.is_needed(self):
            multihoming.ask_for(self)
            self.__class__ = MultihomedSocket
            self.ways_back = OrderedDict()

    def bind(self, address: Any) -> None:
        offers = () if self.adopted else self.on_offer
        for listener in offers:
            if _same_place(listener.socket.getsockname(), address):
                self.become(listener)
        if self.ask is not None and not self.adopted and (answer := self.ask(self, address)) is not None:
            self.become(answer)
            answer.socket.close()
        if not self.adopted:
            super().bind(address)

    def setsockopt(self, *arguments: Any) -> None:
        """As ever; but a listener that is in a multicast group already, since the last reload, stays in it."""
        try:
            super().setsockopt(*arguments)
        except OSError as error:
            if not (self.adopted and error.errno == errno.EADDRINUSE and arguments[:2] in _JOINS):
                raise

    def listen(self, backlog: int = 128) -> None:
        if not self.adopted:
            super().listen(backlog)

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        if self.connection_class is not None:
            connection = self.connection_class(fileno=connection.detach())
        return connection, address

    def recvfrom(self, size: int, flags: int = 0) -> tuple[bytes, Any]:
        """Receive without waiting, for another worker may have taken the datagram that woke this one.

        The socket itself stays in blocking mode: O_NONBLOCK would be shared with all who hold it (open(2)). One byte
        more is received than is wanted, to see whether there is more.
        """
        if not self.adopted:
            return super().recvfrom(size, flags)
        data, address = self.take(size + 1, flags | socket.MSG_DONTWAIT)
        if len(data) > size:
            self.on_truncation()
        return data[:size], address

    def take(self, size: int, flags: int) -> tuple[bytes, Any]:
        """What the kernel gives, and its address."""
        received: tuple[bytes, Any] = _socket.socket.recvfrom(kernels_own(self), size, flags)
        return received


def kernels_own(found: Any) -> Any:
    """The socket below one of gevent's, whose methods would wait for the next datagram; any other as it is."""
    return getattr(found, "_sock", found)


class MultihomedSocket(AdoptableSocket):
    """A datagram listener that is not bound to one address: it answers from the one that the client has asked.

    The client's address, as ``recvfrom`` gave it, tells which that is, whoever answers, and however much later.
    """

    def take(self, size: int, flags: int) -> tuple[bytes, Any]:
        data, told, _, client = _socket.socket.recvmsg(kernels_own(self), size, multihoming.SPACE, flags)
        way_back = multihoming.way_back(told)
        ways = self.ways_back
        ways.pop(client, None)
        if way_back is not None:
            ways[client] = way_back
            if len(ways) > MOST_CLIENTS:
                ways.popitem(last=False)
        return data, client

    def sendto(self, data: Any, *flags_and_address: Any) -> int:
        way_back = self.ways_back.get(flags_and_address[-1]) if flags_and_address else None
        if way_back is not None:
            flags = flags_and_address[0] if len(flags_and_address) > 1 else 0
            try:
                return self.sendmsg([data], way_back, flags, flags_and_address[-1])
            except OSError as error:
                if error.errno not in _NOT_OURS:
                    raise
        return super().sendto(data, *flags_and_address)


def _same_place(bound: Any, address: Any) -> bool:
    """Whether who binds to ``address`` means the listener at ``bound``: the same path, or the same port (0: any)."""
    if isinstance(bound, tuple):
        return isinstance(address, tuple) and len(address) > 1 and address[1] in (0, bound[1])
    return bool(os.fsencode(bound) == os.fsencode(address)) if isinstance(address, str | bytes) else False


class _SocketModule(ModuleType):
    """What socketserver sees as ``socket``: the real one but for ``socket()``."""

    def __init__(self, make: Callable[..., AdoptableSocket]) -> None:
        super().__init__("socket")
        self.socket = make

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)


@contextmanager
def made_by(make: Callable[..., AdoptableSocket]) -> Iterator[None]:
    """Let the sockets of socketserver be made by ``make``, which is called as ``socket.socket`` is."""
    socketserver.socket = _SocketModule(make)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        socketserver.socket = socket  # type: ignore[attr-defined]


@contextmanager
def adoption(listeners: Sequence[Listener], *, at_once: bool = False) -> Iterator[None]:
    """Let the sockets that socketserver makes become these listeners.

    By default when they are bound to the address of one; ``at_once``: any of them becomes the first, whatever it is
    bound to later.
    """

    def make(*arguments: Any, **keywords: Any) -> AdoptableSocket:
        made = AdoptableSocket(*arguments, **keywords)
        if at_once:
            made.become(listeners[0])
        else:
            made.on_offer = listeners
        return made

    with made_by(make):
        yield


_kept_files: set[str] = set()
_keeps_sockets = False
_really_unlink = os.unlink


def protect(listeners: Iterable[Listener]) -> None:
    """From now on, removing the file of a Unix listener in this process and its children does nothing.

    Servers often remove a stale socket file before they bind, or their own when they close; here the file is the
    master's, and other workers serve behind it.
    """
    names = [listener.socket.getsockname() for listener in listeners]
    keep(name for name in names if isinstance(name, str) and name)


def keep(paths: Iterable[str]) -> None:
    """From now on, removing one of these files in this process and its children does nothing."""
    _kept_files.update(map(os.path.abspath, paths))
    if _kept_files:
        os.unlink = os.remove = _unlink


def keep_sockets() -> None:
    """Nor does removing any socket file: somebody may serve behind it."""
    global _keeps_sockets
    _keeps_sockets = True
    os.unlink = os.remove = _unlink


def _unlink(path: Any, *, dir_fd: int | None = None) -> None:
    is_kept = os.path.abspath(os.fsdecode(path)) in _kept_files or (_keeps_sockets and _is_socket(path))
    if not is_kept:
        _really_unlink(path, dir_fd=dir_fd)


def _is_socket(path: Any) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
