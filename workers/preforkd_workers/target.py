"""From ``module:name`` to server objects around sockets that are already bound."""

import importlib
import importlib.util
import os
import socket
import sys
from socketserver import (
    BaseRequestHandler,
    BaseServer,
    DatagramRequestHandler,
    ForkingMixIn,
    StreamRequestHandler,
    TCPServer,
    ThreadingMixIn,
    UDPServer,
    UnixDatagramServer,
    UnixStreamServer,
)
from types import ModuleType
from typing import Any

from msgspec import Struct

from preforkd_workers.adoption import AdoptableSocket, adoption, protect
from preforkd_workers.explanation import TargetError
from preforkd_workers.extras import offer
from preforkd_workers.hooks import Hook, Hooks
from preforkd_workers.spec import Listener, Spec
from preforkd_workers.spelling import meant

# The server class for a bare handler.
_SERVER_CLASSES: dict[tuple[int, int], type[TCPServer]] = {
    (socket.AF_INET, socket.SOCK_STREAM): TCPServer,
    (socket.AF_INET6, socket.SOCK_STREAM): TCPServer,
    (socket.AF_UNIX, socket.SOCK_STREAM): UnixStreamServer,
    (socket.AF_INET, socket.SOCK_DGRAM): UDPServer,
    (socket.AF_INET6, socket.SOCK_DGRAM): UDPServer,
    (socket.AF_UNIX, socket.SOCK_DGRAM): UnixDatagramServer,
}

_WANTED = "want a request handler class, a server class, a server instance, or a factory f(address) -> server"


class Target(Struct, frozen=True):
    """Server objects, one per listener, what kind of thing they were made from, and the hooks beside it."""

    kind: str
    servers: list[BaseServer]
    hooks: Hooks

    def mixes_in(self) -> str | None:
        """The mixin by which the servers hand requests to threads or children of their own, if they do."""
        for mixin in (ThreadingMixIn, ForkingMixIn):
            if any(isinstance(server, mixin) for server in self.servers):
                return mixin.__name__
        return None


def build(spec: Spec) -> Target:
    """Import the target and construct a server around each listener.

    Raises TargetError when there is no such target or it does not fit, and whatever its own code raises.
    """
    protect(spec.listeners)
    with adoption(spec.listeners):
        found = load(spec.target)
    handler = None if spec.handler is None else load(spec.handler)
    hooks = Hooks({setting: find_hook(spec.target, setting, name) for setting, name in spec.hooks.items()})
    if isinstance(found, BaseServer) and len(spec.listeners) > 1:
        raise TargetError(
            f"{spec.target} is one server instance and has one socket, not {len(spec.listeners)} listeners"
        )
    kind = _kind(spec.target, found)
    servers = [_construct(spec.target, found, handler, listener) for listener in spec.listeners]
    for server, listener in zip(servers, spec.listeners, strict=True):
        listener.socket.close()  # the server has a copy
        prepare(server, spec)
    return Target(kind, servers, hooks)


def prepare(server: Any, spec: Spec) -> None:
    """Have the server be as the settings say, and have what handlers may look at. Raises TargetError when it cannot."""
    _check_door(spec, server)
    offer(server)
    server.draining = False
    if spec.max_packet_size:
        server.max_packet_size = spec.max_packet_size


def _check_door(spec: Spec, server: Any) -> None:
    """Whether it can be seen at the door what a server takes, and told what it holds."""
    if not spec.limits.has_door or server.socket.type != socket.SOCK_STREAM:
        return
    name = type(server).__name__
    if isinstance(server, ForkingMixIn) or (isinstance(server, ThreadingMixIn) and spec.kind == "process"):
        mixin = "ForkingMixIn" if isinstance(server, ForkingMixIn) else "ThreadingMixIn"
        raise TargetError(f"{name} mixes in {mixin}: max_per_client and when_full count lanes; use kind = thread")
    if not hasattr(server.socket, "__dict__"):
        raise TargetError(f"{name} accepts from a socket of its own making: max_per_client and when_full cannot be")


def find_hook(target: str, setting: str, name: str) -> Hook:
    """A hook by its name in the target's own module, or by a name such as the target's."""
    own = target.rpartition(":")[0]
    try:
        found = load(name if ":" in name else f"{own}:{name}")
    except TargetError as error:
        raise TargetError(f"{setting}: {error}") from None
    if not callable(found):
        raise TargetError(f"{setting}: {name} is {_describe(found)}; want a function")
    hook: Hook = found
    return hook


