"""Adopted sockets: a server class that makes, binds and listens for itself is given the master's socket instead.

While a target is imported and constructed, the ``socket`` module that socketserver sees is replaced by one whose
``socket()`` makes adoptable sockets. Such a socket *becomes* a listener, and from then on its ``bind`` and ``listen``
do nothing: ``server_bind`` and ``server_activate`` run as written.
"""

import os
import socket
import socketserver
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from preforkd_workers.spec import Listener


class AdoptableSocket(socket.socket):
    """A socket that may become a listener, at once or when it is bound to the listener's address."""

    adopted = False
    on_offer: Sequence[Listener] = ()

    def become(self, listener: Listener) -> None:
        """Turn into the listener, under the descriptor number that this object has had so far."""
        number = self.detach()
        os.dup2(listener.socket.fileno(), number, inheritable=False)
        socket.socket.__init__(self, fileno=number)  # anew: family and type are the listener's
        self.settimeout(listener.socket.gettimeout())
        self.adopted = True

    def bind(self, address: Any) -> None:
        offers = () if self.adopted else self.on_offer
        for listener in offers:
            if _same_place(listener.socket.getsockname(), address):
                self.become(listener)
        if not self.adopted:
            super().bind(address)

    def listen(self, backlog: int = 128) -> None:
        if not self.adopted:
            super().listen(backlog)

    def recvfrom(self, size: int, flags: int = 0) -> tuple[bytes, Any]:
        """Receive without waiting, for another worker may have taken the datagram that woke this one.

        The socket itself stays in blocking mode: O_NONBLOCK would be shared with all who hold it (open(2)).
        """
        return super().recvfrom(size, flags | socket.MSG_DONTWAIT if self.adopted else flags)


def _same_place(bound: Any, address: Any) -> bool:
    """Whether who binds to ``address`` means the listener at ``bound``: the same path, or the same port (0: any)."""
    if isinstance(bound, tuple):
        return isinstance(address, tuple) and len(address) > 1 and address[1] in (0, bound[1])
    return bool(os.fsencode(bound) == os.fsencode(address)) if isinstance(address, str | bytes) else False


class _SocketModule(ModuleType):
    """What socketserver sees as ``socket``: the real one but for ``socket()``."""

    def __init__(self, listeners: Sequence[Listener], at_once: bool) -> None:
        super().__init__("socket")
        self._listeners = listeners
        self._at_once = at_once

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, *arguments: Any, **keywords: Any) -> AdoptableSocket:
        made = AdoptableSocket(*arguments, **keywords)
        if self._at_once:
            made.become(self._listeners[0])
        else:
            made.on_offer = self._listeners
        return made


@contextmanager
def adoption(listeners: Sequence[Listener], *, at_once: bool = False) -> Iterator[None]:
    """Let the sockets that socketserver makes become these listeners.

    By default when they are bound to the address of one; ``at_once``: any of them becomes the first, whatever it is
    bound to later.
    """
    socketserver.socket = _SocketModule(listeners, at_once)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        socketserver.socket = socket  # type: ignore[attr-defined]


def protect(listeners: Sequence[Listener]) -> None:
    """From now on, removing the file of a Unix listener in this process and its children does nothing.

    Servers often remove a stale socket file before they bind, or their own when they close; here the file is the
    master's, and other workers serve behind it.
    """
    names = [listener.socket.getsockname() for listener in listeners]
    paths = {os.path.abspath(name) for name in names if isinstance(name, str) and name}
    if not paths:
        return
    really_unlink = os.unlink

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        if os.path.abspath(os.fsdecode(path)) not in paths:
            really_unlink(path, dir_fd=dir_fd)

    os.unlink = os.remove = unlink
