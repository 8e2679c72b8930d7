"""The lane: the accept loop, which takes one request at a time through socketserver's hooks.

A *turn* is one attempt to take a request from a listener. There are three of them: the general one runs socketserver's
own ``_handle_request_noblock`` with probes around the hooks, so that whatever a class overrides is called as ever; the
other two do the same for servers that override none of the hooks in question, without the detours. ``turn_of`` chooses.

A lane is told to stop by its lifeline, never by a flag alone: a wait that a signal interrupts is taken up again
(PEP 475) unless something in it has become readable.
"""

import errno
import select
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from socketserver import BaseServer, ForkingMixIn, TCPServer, ThreadingMixIn, UDPServer
from time import monotonic
from typing import Any

from preforkd_workers import prctl
from preforkd_workers.adoption import AdoptableSocket
from preforkd_workers.lifeline import Lifeline
from preforkd_workers.scoreboard import DRAINING, ERRORS, OK, STATE, ended
from preforkd_workers.tally import Tally

# After so many requests without a wait, look at the lifeline all the same.
BUSY_TURNS = 64

# After so many requests, a lane on trial has the master look at it.
TRIED_EVERY = 5

# How long to let go of the listener when the system is out of descriptors or memory, in seconds.
STARVED_FOR = 0.1

# How often a lane says that it is starved, in seconds.
STARVED_NOTICE = 10.0

Turn = Callable[[], bool]


class Starved(Exception):
    """The system could not give a descriptor or memory for one more connection."""


_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def turn_of(server: BaseServer, tally: Tally) -> Turn:
    """The fastest turn that keeps socketserver's contract for this server as it is now."""
    hooks = "_handle_request_noblock", "verify_request", "process_request", "finish_request"
    if isinstance(server, TCPServer) and not _overrides(server, BaseServer, *hooks) and _has_plain_socket(server):
        if isinstance(server, UDPServer):
            if not _overrides(server, UDPServer, "get_request", "shutdown_request"):
                return datagram_turn(server, tally)
        elif not _overrides(server, TCPServer, "get_request"):
            return stream_turn(server, tally)
    return general_turn(server, tally)


def _has_plain_socket(server: TCPServer) -> bool:
    """Whether accept(2) and recvfrom(2) may be called past the socket object: not on a TLS socket, say."""
    return type(server.socket) in (socket.socket, AdoptableSocket)


def _overrides(server: BaseServer, base: type, *hooks: str) -> bool:
    """Whether the server, or its class, has a hook that is not the one of ``base``."""
    return any(hook in vars(server) or getattr(type(server), hook) is not getattr(base, hook) for hook in hooks)


def stream_turn(server: Any, tally: Tally) -> Turn:
    """For a stream server with socketserver's own hooks up to the handler."""
    accept = server.socket._accept
    family, kind, proto = int(server.socket.family), int(server.socket.type), server.socket.proto
    make_socket, begin, end = socket.socket, tally.begin, tally.end

    def turn() -> bool:
        try:
            descriptor, address = accept()
        except OSError as error:
            return _nothing_taken(error)
        request = make_socket(family, kind, proto, descriptor)
        begin(request)
        try:
            server.RequestHandlerClass(request, address, server)
            server.shutdown_request(request)
        except Exception:
            server.handle_error(request, address)
            server.shutdown_request(request)
            end(ERRORS)
        except BaseException:
            server.shutdown_request(request)
            end(ERRORS)
            raise
        else:
            end(OK)
        return True

    return turn


def datagram_turn(server: Any, tally: Tally) -> Turn:
    """For a datagram server with socketserver's own hooks up to the handler.

    The receive does not wait, but the socket stays in blocking mode for the handler's own ``sendto``.
    """
    own_socket = server.socket
    receive = socket.socket.recvfrom.__get__(own_socket)
    begin, end = tally.begin, tally.end

    def turn() -> bool:
        try:
            data, address = receive(server.max_packet_size, socket.MSG_DONTWAIT)
        except OSError as error:
            return _nothing_taken(error)
        request = (data, own_socket)
        begin(request)
        try:
            server.RequestHandlerClass(request, address, server)
        except Exception:
            server.handle_error(request, address)
            end(ERRORS)
        except BaseException:
            end(ERRORS)
            raise
        else:
            end(OK)
        return True

    return turn


def general_turn(server: Any, tally: Tally) -> Turn:
    """For any server: socketserver's own code calls the hooks, and probes around three of them count.

    What a server hands to threads of its own is counted in those, around ``finish_request``; what it hands to children
    of its own (ForkingMixIn) is counted as it is handed over.
    """
    taken = False
    working_hook = "finish_request" if isinstance(server, ThreadingMixIn) else "process_request"
    get_request, verify_request, work = server.get_request, server.verify_request, getattr(server, working_hook)

    def probed_get_request() -> Any:
        nonlocal taken
        try:
            received = get_request()
        except OSError as error:
            taken = _nothing_taken(error)
            raise
        taken = True
        return received

    def probed_verify_request(request: Any, address: Any) -> Any:
        verdict = verify_request(request, address)
        if not verdict:
            tally.refuse()
        return verdict

    def probed_work(request: Any, address: Any) -> None:
        tally.begin(request)
        try:
            work(request, address)
        except BaseException:
            tally.end(ERRORS)
            raise
        tally.end(OK)

    has_children = isinstance(server, ForkingMixIn)
    if has_children:
        finish_request = server.finish_request

        def finish_in_child(request: Any, address: Any) -> None:
            _tie_child(server)
            finish_request(request, address)

        server.finish_request = finish_in_child
    server.get_request = probed_get_request
    server.verify_request = probed_verify_request
    setattr(server, working_hook, probed_work)

    def turn() -> bool:
        nonlocal taken
        taken = False
        server._handle_request_noblock()
        return taken

    return turn


