"""A worker of kind ``process``: one lane, run by the main thread.

The worker leaves by ``os._exit`` only: what the mold has on its stack and in its exit handlers is the mold's.
"""

import _thread
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from socketserver import BaseServer, ForkingMixIn, ThreadingMixIn
from typing import Any, NoReturn

from preforkd_workers.explanation import explain
from preforkd_workers.hooks import ON_DRAIN, ON_WORKER_STOP, Hooks
from preforkd_workers.lane import Lane
from preforkd_workers.lifeline import Lifeline
from preforkd_workers.protocol import DRAIN, END_OF_FILE, STACKS, shorten
from preforkd_workers.scoreboard import PID, ROW_GENERATION, SERVING, STARTING, STATE, blank_row
from preforkd_workers.single import Drained, Single
from preforkd_workers.tally import Tally, ThreadedTally

# What a terminal sends to the whole process group is for the master to act on. A handler that does nothing, not
# SIG_IGN, which programs started by a request handler would inherit.
MASTERS_OWN = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGWINCH)


class Worker:
    """A lane, and the signals by which it is told what to do when it is busy."""

    def __init__(
        self,
        servers: list[BaseServer],
        lifeline: Lifeline,
        row: memoryview,
        graceful_timeout: float,
        eof_timeout: float,
        hooks: Hooks | None = None,
    ) -> None:
        self.parent = os.getppid()
        self.hooks = hooks or Hooks()
        self.graceful_timeout, self.eof_timeout = graceful_timeout, eof_timeout
        self.is_orphan = False
        threaded = any(isinstance(server, ThreadingMixIn) for server in servers)
        self.tally = ThreadedTally(row) if threaded else Tally(row)
        self.lane = Lane(servers, lifeline, self.tally)
        if ON_DRAIN in self.hooks:
            self.lane.on_drain.append(lambda: self._tell(ON_DRAIN))
        for server in servers:
            server.draining = False  # type: ignore[attr-defined]
        os.register_at_fork(after_in_child=self._be_a_copy)
        signal.signal(DRAIN, lambda *_: self.drain())
        signal.signal(END_OF_FILE, lambda *_: self.end_of_file())

    def _be_a_copy(self) -> None:
        """In a child that a handler forks: the row and the requests to come are not its own."""
        self.tally.row = blank_row()
        self.lane.draining = True
        self.hooks = Hooks()

    def drain(self) -> None:
        """Step one: take nothing new and finish what is held. Without a parent who would limit that, do it here."""
        if self.lane.on_drain and threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), DRAIN)  # a hook is to run in the main thread: it answers
            return
        self.lane.lifeline.leaving()
        self.lane.drain()
        if os.getppid() != self.parent and not self.is_orphan:
            self._limit_itself()

    def _limit_itself(self) -> None:
        """Nobody is left who would: be gone within ``graceful_timeout``; before that, the handlers read end-of-file."""
        self.is_orphan = True
        last = max(self.graceful_timeout, 0.001)  # faulthandler wants some
        faulthandler.dump_traceback_later(last, exit=True)
        # Not threading's: this is a signal handler, and may have interrupted somebody who holds that module's locks.
        _thread.start_new_thread(self._end_of_file_after, (max(last - self.eof_timeout, last / 2),))

    def _end_of_file_after(self, seconds: float) -> None:
        select.select([], [], [], seconds)
        self.end_of_file()

    def end_of_file(self) -> None:
        """Step two: the handlers read end-of-file, as if their clients had left."""
        for request in self.tally.held():
            if isinstance(request, socket.socket):
                with suppress(OSError):
                    socket.socket.shutdown(request, socket.SHUT_RD)  # not SSLSocket's, which forgets the session

    def serve(self) -> None:
        """Run ``serve_forever`` of each server around the lane, then close them and wait for their threads."""
        _take_over(self.lane, self.drain)
        with suppress(Drained):
            self.lane.servers[0].serve_forever()
        # Before the hook; and before a socket is closed through which the threads of a datagram server answer.
        for server in self.lane.servers:
            if ON_WORKER_STOP in self.hooks or server.socket.type == socket.SOCK_DGRAM:
                _finish_requests(server)
        if ON_WORKER_STOP in self.hooks:
            self.tally.wait()
            self._tell(ON_WORKER_STOP)
        for server in self.lane.servers:
            server.server_close()
            _join_threads(server)
        self.tally.wait()

    def _tell(self, setting: str) -> None:
        """Run a hook that cannot stop a stop: what it raises is logged, and that is all."""
        for error in self.hooks.faults(setting, self.lane.servers):
            self.lane.lifeline.notice("hook_failed", hook=setting)
            self.lane.lifeline.text(shorten(explain(error)))


