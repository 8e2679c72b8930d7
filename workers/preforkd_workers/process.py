"""A worker: its lanes, what it is told by signals, and its end. Of kind ``process``, it has one lane, the main thread.

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
from _signal import signal as set_handler  # type: ignore[import-not-found]  # that of signal looks for enums
from collections.abc import Callable, Sequence
from contextlib import suppress
from socketserver import BaseServer, ForkingMixIn, ThreadingMixIn
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, NoReturn

from preforkd_workers import streams
from preforkd_workers.adoption import AdoptableSocket
from preforkd_workers.copies import undo_in_copies
from preforkd_workers.explanation import explain
from preforkd_workers.extras import offer
from preforkd_workers.hooks import ON_DRAIN, ON_WORKER_STOP, Hooks
from preforkd_workers.lane import Lane
from preforkd_workers.lifeline import Lifeline
from preforkd_workers.protocol import DRAIN, END_OF_FILE, LOOK, STACK_OF_THE_DEAF, STACKS, shorten
from preforkd_workers.reading import end_reading
from preforkd_workers.remainder import Remainder
from preforkd_workers.scoreboard import DEADLINE, DRAINING, PID, ROW_GENERATION, SERVING, SINCE, STARTING, STATE, Rows
from preforkd_workers.single import Drained, Single
from preforkd_workers.spec import UNLIMITED, Limits
from preforkd_workers.tally import Tally, ThreadedTally, current
from preforkd_workers.turns import overrides
from preforkd_workers.wakeup import WakeUp

if TYPE_CHECKING:
    from preforkd_workers.door import Door

# What a terminal sends to the whole process group is for the master to act on. A handler that does nothing, not
# SIG_IGN, which programs started by a request handler would inherit.
MASTERS_OWN = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGWINCH)


class Worker:
    """Lanes, and the signals by which they are told what to do when they are busy.

    ``rows``: of the scoreboard, one for each lane. ``kind``: process, thread or gevent.
    """

    def __init__(
        self,
        servers: list[BaseServer],
        lifeline: Lifeline,
        rows: Rows,
        graceful_timeout: float,
        eof_timeout: float,
        hooks: Hooks | None = None,
        kind: str = "process",
        limits: Limits = UNLIMITED,
    ) -> None:
        self.servers: list[Any] = [*servers]
        self.datagram_servers = [server for server in self.servers if server.socket.type == socket.SOCK_DGRAM]
        self.lifeline = lifeline
        self.rows = rows
        self.hooks = hooks or Hooks()
        self.on_drain = [self.hooks] if ON_DRAIN in self.hooks else []  # whose hook is to be run then, once
        self.graceful_timeout, self.eof_timeout = graceful_timeout, eof_timeout
        self.is_orphan = False
        self.looks: list[Callable[[], None]] = []  # what is looked at when the master says so
        has_threads = kind == "process" and any(isinstance(server, ThreadingMixIn) for server in servers)
        self.limits = limits
        make_tally = ThreadedTally if has_threads else Tally
        self.tallies = [make_tally(row, limits.request_timeout) for row in rows]
        self.next_tally = lambda: current(self.tallies[0])  # of the lane that is about to take something
        told = self.close_the_doors, self.tell_left
        self.lanes = [Lane(self.servers, lifeline, tally, *told) for tally in self.tallies]
        self.lanes_hold = kind != "gevent" and not has_threads  # what they have taken, so they take nothing meanwhile
        self.make_lock = threading.Lock
        self.kind = kind
        self.run = runner(self)
        undo_in_copies(self._be_a_copy)
        for server in self.servers:
            server.draining = False
            if isinstance(server.socket, AdoptableSocket):
                server.socket.on_truncation = lambda: current(self.tallies[0]).truncate()
            offer(server, self.tallies)
        if limits.idle_timeout:
            self._have_idle_ended()

    def begin(self, rows: Rows) -> None:
        """Be a worker in this process, with these rows, whichever process has made it. Hear signals from now on."""
        self.rows = rows
        for tally, row in zip(self.tallies, rows, strict=True):
            tally.row = row
        self.is_deserted = _watch_parent()  # whether nobody is left who would limit a drain
        self.wakeup = WakeUp()
        if self.kind != "thread":  # whose main thread is no lane
            self.lanes[0].wakeup = self.wakeup
        set_handler(DRAIN, lambda *_: self.drain())
        set_handler(END_OF_FILE, lambda *_: self.end_of_file())
        set_handler(LOOK, lambda *_: self._look())

    def _have_idle_ended(self) -> None:
        from preforkd_workers.idle import HeardSocket, Idle

        idle = Idle(self.tallies, self.limits.idle_timeout)
        for server in self.servers:
            if server.socket.family == socket.AF_UNIX and isinstance(server.socket, AdoptableSocket):
                server.socket.connection_class = HeardSocket
        self.look_at(idle.look)

    def look_at(self, look: Callable[[], None]) -> None:
        """Have this done whenever the master says LOOK. It is done in a signal handler."""
        self.looks.append(look)

    def _look(self) -> None:
        for look in self.looks:
            look()

    def guard(self, door: "Door") -> None:
        """Have this door asked after every accept. Call before the lanes run."""
        for server in self.servers:
            if server.socket.type == socket.SOCK_STREAM:
                door.guard(server.socket)

    @property
    def actions(self) -> list[Callable[[], None]]:
        """What servers want to be done again and again beside their requests."""
        return [each.service_actions for each in self.servers if overrides(each, BaseServer, "service_actions")]

    def _be_a_copy(self) -> None:
        """In a child that a handler forks: the rows and the requests to come are not its own."""
        for tally, row in zip(self.tallies, Rows.blank(len(self.rows)), strict=True):
            tally.row = row
        for lane in self.lanes:
            lane.draining, lane.remainder = True, Remainder()
        self.hooks = Hooks()

    def be_on_trial(self, until: float) -> None:
        for lane in self.lanes:
            lane.be_on_trial(until)

    def know_listeners(self, words: Sequence[memoryview]) -> None:
        """The words of the listeners in the scoreboard, one for each server."""
        for lane in self.lanes:
            lane.remainder = Remainder(words if self.datagram_servers else (), lambda: self.is_deserted())

    def open_for_service(self) -> None:
        self.rows[0][STATE] = SERVING
        self.lifeline.ready()

    def drain(self) -> None:
        """Step one: take nothing new and finish what is held. Without a parent who would limit that, do it here."""
        self.close_the_doors()
        self.tell_left()
        if self.is_deserted() and not self.is_orphan:
            self._limit_itself()

    def tell_left(self) -> None:
        """Say that we take nothing of what comes from now on, once that is so. Who comes later meets somebody else.

        A lane that waits may have been woken already; one that holds a request looks before it takes another.
        """
        if self.rows[0][STATE] == DRAINING and not any(map(self._may_take, self.lanes)):
            self.lifeline.leaving()

    def _may_take(self, lane: Lane) -> bool:
        return lane.is_taking and not (self.lanes_hold and lane.tally.row[SINCE])

    def _take_nothing_new(self) -> None:
        for lane in self.lanes:
            lane.draining = True
            lane.remainder.leave_within(self.graceful_timeout)

    def close_the_doors(self) -> None:
        """Have every lane take nothing new, and wake whoever waits: our own end of the lifeline reads end-of-file."""
        self._take_nothing_new()
        self.rows[0][STATE] = DRAINING
        for server in self.servers:
            server.draining = True
        self.lifeline.let_go()
        if threading.current_thread() is threading.main_thread():
            self._have_threads_wake_us()
            self._tell_drain()
        elif self.on_drain and self.kind == "process":  # the main thread of the others has just heard the lifeline
            os.kill(os.getpid(), DRAIN)

    def _have_threads_wake_us(self) -> None:
        """Whatever the main thread waits for from now on, what it is told is not to wait."""
        if self.kind != "gevent":  # which waits for greenlets
            self.wakeup.watch()

    def _tell_drain(self) -> None:
        with suppress(IndexError):  # in one step: a signal handler may come by here at the same time
            self.on_drain.pop()
            self._tell(ON_DRAIN)

    def _limit_itself(self) -> None:
        """Nobody is left who would: be gone within ``graceful_timeout``; before that, the handlers read end-of-file."""
        self.is_orphan = True
        last = max(self.graceful_timeout, 0.001)  # faulthandler wants some
        with suppress(RuntimeError):  # the system refuses a thread: without a limit, then
            faulthandler.dump_traceback_later(last, exit=True)
            # Not threading's: this is a signal handler, and may have interrupted one who holds that module's locks.
            _thread.start_new_thread(self._end_of_file_after, (max(last - self.eof_timeout, last / 2),))

    def _end_of_file_after(self, seconds: float) -> None:
        select.select([], [], [], seconds)
        self.end_of_file()

    def end_of_file(self) -> None:
        """Step two: the handlers read end-of-file, as if their clients had left."""
        for lane in self.lanes:
            lane.remainder.leave_within(0)
        for tally in self.tallies:
            for request in tally.held():
                if isinstance(request, socket.socket):
                    end_reading(request)

    def seconds_left(self, tally: Tally) -> float | None:
        """Until the request of a lane is past its hard deadline, at least 0; None: it may take for ever."""
        if not tally.timeout_ns:
            return None
        deadline = tally.row[DEADLINE] or monotonic_ns() + tally.timeout_ns
        return max(0.0, (deadline - monotonic_ns()) / 1e9 + self.limits.request_timeout_grace)

    def abandon(self) -> NoReturn:
        """Leave although lanes hold requests: those are past their hard deadline, and the master has been told."""
        self.lifeline.abandoned()
        leave(lambda: None)

    def wait(self) -> None:
        """Wait until nothing is held any more."""
        for tally in self.tallies:
            tally.wait()

    def serve(self) -> None:
        """Run ``serve_forever`` of each server around the lanes, then close them and wait for their threads."""
        with suppress(Drained):
            self.servers[0].serve_forever()
        self.finish()

    def take_over(self) -> None:
        """From now on, socketserver's loop is that of the lanes."""
        _take_over(self)

    def finish_requests(self) -> None:
        """Before the hook; and before a socket is closed through which the threads of a datagram server answer."""
        for server in self.servers:
            if ON_WORKER_STOP in self.hooks or server in self.datagram_servers:
                _finish_requests(server)

    def finish(self) -> None:
        """After the last request: close the servers, and wait for what threads still do."""
        if self.servers[0].draining:  # another thread has said so, and its signal is still to come
            self._tell_drain()
        self._have_threads_wake_us()
        self.finish_requests()
        if ON_WORKER_STOP in self.hooks:
            self.wait()
            self._tell(ON_WORKER_STOP)
        for server in self.servers:
            server.server_close()
            _join_threads(server)
        self.wait()

    def _tell(self, setting: str) -> None:
        """Run a hook that cannot stop a stop: what it raises is logged, and that is all."""
        for error in self.hooks.faults(setting, self.servers):
            self.lifeline.notice("hook_failed", hook=setting)
            self.lifeline.text(shorten(explain(error)))


