"""The lane: the accept loop, which takes one request at a time, by a turn of each of its servers.

A lane is told to stop by its lifeline, never by a flag alone: a wait that a signal interrupts is taken up again
(PEP 475) unless something in it has become readable.
"""

import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from preforkd_workers.lifeline import Lifeline
from preforkd_workers.remainder import Remainder
from preforkd_workers.scoreboard import THREAD, ended
from preforkd_workers.tally import Tally, follow, here
from preforkd_workers.turns import Starved, Turn, turn_of
from preforkd_workers.wakeup import WakeUp

# After so many requests without a wait, look at the lifeline all the same.
BUSY_TURNS = 64

# After so many requests, a lane on trial has the master look at it.
TRIED_EVERY = 5

# How long to let go of the listener when the system is out of descriptors or memory, in seconds.
STARVED_FOR = 0.1

# How often a lane says that it is starved, in seconds.
STARVED_NOTICE = 10.0


def new_epoll() -> "select.epoll":
    if hasattr(select, "epoll"):
        return select.epoll()
    from gevent.monkey import get_original  # which has taken it away, for it is not cooperative

    made: select.epoll = get_original("select", "epoll")()
    return made


class Lane:
    """One turn after the other over one or more servers, until its lifeline says stop."""

    def __init__(
        self,
        servers: list[Any],
        lifeline: Lifeline,
        tally: Tally,
        tell_drain: Callable[[], None] = lambda: None,
        tell_left: Callable[[], None] = lambda: None,
    ) -> None:
        self.servers = servers
        self.lifeline = lifeline
        self.tally = tally
        self.draining = False
        self.is_taking = False  # whether it may take something yet that comes now
        self.wakeup: WakeUp | None = None  # of the main thread, if it is that
        self.trial_ends = 0.0  # monotonic; until then it is to be given its share
        self.tell_drain, self.tell_left = tell_drain, tell_left
        self.remainder = Remainder()
        self.fork_ahead: Callable[[Callable[[], None]], None] | None = None  # of a keeper
        self._judged = 0  # requests that the master was told of while on trial
        self._starved_notice = 0.0
        self._turns: list[Turn] = []
        self._turn_of_each: list[tuple[Any, Turn]] = []

    def drain(self) -> None:
        """Take nothing new, now that the lifeline has said so."""
        self.draining = True
        self.tell_drain()

    def run(self, patience: float | None, actions: Sequence[Callable[[], None]] = ()) -> None:
        """Serve until told to drain. ``actions`` are done after every request, and after as many seconds of patience.

        Call in the thread that this lane is to be, whichever that is.
        """
        here.tally = self.tally
        self.tally.row[THREAD] = threading.get_ident()
        for server in self.servers:
            if server.socket.type == socket.SOCK_STREAM:
                server.socket.setblocking(False)  # as the master has made it; a class may have thought otherwise
        self.is_taking = True
        try:
            self._serve(patience, actions)
        finally:
            self.leave()
        self.take_remainder()

    def leave(self) -> None:
        """Say that nothing more is taken, of what comes from now on."""
        self.is_taking = False
        self.tell_left()

    def _serve(self, patience: float | None, actions: Sequence[Callable[[], None]]) -> None:
        turns = self.turns()
        with self.watch() as epoll:
            if self.fork_ahead is not None:  # from here on, this is a fresh process
                self.fork_ahead(lambda: self._go_on_trial(epoll))
            is_woken = False
            while not self.draining:
                try:
                    took_any = self._take(turns, actions)
                except Starved as error:
                    self.hold_back(error)
                    continue
                is_woken = not self.draining and self.wait(epoll, 0 if took_any else patience)
                for act in actions:
                    act()
            if is_woken:
                self.take_last()

    def turns(self) -> list[Turn]:
        """The turn of each server, made once."""
        if not self._turns:
            self._turns = [turn_of(each, self.tally, index) for index, each in enumerate(self.servers)]
            self._turn_of_each = [*zip(self.servers, self._turns, strict=True)]
        return self._turns

    def watch(self) -> "select.epoll":
        """What to wait with: for something to take, or for the end of the lifeline."""
        epoll = new_epoll()
        # Every lane waits on the same listeners: one connection is to wake one lane (epoll_ctl(2), EPOLLEXCLUSIVE).
        mode = select.EPOLLIN if self.trial_ends else select.EPOLLIN | select.EPOLLEXCLUSIVE
        for server in self.servers:
            epoll.register(server.fileno(), mode)
        epoll.register(self.lifeline.fileno(), select.EPOLLIN)
        if self.wakeup is not None:
            epoll.register(self.wakeup.fileno(), select.EPOLLIN)
        return epoll

    def be_on_trial(self, until: float) -> None:
        """Be woken for every connection, beside whoever else is, up to this time (monotonic; 0: not at all).

        The first in the queue of a listener is woken, which is the oldest lane. Unless there is more to do than it can,
        a new one would get nothing, and nobody would see how it does.
        """
        self.trial_ends = until
        self._judged = ended(self.tally.row)

    def _go_on_trial(self, epoll: "select.epoll") -> None:
        """Tell the master whenever there is something to judge by; in the end, queue up as the others do."""
        if not self.trial_ends:
            return
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

    def wait(self, epoll: "select.epoll", patience: float | None) -> bool:
        """Wait for as many seconds; drain if the lifeline says so. Whether it was a listener that woke us."""
        self._go_on_trial(epoll)
        ready = {descriptor for descriptor, _ in epoll.poll(patience)}
        if self.wakeup is not None and self.wakeup.fileno() in ready:
            ready.remove(self.wakeup.fileno())
            self.wakeup.clear()
        if self.lifeline.fileno() in ready:
            ready.remove(self.lifeline.fileno())
            self.drain()
        return patience != 0 and bool(ready)

    def take_last(self) -> None:
        """Take what has woken us although we drain: nobody else is woken for it, and nobody might come by.

        One request of each server, for several may have woken us at once. We have left as the last of them begins: it
        may take long.
        """
        for index, server in enumerate(self.servers):
            if index == len(self.servers) - 1:
                follow(self.tally, "begin", self.leave)
            with suppress(Starved):
                turn_of(server, self.tally, index)()

    def take_remainder(self) -> None:
        """Take the datagrams that nobody would take after us."""
        with suppress(Starved):
            self.remainder.take(self._turn_of_each)

    def _take(self, turns: Sequence[Turn], actions: Sequence[Callable[[], None]]) -> bool:
        """Take what is there, at most BUSY_TURNS times; whether there may be more."""
        for _ in range(BUSY_TURNS):
            took_any = False
            for turn in turns:
                took_any |= turn()
                if self.draining:
                    return False
            if not took_any:
                return False
            for act in actions:
                act()
        return True

    def complain(self, error: str, advice: str) -> None:
        """Say, but not all the time, what the system will not give us."""
        if monotonic() >= self._starved_notice:
            self._starved_notice = monotonic() + STARVED_NOTICE
            self.lifeline.notice("starved", error=error, advice=advice)

    def hold_back(self, error: Starved) -> None:
        """Leave the listeners alone for a moment, but not the lifeline."""
        self.complain(str(error), "raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE=)")
        readable, _, _ = select.select([self.lifeline], [], [], STARVED_FOR)
        if readable:
            self.drain()
