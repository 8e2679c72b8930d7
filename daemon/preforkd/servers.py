"""The library: pre-forking servers in a process of the user's own, in place of socketserver's forking ones.

There is no mold here. Who calls ``serve_forever()`` is the master of its own children and forks them directly; no
signal handler of its process is touched, and no child that is not its own.
"""

import faulthandler
import logging
import os
import selectors
import signal
import socketserver
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from socket import SOCK_STREAM
from socket import socket as Socket  # noqa: N812 - servers have an attribute of the name
from socketserver import *  # noqa: F403 - all of it is offered here as well
from time import monotonic, sleep
from typing import Any, NoReturn, Self
from weakref import WeakSet

from preforkd.children import Child
from preforkd.plan import State, Timeouts, Wanted
from preforkd.pool import Pool
from preforkd.threadpool import (
    ThreadPoolMixIn,
    ThreadPoolTCPServer,
    ThreadPoolUDPServer,
    ThreadPoolUnixDatagramServer,
    ThreadPoolUnixStreamServer,
)
from preforkd.wakeup import held
from preforkd.wear import ENDLESS, Endurance
from preforkd_workers import extras, prctl, process
from preforkd_workers.adoption import AdoptableSocket
from preforkd_workers.lifeline import Lifeline
from preforkd_workers.protocol import DRAIN
from preforkd_workers.scoreboard import Rows, Scoreboard
from preforkd_workers.spec import UNLIMITED

__all__ = [
    "PreForkingMixIn",
    "PreForkingTCPServer",
    "PreForkingUDPServer",
    "PreForkingUnixDatagramServer",
    "PreForkingUnixStreamServer",
    "ThreadPoolMixIn",
    "ThreadPoolTCPServer",
    "ThreadPoolUDPServer",
    "ThreadPoolUnixDatagramServer",
    "ThreadPoolUnixStreamServer",
]
__all__ += socketserver.__all__

# How long a server that is closed waits for workers of others to let go of its socket, in seconds.
LETTING_GO = 5.0

_logger = logging.getLogger("preforkd")


class _Journal:
    """Where a pool in somebody else's process says what it does: the logger ``preforkd``."""

    def event(self, name: str, /, **fields: object) -> None:
        if _logger.isEnabledFor(logging.DEBUG):
            _logger.debug(" ".join([name, *(f"{key}={value}" for key, value in fields.items())]))

    def text(self, prefix: str, lines: str) -> None:
        _logger.warning("%s| %s", prefix, lines)