def runner(worker: Worker) -> Callable[[float | None], None]:
    """What runs the lanes of a worker of its kind until they are told to drain.

    It is called with the longest time between two calls of ``service_actions``, in seconds; None: for ever.
    """
    match worker.kind:
        case "thread":
            from preforkd_workers.thread import Threads

            return Threads(worker).run
        case "gevent":
            from preforkd_workers.greenlets import Greenlets

            return Greenlets(worker).run
    return lambda poll_interval: worker.lanes[0].run(poll_interval if worker.actions else None, worker.actions)


def _watch_parent() -> Callable[[], bool]:
    """What says whether the parent that we have now is gone."""
    parent = os.getppid()
    return lambda: os.getppid() != parent


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


def _take_over(worker: Worker) -> None:
    """Put the lanes where socketserver has its loop, below whatever a class has put around it.

    With several servers, the loop of each runs within that of the one before: what a class does before and after its
    ``super().serve_forever()`` is done for every server. A class with a loop of its own over ``handle_request()`` finds
    one turn of the lane there. Servers of the target's own, a metrics page in a thread, say, are left alone.
    """
    servers, single = worker.servers, Single(worker.lanes[0])
    their_loop, their_shutdown, their_turn = BaseServer.serve_forever, BaseServer.shutdown, BaseServer.handle_request

    def serve_forever(self: BaseServer, poll_interval: float = 0.5) -> None:
        position = next((index for index, server in enumerate(servers) if server is self), None)
        if position is None:
            their_loop(self, poll_interval)
        elif position + 1 < len(servers):
            servers[position + 1].serve_forever(poll_interval)
        else:
            worker.run(poll_interval)

    def handle_request(self: BaseServer) -> None:
        is_ours = any(server is self for server in servers)
        if is_ours and threading.current_thread() is threading.main_thread():
            single.handle_request(self)
        else:
            their_turn(self)

    def shutdown(self: BaseServer) -> None:
        if any(server is self for server in servers):
            worker.drain()
        else:
            their_shutdown(self)

    BaseServer.serve_forever = serve_forever  # type: ignore[method-assign]
    BaseServer.handle_request = handle_request  # type: ignore[method-assign]
    BaseServer.shutdown = shutdown  # type: ignore[method-assign]