def load(name: str) -> Any:
    """Import ``package.module:attribute`` or ``path/to/file.py:attribute``; the attribute may be dotted."""
    place, colon, attribute = name.rpartition(":")
    if not (place and colon and attribute):
        raise TargetError(f"{name!r}: want module:name or path/to/file.py:name")
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            close = meant(part, dir(found))
            hint = f"; did you mean {close!r}?" if close else ""
            raise TargetError(f"{place} has no {attribute!r}{hint}") from None
    return found


def _load_module(name: str) -> ModuleType:
    _look_in(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            message = f"no module named {error.name!r} in {os.getcwd()} or elsewhere on sys.path"
            raise TargetError(message) from None
        raise


def _load_file(path: str) -> ModuleType:
    _look_in(os.getcwd())
    if not os.path.isfile(path):
        raise TargetError(f"{os.path.abspath(path)}: no such file")
    _look_in(os.path.dirname(os.path.abspath(path)))
    name = os.path.basename(path).removesuffix(".py")
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == os.path.abspath(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, os.path.abspath(path))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _look_in(directory: str) -> None:
    """Import from this directory first, as ``python file.py`` and ``python -m`` do."""
    if directory not in sys.path:
        sys.path.insert(0, directory)


def _kind(name: str, found: object) -> str:
    match found:
        case type() if issubclass(found, BaseRequestHandler):
            return "handler class"
        case type() if issubclass(found, BaseServer):
            return "server class"
        case BaseServer():
            return "server instance"
        case _ if callable(found) and not isinstance(found, type):
            return "factory"
    raise TargetError(f"{name} is {_describe(found)}; {_WANTED}")


def _construct(name: str, found: Any, handler: Any, listener: Listener) -> BaseServer:
    address = listener.socket.getsockname()
    with adoption([listener], at_once=True):
        match _kind(name, found):
            case "handler class":
                server = _around_handler(name, found, listener)
            case "server class":
                server = _server_of_class(name, found, handler, address)
            case "server instance":
                server = found
            case _:
                server = found(address)
                if not isinstance(server, BaseServer):
                    raise TargetError(f"{name}{address!r} returned {_describe(server)}, not a server")
    fit(name, server, listener)
    return server


def _around_handler(name: str, handler: type[BaseRequestHandler], listener: Listener) -> BaseServer:
    family, kind = listener.socket.family, listener.socket.type
    other = StreamRequestHandler if kind == socket.SOCK_DGRAM else DatagramRequestHandler
    if issubclass(handler, other):
        raise TargetError(f"{name} is a {other.__name__}, which cannot serve {listener.url}")
    server_class = _SERVER_CLASSES.get((family, kind))
    if server_class is None:
        raise TargetError(
            f"{listener.url} is of family {family!r} and type {kind!r}; {name} needs a server class for it"
        )
    return server_class(listener.socket.getsockname(), handler)


def _server_of_class(name: str, server_class: Any, handler: Any, address: Any) -> BaseServer:
    try:
        server: BaseServer = server_class(address) if handler is None else server_class(address, handler)
    except TypeError as error:
        if handler is None and error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise TargetError(f"{name} cannot be made from an address alone ({error}); give it a handler") from None
        raise
    return server


def fit(name: str, server: Any, listener: Listener) -> None:
    """See to it that the server serves the listener, whatever socket it made for itself."""
    wanted, given = getattr(server, "socket_type", listener.socket.type), listener.socket.type
    if wanted != given:
        raise TargetError(
            f"{name}: {type(server).__name__} is a {_TYPES.get(wanted, wanted)} server, "
            f"but {listener.url} is a {_TYPES.get(given, given)} listener"
        )
    own = getattr(server, "socket", None)
    if not isinstance(own, socket.socket) or own.fileno() < 0:
        raise TargetError(f"{name}: {type(server).__name__} has no open socket after its construction")
    if own.getsockname() != listener.socket.getsockname():
        if isinstance(own, AdoptableSocket):
            own.become(listener)
            server.server_bind()  # once more, for what it derives from the address
        else:
            os.dup2(listener.socket.fileno(), own.fileno(), inheritable=False)
            server.server_address = listener.socket.getsockname()
    server.address_family = listener.socket.family


_TYPES = {socket.SOCK_STREAM: "stream", socket.SOCK_DGRAM: "datagram"}


def _describe(found: object) -> str:
    return f"the class {found.__qualname__}" if isinstance(found, type) else f"of type {type(found).__qualname__}"