class PreForkingMixIn(socketserver.BaseServer):
    """Handle requests in a pool of processes that are forked ahead: ``ForkingMixIn`` without a fork for each request.

    Attributes of ForkingMixIn, with the same meaning: ``max_children`` (here the size of the pool, read again and
    again while serving), ``active_children``, ``block_on_close``, ``timeout``; beside them the deadlines of a stop in
    seconds, ``graceful_timeout`` for workers to finish what they hold and ``eof_timeout`` for those who then read
    end-of-file. In a worker the server has ``draining``, and ``shutdown()`` stops the server, not the worker.

    ``handle_request()`` accepts one request itself and forks for it, as ForkingMixIn does; with ``max_children`` busy
    it leaves the request in the backlog until one is free or its time-out is over.

    Fork and threads: a child gets a copy of every lock in the state that it is in, and of every socket that is open at
    that moment. The workers are forked as early as ``serve_forever()`` allows; start other threads after it, or use the
    command-line daemon, which forks from processes that have no threads.
    """

    max_children = 40
    block_on_close = True
    timeout: float | None = 300
    graceful_timeout = 30.0
    eof_timeout = 5.0
    draining = False
    extend_deadline = extras.extend_deadline
    mark = extras.mark

    socket: Socket
    _crew: "_Crew | None" = None
    _singles: set[int] | None = None  # children for one request each
    _lifeline: Lifeline | None = None  # in a worker: its end

    # socketserver's own, which subclasses and users are seen to touch.
    _BaseServer__is_shut_down: threading.Event
    _BaseServer__shutdown_request: bool

    @property
    def active_children(self) -> set[int] | None:
        """The pids of all children; None before the first, as in ForkingMixIn."""
        if self._crew is None:
            return self._singles
        return self._crew.pids() | (self._singles or set())

    def __new__(cls, *_: object, **__: object) -> Self:
        """Remember the server: here and not in ``__init__``, which subclasses are seen to pass over."""
        server = super().__new__(cls)
        _servers.add(server)
        return server

    # The master's side.

    def serve_forever(self, poll_interval: float | None = 0.5) -> None:
        """Keep ``max_children`` workers until ``shutdown()``; then wait for them as ``block_on_close`` says.

        ``poll_interval``, in seconds, is the longest time between two calls of ``service_actions()``; None: for ever.
        """
        self._BaseServer__is_shut_down.clear()
        _serving.add(self)
        patience = float("inf") if poll_interval is None else poll_interval
        try:
            while not self._BaseServer__shutdown_request:
                if self._crew is None:
                    self._crew = _Crew(self, poll_interval)
                self._crew.turn(self.max_children, patience)
                if not self._BaseServer__shutdown_request:
                    self.service_actions()
            self._dismiss()
            if self.block_on_close:
                self._wait_for_crew()
        finally:
            self._dismiss()
            with suppress(OSError):  # closed already
                self.socket.settimeout(self.socket.gettimeout())  # as it was before workers shared it
            _serving.discard(self)
            self._BaseServer__shutdown_request = False
            self._BaseServer__is_shut_down.set()

    def shutdown(self) -> None:
        """Stop the ``serve_forever()`` loop and block until it has ended, which includes the workers' drain.

        In a worker: ask the process that runs the loop to leave it, and return at once.
        """
        if self._lifeline is not None:
            self._lifeline.ask_for_shutdown()
        else:
            super().shutdown()

    def service_actions(self) -> None:
        """Called by the loop; collects children that have died."""
        super().service_actions()
        self.collect_children()

    def handle_timeout(self) -> None:
        """Called when ``handle_request()`` has waited for ``timeout``; collects children that have died."""
        self.collect_children()

    def collect_children(self, *, blocking: bool = False) -> None:
        """Reap those of our own children that have died; ``blocking``: wait until all have."""
        for pid in list(self._singles or ()):
            with suppress(ChildProcessError):  # somebody else has reaped it
                if not os.waitpid(pid, 0 if blocking else os.WNOHANG)[0]:
                    continue
            assert self._singles is not None
            self._singles.discard(pid)
        if blocking:
            self._wait_for_crew()

    def server_close(self) -> None:
        """Close the listening socket, then wait for the children unless ``block_on_close`` is false."""
        super().server_close()
        if self._lifeline is not None:  # a worker's copy; the children are the master's
            return
        self._dismiss()
        self.collect_children(blocking=self.block_on_close)
        if self._crew is not None and not self.block_on_close:
            self._singles = self._crew.let_go() | (self._singles or set())
            self._crew = None
        self._wait_for_newborns()

    def _dismiss(self) -> None:
        """Tell the workers to finish."""
        if self._crew is not None:
            self._crew.turn(0, 0.0)

    def _wait_for_crew(self) -> None:
        """Wait until the workers have left, each step of which has a deadline."""
        while self._crew is not None and self._crew.pool.children:
            self._crew.turn(0, float("inf"))
        if self._crew is not None:
            self._crew.let_go()
            self._crew = None

    def _wait_for_newborns(self) -> None:
        """Wait for workers of other servers that are just forked: until they are ready, our port may be theirs too."""
        end = monotonic() + LETTING_GO
        while any(server._has_newborns for server in [*_serving] if server is not self) and monotonic() < end:
            sleep(0.001)

    @property
    def _has_newborns(self) -> bool:
        """Whether a worker may not have let go yet of what is not its own."""
        crew = self._crew  # which its own thread may put away meanwhile
        return crew is not None and any(child.state is State.BOOTING for child in [*crew.pool.children.values()])

    # One request at a time.

    def handle_request(self) -> None:
        """Accept one request and fork for it, or call ``handle_timeout()`` when there is none within ``timeout``."""
        self.collect_children()
        patience = self.timeout
        end = None if patience is None else monotonic() + patience
        while len(self._singles or ()) >= self.max_children:  # the request waits in the backlog meanwhile
            if not _wait_for_any(self._singles or (), end):
                return self.handle_timeout()
            self.collect_children()
        return super().handle_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a worker, finish the request. In the master, which accepts only in ``handle_request()``, fork for it."""
        if self._lifeline is not None:
            return super().process_request(request, client_address)
        process.flush()
        pid = os.fork()
        if pid == 0:
            self._finish_in_child(request, client_address)
        self._singles = {pid, *(self._singles or ())}
        self.close_request(request)
        return None

    def _finish_in_child(self, request: Any, client_address: Any) -> NoReturn:
        """As ForkingMixIn does: finish the request, and leave with status 1 when that failed."""
        status = 1
        try:
            self.finish_request(request, client_address)
            status = 0
        except Exception:
            self.handle_error(request, client_address)
        finally:
            try:
                self.shutdown_request(request)
            finally:
                os._exit(status)

    # The worker's side.

    def _work(self, lifeline: Lifeline, rows: Rows, poll_interval: float | None) -> None:
        """Serve as a worker until the lifeline ends."""
        self._lifeline = lifeline
        self._share_socket()
        for hook in ("process_request", "service_actions"):  # where nobody overrides ours, do without the detour
            if getattr(type(self), hook) is getattr(PreForkingMixIn, hook):
                setattr(self, hook, getattr(super(), hook))
        worker = process.Worker([self], lifeline, rows, self.graceful_timeout, self.eof_timeout)
        worker.begin(rows)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        worker.open_for_service()
        worker.run(poll_interval)
        worker.wait()

    def _share_socket(self) -> None:
        """Taking a request must not wait when another worker was quicker; a handler's own ``sendto`` waits as ever."""
        if self.socket.type == SOCK_STREAM:
            self.socket.setblocking(False)
        elif type(self.socket) is Socket:
            shared = AdoptableSocket(fileno=self.socket.detach())
            shared.adopted = True
            self.socket = shared