def _tie_child(server: Any) -> None:
    """In a child that ForkingMixIn has forked: die with the worker that waits for it, or outlive it portless."""
    if server.block_on_close:
        prctl.signal_on_parent_death(signal.SIGKILL)
    elif server.socket.type == socket.SOCK_STREAM:
        server.socket.close()


def _nothing_taken(error: OSError) -> bool:
    """What a turn returns after this error of accept(2) or recvfrom(2): whether it is worth trying again at once.

    Raises Starved when it is not worth it for a while.
    """
    if error.errno in _SCARCE:
        raise Starved(error.strerror) from error
    return not isinstance(error, BlockingIOError | TimeoutError)


class Lane:
    """One turn after the other over one or more servers, until its lifeline says stop."""

    def __init__(self, servers: list[Any], lifeline: Lifeline, tally: Tally) -> None:
        self.servers = servers
        self.lifeline = lifeline
        self.tally = tally
        self.draining = False
        self.trial_ends = 0.0  # monotonic; until then it is to be given its share
        self.on_drain: list[Callable[[], None]] = []  # what to call then, once
        self._judged = 0  # requests that the master was told of while on trial
        self._starved_notice = 0.0
        self._turns: list[Turn] = []

    def drain(self) -> None:
        """Take nothing new, and wake whoever waits: our own end of the lifeline reads end-of-file from now on."""
        self.draining = True
        self.tally.row[STATE] = DRAINING
        for server in self.servers:
            server.draining = True
        self.lifeline.let_go()
        try:
            call = self.on_drain.pop()  # in one step: a signal handler may come by here at the same time
        except IndexError:
            return
        call()

    def run(self, poll_interval: float | None) -> None:
        """Serve until told to drain. ``poll_interval``, in seconds, is the rhythm of ``service_actions``."""
        for server in self.servers:
            if server.socket.type == socket.SOCK_STREAM:
                server.socket.setblocking(False)  # as the master has made it; a class may have thought otherwise
        turns = self.turns()
        actions = [s.service_actions for s in self.servers if _overrides(s, BaseServer, "service_actions")]
        with self.poll() as epoll:
            patience = poll_interval if actions else None
            is_woken = False
            while not self.draining:
                try:
                    took_any = self._take(turns, actions)
                except Starved as error:
                    self.hold_back(error)
                    continue
                is_woken = self.wait(epoll, 0 if took_any or self.draining else patience)
                for act in actions:
                    act()
            if is_woken:
                self.take_last()

    def turns(self) -> list[Turn]:
        """The turn of each server, made once: the general one puts probes into its server."""
        self._turns = self._turns or [turn_of(server, self.tally) for server in self.servers]
        return self._turns

    def poll(self) -> select.epoll:
        """What to wait with: for something to take, or for the end of the lifeline."""
        epoll = select.epoll()
        # Every lane waits on the same listeners: one connection is to wake one lane (epoll_ctl(2), EPOLLEXCLUSIVE).
        mode = select.EPOLLIN if self.trial_ends else select.EPOLLIN | select.EPOLLEXCLUSIVE
        for server in self.servers:
            epoll.register(server.fileno(), mode)
        epoll.register(self.lifeline.fileno(), select.EPOLLIN)
        return epoll

    def be_on_trial(self, seconds: float) -> None:
        """Be woken for every connection, beside whoever else is, for so long.

        The first in the queue of a listener is woken, which is the oldest lane. Unless there is more to do than it can,
        a new one would get nothing, and nobody would see how it does.
        """
        self.trial_ends = monotonic() + seconds if seconds else 0.0
        self._judged = ended(self.tally.row)

    def _go_on_trial(self, epoll: select.epoll) -> None:
        """Tell the master whenever there is something to judge by; in the end, queue up as the others do."""
        requests = ended(self.tally.row)
        if requests >= self._judged + TRIED_EVERY:
            self._judged = requests
            self.lifeline.tried()
        if monotonic() < self.trial_ends:
            return
        self.trial_ends = 0.0
        for server in self.servers:  # EPOLL_CTL_MOD cannot do this
            epoll.unregister(server.fileno())
            epoll.register(server.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def wait(self, epoll: select.epoll, patience: float | None) -> bool:
        """Wait for as many seconds; drain if the lifeline says so. Whether it was a listener that woke us."""
        if self.trial_ends:
            self._go_on_trial(epoll)
        ready = {descriptor for descriptor, _ in epoll.poll(patience)}
        if self.lifeline.fileno() in ready:
            self.drain()
        return patience != 0 and bool(ready - {self.lifeline.fileno()})

    def take_last(self) -> None:
        """Take what has woken us although we drain: nobody else is woken for it, and nobody might come by.

        One request of each server, for several may have woken us at once.
        """
        for turn in self.turns():
            with suppress(Starved):
                turn()

    def _take(self, turns: list[Turn], actions: list[Callable[[], None]]) -> bool:
        """Take what is there, at most BUSY_TURNS times; whether there may be more."""
        for _ in range(BUSY_TURNS):
            took_any = False
            for turn in turns:
                took_any |= turn()
            if not took_any or self.draining:
                return False
            for act in actions:
                act()
        return True

    def hold_back(self, error: Starved) -> None:
        """Leave the listeners alone for a moment, but not the lifeline."""
        if monotonic() >= self._starved_notice:
            self._starved_notice = monotonic() + STARVED_NOTICE
            self.lifeline.notice("starved", error=str(error), advice="raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE=)")
        readable, _, _ = select.select([self.lifeline], [], [], STARVED_FOR)
        if readable:
            self.drain()
