"""The kind ``gevent``: many lanes in one process, each a greenlet, for handlers that mostly wait for their clients.

The mold patches the standard library before it imports anything that could keep hold of the unpatched. Requests are
taken by the main greenlet, which spawns one for each while there is a lane free: its row is its own until it has ended.
"""

import resource
import signal
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic_ns
from types import FrameType
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event
from gevent.socket import wait_read

from preforkd_workers.protocol import STACKS
from preforkd_workers.scoreboard import PEER, SINCE, read_text
from preforkd_workers.tally import Tally, here
from preforkd_workers.thread import serve_in_place
from preforkd_workers.turns import Starved, Turn, general_turn, nothing_taken, see_through, take_of

if TYPE_CHECKING:
    from preforkd_workers.process import Worker

# How many requests to take before those that are held have their turn.
AT_ONCE = 64

# Of how many greenlets stacks are written, those first that have held a request for longest.
MOST_STACKS = 10

# Descriptors that a worker needs beside one for each greenlet.
SPARE_DESCRIPTORS = 256


def begin_anew() -> None:
    """In a worker that was just forked: an event loop that the target's import may have started is not ours."""
    gevent.reinit()


class Greenlets:
    """The lanes of a worker, those that are free, and the main greenlet."""

    def __init__(self, worker: "Worker") -> None:
        self.worker = worker
        self.lane = worker.lanes[0]  # by which the main greenlet takes requests for all of them
        self.free = deque(worker.tallies)
        worker.next_tally = lambda: self.free[0]
        worker.make_lock = gevent.monkey.get_original("_thread", "allocate_lock")
        self.holders: dict[int, Any] = {}  # by its number of the tally, the greenlet that holds the request
        self.is_free = Event()  # set whenever a lane has become free, or may have to leave
        have_descriptors(len(worker.tallies) + SPARE_DESCRIPTORS)
        self._is_telling = False
        signal.signal(STACKS, lambda _, running: self.tell_stacks(running))

    def run(self, poll_interval: float | None) -> None:
        """Serve until told to drain, and wait for what is held."""
        for server in self.worker.servers:
            if server.socket.type == socket.SOCK_STREAM:
                server.socket.setblocking(False)
        actions = self.worker.actions
        turns = [self._turn_of(server, index) for index, server in enumerate(self.worker.servers)]
        lifeline = gevent.spawn(self._hear)
        self.lane.is_taking = True
        with self.lane.watch() as epoll:
            is_woken = False
            while not self.lane.draining:
                try:
                    took_any = self._take(turns)
                except Starved as error:
                    self.lane.hold_back(error)
                    continue
                patience = 0 if took_any else poll_interval if actions else None
                is_woken = self._wait(epoll, patience)
                for act in actions:
                    act()
            if is_woken:
                self._take_last(turns)
        self.lane.leave()
        self.worker.close_the_doors()  # a hook is for this greenlet
        self.lane.remainder.take([*zip(self.worker.servers, map(self._when_free, turns), strict=True)])
        lifeline.kill()
        while len(self.free) < len(self.worker.tallies):
            self.is_free.clear()
            self.is_free.wait(self._patience())

    def _patience(self) -> float | None:
        """For how long to wait for lanes; with none left but those past their hard deadline, the worker leaves."""
        left = [self.worker.seconds_left(tally) for tally in self.worker.tallies if id(tally) in self.holders]
        if left and not any(seconds != 0.0 for seconds in left):
            self.worker.abandon()
        return min((seconds for seconds in left if seconds), default=None)

    def _hear(self) -> None:
        """In a greenlet of its own, for while every lane is busy nobody looks at the listeners."""
        wait_read(self.worker.lifeline.fileno())
        self.lane.drain()
        self.is_free.set()

    def _take(self, turns: list[Turn]) -> bool:
        """Take what is there, as far as there are lanes; whether there may be more to take."""
        for _ in range(AT_ONCE):
            took_any = False
            for turn in turns:
                took_any |= bool(self.free) and turn()
            if not took_any or not self.free:
                return False
        return True

    def _wait(self, epoll: Any, patience: float | None) -> bool:
        """Wait for a lane, and then for something to take. Whether there is something."""
        if not self.free:
            self.is_free.clear()
            self.is_free.wait(patience)
            return False
        if patience == 0:
            gevent.sleep(0)
            return self.lane.wait(epoll, 0)
        try:
            wait_read(epoll.fileno(), patience)
        except TimeoutError:
            return False
        self.lane.wait(epoll, 0)
        return True

    def _when_free(self, turn: Turn) -> Turn:
        """A turn that waits for a lane."""

        def turn_when_free() -> bool:
            while not self.free:
                self.is_free.clear()
                self.is_free.wait()
            return turn()

        return turn_when_free

    def _take_last(self, turns: list[Turn]) -> None:
        for turn in turns:
            if self.free:
                with suppress(Starved):
                    turn()

    # One request.

    def _turn_of(self, server: Any, listener: int) -> Turn:
        serve_in_place(server)
        take = take_of(server)
        if take is None:
            return self._general_turn(server, listener)

        def turn() -> bool:
            try:
                request, address = take()
            except OSError as error:
                return nothing_taken(error)
            tally = self.free.popleft()
            tally.begin(request, address, listener)
            self._spawn(tally, see_through, server, tally, request, address)
            return True

        return turn

    def _general_turn(self, server: Any, listener: int) -> Turn:
        """The hooks up to ``process_request`` run in the main greenlet, and that in one of the request's own."""
        turn = general_turn(server, self.worker.tallies[0], listener)
        process_request = server.process_request

        def process_in_place(request: Any, address: Any) -> None:
            try:
                process_request(request, address)
            except Exception:
                server.handle_error(request, address)
                server.shutdown_request(request)
            except BaseException:
                server.shutdown_request(request)
                raise

        def process_in_greenlet(request: Any, address: Any) -> None:
            self._spawn(self.free.popleft(), process_in_place, request, address)

        server.process_request = process_in_greenlet
        return turn

    def _spawn(self, tally: Tally, work: Any, *arguments: Any) -> None:
        def hold() -> None:
            here.tally = tally
            try:
                work(*arguments)
            except SystemExit:
                pass  # as threads have it; gevent would end the process
            finally:
                del self.holders[id(tally)]
                self.free.append(tally)
                self.is_free.set()

        self.holders[id(tally)] = gevent.spawn_raw(hold)

    def tell_stacks(self, running: FrameType | None) -> None:
        """Write the stacks of those that have held a request for longest. In a signal handler: ``running`` is there.

        Who asks again meanwhile, and so interrupts us, is told by what is being told.
        """
        if self._is_telling:
            return
        self._is_telling = True
        try:
            self._tell_stacks(running)
        finally:
            self._is_telling = False

    def _tell_stacks(self, running: FrameType | None) -> None:
        held = sorted((tally for tally in self.worker.tallies if tally.row[SINCE]), key=lambda each: each.row[SINCE])
        for tally in held[:MOST_STACKS]:
            seconds = (monotonic_ns() - tally.row[SINCE]) / 1e9
            frame = getattr(self.holders.get(id(tally)), "gr_frame", None) or running
            peer = read_text(tally.row, PEER) or "its client"
            head = f"greenlet with {peer} for {seconds:.1f}s (most recent call first):"
            self.worker.lifeline.text("\n".join([head, *_calls(frame)]))


def _calls(frame: FrameType | None) -> Iterator[str]:
    """A stack as faulthandler writes it."""
    while frame is not None:
        yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}'
        frame = frame.f_back


def have_descriptors(number: int) -> None:
    """Raise our limit of open descriptors to what so many connections need, as far as we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number and soft != resource.RLIM_INFINITY:
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