# Every server of this process: a worker lets go of those that are not its own.
_servers: WeakSet[PreForkingMixIn] = WeakSet()

# Those whose loop runs.
_serving: set[PreForkingMixIn] = set()


class _Crew:
    """The pool of one ``serve_forever()``, its selector, and the fork that makes its workers."""

    ready = True  # we fork ourselves, at once
    lanes = 1
    limits = UNLIMITED
    urls = ()
    may_tell = False  # and know the pid when that returns

    def __init__(self, server: PreForkingMixIn, poll_interval: float | None) -> None:
        self.server = server
        self.poll_interval = poll_interval
        self.selector = selectors.DefaultSelector()
        board = Scoreboard.private("library").add("library")
        timeouts = Timeouts(graceful=server.graceful_timeout, eof=server.eof_timeout)
        self.pool = Pool("library", self.selector, board, {1: self}, Wanted(0), timeouts, _Journal())

    def turn(self, size: int, patience: float) -> None:
        """Settle the pool to this size, and wait for news of it, at most for ``patience`` seconds."""
        if size != self.pool.size:
            self.pool.resize(size)
        self.pool.settle()
        timeout = min(patience, self.pool.wake_at() - monotonic())
        for key, _ in self.selector.select(None if timeout == float("inf") else max(0.0, timeout)):
            key.data()
        if self.pool.shutdown_asked:
            self.server._BaseServer__shutdown_request = True

    def pids(self) -> set[int]:
        return {child.pid for child in [*self.pool.children.values()] if child.pid is not None}

    def let_go(self) -> set[int]:
        """Close every descriptor of ours, which tells whoever is left that we are gone. Returns their pids."""
        pids = self.pids()
        self.selector.close()
        for child in self.pool.children.values():
            child.close()
        self.pool.children.clear()
        return pids

    def spawn(self, child: Child, end: Socket) -> int:
        """Fork a worker (the pool's nursery)."""
        process.flush()
        with held(signal.valid_signals()):
            pid = os.fork()
            if pid == 0:
                process.leave(lambda: self._be_worker(child, end))
        return pid

    def endurance(self) -> Endurance:
        return ENDLESS

    def lost(self, child: Child, cause: str, failure: str | None) -> None:
        """The journal has said it, and the pool tries again."""

    def _be_worker(self, child: Child, end: Socket) -> None:
        process.reset_signals()
        if not faulthandler.is_enabled():
            faulthandler.enable()
        for server in list(_servers):
            if server is not self.server and hasattr(server, "socket"):
                server.socket.close()
            if server._crew is not None:
                server._crew.let_go()
        prctl.signal_on_parent_death(DRAIN)  # sent, too, when the thread that forked us ends, which has hung up by then
        process.claim(child.rows[0], generation=1)
        self.server._work(Lifeline(end), child.rows, self.poll_interval)


def _wait_for_any(pids: Iterable[int], end: float | None) -> bool:
    """Wait until one of these children has died; whether one has, before ``end`` on the monotonic clock."""
    with ExitStack() as descriptors, selectors.DefaultSelector() as selector:
        for pid in pids:
            descriptor = os.pidfd_open(pid)
            descriptors.callback(os.close, descriptor)
            selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(None if end is None else max(0.0, end - monotonic())))


class PreForkingTCPServer(PreForkingMixIn, socketserver.TCPServer):
    """TCP, in a pool of processes."""


class PreForkingUDPServer(PreForkingMixIn, socketserver.UDPServer):
    """UDP, in a pool of processes."""


class PreForkingUnixStreamServer(PreForkingMixIn, socketserver.UnixStreamServer):
    """Unix stream sockets, in a pool of processes."""


class PreForkingUnixDatagramServer(PreForkingMixIn, socketserver.UnixDatagramServer):
    """Unix datagram sockets, in a pool of processes."""
