"""What a script binds: its master is asked to, which keeps the listener when this process is gone.

The script's own socket becomes the listener that comes back, or ``bind`` raises the reason why there is none. In a
rehearsal nobody is asked and nothing is bound.
"""

import errno
import json
import os
import socket
import threading
from contextlib import suppress
from typing import Any

from msgspec import Struct

from preforkd_workers import protocol
from preforkd_workers.adoption import AdoptableSocket, keep
from preforkd_workers.explanation import TargetError
from preforkd_workers.protocol import BIND, BOUND
from preforkd_workers.spec import Listener, Spec
from preforkd_workers.urls import SCHEMES, with_port


class Binding(Struct, frozen=True):
    """A listener that the script has, under a descriptor of its own."""

    url: str
    descriptor: int
    inode: int

    @property
    def is_open(self) -> bool:
        with suppress(OSError):
            return os.fstat(self.descriptor).st_ino == self.inode
        return False


class Bindings:
    """The listeners of a script, in the order in which it has bound them."""

    def __init__(self, spec: Spec, channel: socket.socket) -> None:
        self._spec = spec
        self._channel = channel
        self._pid = os.getpid()
        self._one_at_a_time = threading.Lock()
        self._all: list[Binding] = []
        self.is_closed = False  # what comes now binds for itself

    def make(self, *arguments: Any, **keywords: Any) -> AdoptableSocket:
        """What socketserver gets for ``socket.socket(...)``."""
        made = (_Rehearsing if self._spec.is_rehearsal else AdoptableSocket)(*arguments, **keywords)
        made.ask = self._bind
        return made

    def open(self) -> list[Binding]:
        return [each for each in self._all if each.is_open]

    def of(self, server: Any) -> Binding | None:
        """The listener of a server; None when it has another socket than one that socketserver has made."""
        with suppress(OSError, AttributeError):
            inode = os.fstat(server.fileno()).st_ino
            return next((each for each in self.open() if each.inode == inode), None)
        return None

    def _bind(self, asking: AdoptableSocket, address: Any) -> Listener | None:
        """The listener for this address; None when the socket is to bind for itself. Raises what ``bind`` does."""
        place = _place(asking, address)
        if place is None or self.is_closed or os.getpid() != self._pid:  # a child of the script's own
            return None
        with self._one_at_a_time:
            number = 1 + len(self.open())
            listener = self._given(asking, place) if number == self._spec.server else None
            listener = listener or (self._rehearsed(asking, place) if self._spec.is_rehearsal else self._ask(place))
            inode = os.fstat(listener.socket.fileno()).st_ino
            if any(each.inode == inode for each in self.open()):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            self._all.append(Binding(listener.url, asking.fileno(), inode))
        return listener

    def _given(self, asking: AdoptableSocket, place: dict[str, Any]) -> Listener | None:
        """The listener that the settings name, whatever the script says."""
        for listener in self._spec.listeners:
            if listener.socket.type != asking.type:
                raise TargetError(
                    f"{self._spec.target}: its server binds {_url(place)}, which {listener.url} cannot stand for"
                )
            return Listener(listener.url, listener.socket.dup())
        return None

    def _ask(self, place: dict[str, Any]) -> Listener:
        protocol.send(self._channel, f"{BIND} {json.dumps(place)}")
        answer, descriptor = protocol.receive(self._channel)
        if answer is None:  # the master is gone, or needs us no more
            os._exit(1)
        word, _, rest = answer.partition(" ")
        if word != BOUND or descriptor is None:
            number, _, reason = rest.partition(" ")
            raise OSError(int(number), reason)
        made = socket.socket(fileno=descriptor)
        if made.type == socket.SOCK_STREAM:
            made.setblocking(False)  # as it is, and is to stay for all who have it; but the object would not know
        if "path" in place and not place["path"].startswith("@"):
            keep([place["path"]])
        return Listener(rest, made)

    def _rehearsed(self, asking: AdoptableSocket, place: dict[str, Any]) -> Listener:
        assert isinstance(asking, _Rehearsing)
        asking.name = place.get("path") or (place["host"], place["port"])
        return Listener(_url(place), asking.dup())


class _Rehearsing(AdoptableSocket):
    """A socket that says that it is bound."""

    name: Any = None

    def become(self, listener: Listener) -> None:
        if self.name is None:
            super().become(listener)
        self.adopted = True

    def getsockname(self) -> Any:
        return super().getsockname() if self.name is None else self.name


def _place(asking: socket.socket, address: Any) -> dict[str, Any] | None:
    """Where the script binds this socket, for the master; None when that is no business of its.

    Host names are looked up here: the master waits for nobody. Raises what ``bind`` raises.
    """
    scheme = SCHEMES.get((asking.family, asking.type))
    if scheme is None:
        return None
    if asking.family == socket.AF_UNIX:
        return _unix_place(scheme, address)
    match address:
        case (str() | bytes() | bytearray() as host, int(port), *more) if 0 <= port < 1 << 16:
            numeric = _numeric(host if isinstance(host, str) else host.decode(), port, more, asking)
        case _:
            return None
    options = {}
    if asking.family == socket.AF_INET6:
        options["v6only"] = str(asking.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    shares = bool(asking.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
    return {"scheme": scheme, "host": numeric, "port": port, "options": options, "shares": shares}


def _numeric(host: str, port: int, more: list[Any], asking: socket.socket) -> str:
    """The address that a host has, as text. ``more``: flow and scope of one of IPv6."""
    host = "255.255.255.255" if host == "<broadcast>" else host
    found = socket.getaddrinfo(host or None, port, asking.family, asking.type, 0, socket.AI_PASSIVE)[0][4]
    where: Any = (*found[:2], *(more or found[2:]))
    return socket.getnameinfo(where, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def _unix_place(scheme: str, address: Any) -> dict[str, Any] | None:
    if not isinstance(address, str | bytes) or not address:
        return None
    path = os.fsdecode(address)
    if path.startswith("\0"):
        return {"scheme": scheme, "path": f"@{path[1:]}", "options": {}}
    mask = os.umask(0o077)
    os.umask(mask)
    return {"scheme": scheme, "path": os.path.abspath(path), "options": {"mode": f"{0o777 & ~mask:04o}"}}


def _url(place: dict[str, Any]) -> str:
    if "path" in place:
        return f"{place['scheme']}:{place['path']}"
    return f"{place['scheme']}://{with_port(place['host'], place['port'])}"