def _finish_requests(server: Any) -> None:
    """Wait for what a server has handed to threads or children of its own, as its ``server_close`` will."""
    match server:
        case ThreadingMixIn():
            server._threads.join()  # type: ignore[attr-defined]
            _join_threads(server)
        case ForkingMixIn():
            server.collect_children(blocking=server.block_on_close)


def _join_threads(server: Any) -> None:
    """Wait for the threads that a server has started for requests, those that have not begun with theirs among them.

    Daemon threads as well: ``server_close`` forgets them, and they would end with us.
    """
    if isinstance(server, ThreadingMixIn):
        for thread in threading.enumerate():
            if getattr(thread, "_target", None) == server.process_request_thread:
                thread.join()


def _take_over(lane: Lane, stop: Callable[[], None]) -> None:
    """Put the lane where socketserver has its loop, below whatever a class has put around it.

    With several servers, the loop of each runs within that of the one before: what a class does before and after its
    ``super().serve_forever()`` is done for every server. A class with a loop of its own over ``handle_request()`` finds
    one turn of the lane there. Servers of the target's own, a metrics page in a thread, say, are left alone.
    """
    servers, single = lane.servers, Single(lane)
    their_loop, their_shutdown, their_turn = BaseServer.serve_forever, BaseServer.shutdown, BaseServer.handle_request

    def serve_forever(self: BaseServer, poll_interval: float = 0.5) -> None:
        position = next((index for index, server in enumerate(servers) if server is self), None)
        if position is None:
            their_loop(self, poll_interval)
        elif position + 1 < len(servers):
            servers[position + 1].serve_forever(poll_interval)
        else:
            lane.run(poll_interval)

    def handle_request(self: BaseServer) -> None:
        is_ours = any(server is self for server in servers)
        if is_ours and threading.current_thread() is threading.main_thread():
            single.handle_request(self)
        else:
            their_turn(self)

    def shutdown(self: BaseServer) -> None:
        if any(server is self for server in servers):
            stop()
        else:
            their_shutdown(self)

    BaseServer.serve_forever = serve_forever  # type: ignore[method-assign]
    BaseServer.handle_request = handle_request  # type: ignore[method-assign]
    BaseServer.shutdown = shutdown  # type: ignore[method-assign]


def reset_signals() -> None:
    """Forget the wake-up pipe and the answers of whoever forked us. Call with the signals held."""
    signal.set_wakeup_fd(-1)
    faulthandler.unregister(STACKS)
    for number in MASTERS_OWN:
        signal.signal(number, lambda *_: None)
    for number in (DRAIN, END_OF_FILE, STACKS, signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_DFL)


def report_stacks(lifeline: Lifeline) -> None:
    """Have all stacks written to the lifeline, on the STACKS signal and on a fatal one."""
    faulthandler.enable(lifeline.fileno(), all_threads=True)
    faulthandler.register(STACKS, lifeline.fileno(), all_threads=True)


def claim(row: memoryview, generation: int) -> None:
    """Make the row ours."""
    row[PID], row[ROW_GENERATION], row[STATE] = os.getpid(), generation, STARTING


def open_for_service(row: memoryview, lifeline: Lifeline) -> None:
    row[STATE] = SERVING
    lifeline.ready()


def leave(work: Callable[[], None]) -> NoReturn:
    """Do the work and exit: status 0, or that of a SystemExit, or 1 with the traceback on standard error."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as request:
        status = _status_of(request)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


def _status_of(request: SystemExit) -> int:
    """As the interpreter does (sys.exit): None is 0, a number is itself, anything else is printed and 1."""
    match request.code:
        case None:
            return 0
        case int():
            return request.code & 0xFF
    print(request.code, file=sys.stderr)  # noqa: T201 - the interpreter would
    return 1
