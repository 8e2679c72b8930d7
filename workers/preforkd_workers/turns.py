"""Turns: one attempt to take a request from a listener, and to see it through socketserver's hooks.

There are two of them: the general one runs socketserver's own ``_handle_request_noblock`` with probes around the hooks,
so that whatever a class overrides is called as ever; the plain one does the same for servers that override none of the
hooks in question, without the detours. ``turn_of`` chooses.
"""

import _socket
import errno
import signal
import socket
from collections.abc import Callable
from socketserver import BaseServer, ForkingMixIn, TCPServer, ThreadingMixIn, UDPServer
from typing import Any

from preforkd_workers import prctl
from preforkd_workers.adoption import AdoptableSocket, MultihomedSocket, kernels_own
from preforkd_workers.scoreboard import ERRORS, OK
from preforkd_workers.tally import Tally, current, here, let_go_of_claim

Turn = Callable[[], bool]
Take = Callable[[], tuple[Any, Any]]  # the next request and its address, or OSError


class Starved(Exception):
    """The system could not give a descriptor or memory for one more connection."""


_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def turn_of(server: BaseServer, tally: Tally, listener: int) -> Turn:
    """The fastest turn that keeps socketserver's contract for this server, at the n-th listener, as it is now."""
    take = take_of(server)
    return general_turn(server, tally, listener) if take is None else plain_turn(server, tally, listener, take)


def take_of(server: BaseServer) -> Take | None:
    """``get_request`` without its detours, for a server that has socketserver's own hooks up to the handler."""
    hooks = "_handle_request_noblock", "verify_request", "process_request", "finish_request"
    if isinstance(server, TCPServer) and not overrides(server, BaseServer, *hooks) and _has_plain_socket(server):
        if isinstance(server, UDPServer):
            if not overrides(server, UDPServer, "get_request", "shutdown_request"):
                return _datagram_take(server)
        elif not overrides(server, TCPServer, "get_request"):
            return _stream_take(server)
    return None


def _has_plain_socket(server: TCPServer) -> bool:
    """Whether accept(2) and recvfrom(2) may be called past the socket object: not on a TLS socket, say."""
    return type(server.socket) in (socket.socket, AdoptableSocket, MultihomedSocket)


def overrides(server: BaseServer, base: type, *hooks: str) -> bool:
    """Whether the server, or its class, has a hook that is not the one of ``base``."""
    return any(getattr(getattr(server, hook), "__func__", None) is not getattr(base, hook) for hook in hooks)


def _stream_take(server: Any) -> Take:
    accept, make_socket = server.socket._accept, getattr(server.socket, "connection_class", None) or socket.socket
    family, kind, proto = int(server.socket.family), int(server.socket.type), server.socket.proto

    def take() -> tuple[Any, Any]:
        descriptor, address = accept()
        return make_socket(family, kind, proto, descriptor), address

    return take


def _datagram_take(server: Any) -> Take:
    """The receive does not wait, but the socket stays in blocking mode for the handler's own ``sendto``."""
    own_socket = server.socket
    is_adopted, is_multihomed = isinstance(own_socket, AdoptableSocket), isinstance(own_socket, MultihomedSocket)
    receive = own_socket.take if is_multihomed else _socket.socket.recvfrom.__get__(kernels_own(own_socket))

    def take() -> tuple[Any, Any]:
        longest = server.max_packet_size
        data, address = receive(longest + 1, socket.MSG_DONTWAIT)
        if len(data) > longest:
            data = data[:longest]
            if is_adopted:
                own_socket.on_truncation()
        return (data, own_socket), address

    return take


def plain_turn(server: Any, tally: Tally, listener: int, take: Take) -> Turn:
    """For a server with socketserver's own hooks up to the handler."""
    begin = tally.begin

    def turn() -> bool:
        try:
            request, address = take()
        except OSError as error:
            return nothing_taken(error)
        begin(request, address, listener)
        see_through(server, tally, request, address)
        return True

    return turn


def see_through(server: Any, tally: Tally, request: Any, address: Any) -> None:
    """A request from its handler to its end, as BaseServer and TCPServer have it."""
    try:
        server.RequestHandlerClass(request, address, server)
        server.shutdown_request(request)
    except Exception:
        server.handle_error(request, address)
        server.shutdown_request(request)
        tally.end(ERRORS)
    except BaseException:
        server.shutdown_request(request)
        tally.end(ERRORS)
        raise
    else:
        tally.end(OK)


def general_turn(server: Any, tally: Tally, listener: int) -> Turn:
    """For any server: socketserver's own code calls the hooks, and probes around three of them count."""
    if not hasattr(server, "probes"):
        server.probes = Probes(server, tally, listener)

    def turn() -> bool:
        here.taken, here.claimed = False, None
        server._handle_request_noblock()
        return bool(here.taken)

    return turn


class Probes:
    """Around the hooks of a server, which several lanes may share: each counts in the tally of the lane that is here.

    What a server hands to threads of its own is counted in those, around ``finish_request``; what it hands to children
    of its own (ForkingMixIn) is counted as it is handed over.
    """

    def __init__(self, server: Any, tally: Tally, listener: int) -> None:
        self.tally = tally  # for threads of the server's own, which are no lanes
        self.listener = listener
        is_forking, is_threading = isinstance(server, ForkingMixIn), isinstance(server, ThreadingMixIn)
        has_threads = is_threading and "process_request" not in vars(server)  # or else its threads are the lanes
        working_hook = "finish_request" if has_threads else "process_request"
        self.get_request, self.verify_request = server.get_request, server.verify_request
        self.work = getattr(server, working_hook)
        if is_forking:
            server.finish_request = _tied(server)
        server.get_request = self.probed_get_request
        server.verify_request = self.probed_verify_request
        setattr(server, working_hook, self.probed_work)

    def probed_get_request(self) -> Any:
        try:
            received = self.get_request()
        except OSError as error:
            let_go_of_claim()
            here.taken = nothing_taken(error)
            raise
        here.taken = True
        return received

    def probed_verify_request(self, request: Any, address: Any) -> Any:
        verdict = self.verify_request(request, address)
        if not verdict:
            (let_go_of_claim() or current(self.tally)).refuse(address, self.listener)
        return verdict

    def probed_work(self, request: Any, address: Any) -> None:
        tally = current(self.tally)
        tally.begin(request, address, self.listener)
        try:
            self.work(request, address)
        except BaseException:
            tally.end(ERRORS)
            raise
        tally.end(OK)


def _tied(server: Any) -> Callable[[Any, Any], None]:
    """``finish_request`` for the children of ForkingMixIn."""
    finish_request = server.finish_request

    def finish_in_child(request: Any, address: Any) -> None:
        _tie_child(server)
        finish_request(request, address)

    return finish_in_child


def _tie_child(server: Any) -> None:
    """In a child that ForkingMixIn has forked: die with the worker that waits for it, or outlive it portless."""
    if server.block_on_close:
        prctl.signal_on_parent_death(signal.SIGKILL)
    elif server.socket.type == socket.SOCK_STREAM:
        server.socket.close()


def nothing_taken(error: OSError) -> bool:
    """What a turn returns after this error of accept(2) or recvfrom(2): whether it is worth trying again at once.

    Raises Starved when it is not worth it for a while.
    """
    if error.errno in _SCARCE:
        raise Starved(error.strerror) from error
    return not isinstance(error, BlockingIOError | TimeoutError)