def reset_signals() -> None:
    """Forget the wake-up pipe and the answers of whoever forked us. Call with the signals held."""
    signal.set_wakeup_fd(-1)
    faulthandler.unregister(STACK_OF_THE_DEAF)
    for number in (*MASTERS_OWN, STACKS, STACK_OF_THE_DEAF):  # who asks for a stack too early gets none
        signal.signal(number, lambda *_: None)
    for number in (DRAIN, END_OF_FILE, LOOK, signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_DFL)


def report_stacks(lifeline: Lifeline) -> None:
    """Have all stacks written to the lifeline, on the STACKS signal and on a fatal one.

    By Python's own handler: only while that runs everybody stands still. faulthandler's reads frames as they are when
    the signal comes, one that is just being made among them, and may die of it, and we with it. But who runs no Python,
    being stuck in a C library, say, has no other, and its frames stand still.
    """
    number = lifeline.fileno()
    faulthandler.enable(number, all_threads=True)
    set_handler(STACKS, lambda *_: faulthandler.dump_traceback(number, all_threads=len(sys._current_frames()) > 1))
    faulthandler.register(STACK_OF_THE_DEAF, number, all_threads=False)


def claim(row: memoryview, generation: int) -> None:
    """Make the row ours."""
    row[PID], row[ROW_GENERATION], row[STATE] = os.getpid(), generation, STARTING


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
        flush()
        streams.finish()
        os._exit(status)


def flush() -> None:
    """Write out what was said, by the target or by who forks now, lest a child says it a second time."""
    for stream in sys.stdout, sys.stderr:
        try:  # noqa: SIM105 - in each of many processes, which have a copy of whatever they touch
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass


def _status_of(request: SystemExit) -> int:
    """As the interpreter does (sys.exit): None is 0, a number is itself, anything else is printed and 1."""
    match request.code:
        case None:
            return 0
        case int():
            return request.code & 0xFF
    print(request.code, file=sys.stderr)  # noqa: T201 - the interpreter would
    return 1
