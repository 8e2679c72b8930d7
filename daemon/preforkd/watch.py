"""What the master sees in the rows of a pool's workers: requests that take too long, and clients that say nothing.

It looks when it must, not all the time: a request that begins after a look has a deadline later than the look and the
time-out together, and a handler can only move it further away.
"""

from collections.abc import Container, Iterable
from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING

from msgspec import Struct

from preforkd.deaths import Held
from preforkd.plan import State
from preforkd_workers.protocol import LOOK
from preforkd_workers.scoreboard import DEADLINE, SINCE, THREAD
from preforkd_workers.spec import Limits

if TYPE_CHECKING:
    from preforkd.children import Child
    from preforkd.pool import Pool

# How often those who have held a request for longer than idle_timeout are told to look: a part of it, and seconds.
_AGAIN, _SOONEST = 0.25, 0.25


class Glance(Struct, frozen=True):
    """What there is to say of the lanes of one worker. ``again``: when there may be more, on the same clock, in ns."""

    overdue: tuple[int, ...] = ()  # past their deadline
    hanging: tuple[int, ...] = ()  # and past the grace that follows
    again: float = float("inf")


def glance(now: int, deadlines: Iterable[int], grace: int, told: Container[int] = ()) -> Glance:
    """Which lanes are past their deadlines, by number. 0: the lane has none. ``told``: those not to be told again."""
    due = {lane: deadline for lane, deadline in enumerate(deadlines) if deadline}
    if not due or min(due.values()) > now:
        return Glance(again=min(due.values(), default=float("inf")))
    hanging = tuple(lane for lane, deadline in due.items() if deadline + grace <= now)
    overdue = tuple(lane for lane, deadline in due.items() if deadline <= now and lane not in told)
    next_times = [deadline if deadline > now else deadline + grace for deadline in due.values()]
    return Glance(overdue, hanging, min((time for time in next_times if time > now), default=float("inf")))


def shortest(limits: Limits) -> float:
    """How long after a look there may be something new to see, in seconds."""
    return min((each for each in (limits.request_timeout, limits.idle_timeout) if each), default=float("inf"))


class Watch:
    """The look of one pool at its workers."""

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.wake_at = float("inf")
        self._told: dict[tuple[int, int], int] = {}  # by serial and lane: since when it holds what was told of

    def expect(self, child: "Child") -> None:
        """This worker serves from now on."""
        self.wake_at = min(self.wake_at, monotonic() + shortest(child.limits))

    def adopt(self) -> None:
        """Workers have been serving already, with nobody looking."""
        self.wake_at = 0.0

    def settle(self) -> None:
        """Look, if there may be something to see."""
        if monotonic() < self.wake_at:
            return
        self.wake_at, told_before, self._told = float("inf"), self._told, {}
        for child in [*self.pool.children.values()]:
            if child.state not in (State.READY, State.DRAINING, State.HALF_CLOSED):
                continue
            self.expect(child)
            if child.limits.idle_timeout:
                self._look_for_idle(child)
            if child.limits.request_timeout:
                self._look_at_deadlines(child, told_before)

    def _look_at_deadlines(self, child: "Child", told_before: dict[tuple[int, int], int]) -> None:
        now, sinces = monotonic_ns(), child.rows.column(SINCE).tolist()  # before the deadlines: so they belong together
        told = {
            lane: since
            for lane in range(child.lanes)
            if (since := told_before.get((child.serial, lane))) is not None and since == sinces[lane]
        }
        seen = glance(now, child.rows.column(DEADLINE), int(child.limits.request_timeout_grace * 1e9), told)
        self.wake_at = min(self.wake_at, seen.again / 1e9)
        for lane in seen.overdue:
            told[lane] = sinces[lane]
            self._tell("request_overdue", child, lane, now - sinces[lane])
        if seen.overdue:
            self.pool.ask_for_stacks(child)
        self._told |= {(child.serial, lane): since for lane, since in told.items()}
        if not seen.hanging:
            return
        if child.lanes == 1:
            self.pool.kill(child, "deadline")
        elif child.state is State.READY:  # one that drains already sees to it by itself
            for lane in seen.hanging:
                self._tell("request_given_up", child, lane, now - sinces[lane])
            self.pool.retire(child, "deadline")

    def _look_for_idle(self, child: "Child") -> None:
        now, timeout = monotonic(), child.limits.idle_timeout
        oldest = child.rows.oldest / 1e9
        if not oldest:
            return
        if oldest + timeout > now:
            self.wake_at = min(self.wake_at, oldest + timeout)
            return
        child.send(LOOK)
        self.wake_at = min(self.wake_at, now + max(timeout * _AGAIN, _SOONEST))

    def _tell(self, event: str, child: "Child", lane: int, age: int) -> None:
        row = child.rows[lane]
        held = Held.of(row, child.urls, age / 1e9)
        self.pool.journal.event(
            event,
            service=self.pool.name,
            slot=child.slot,
            gen=child.generation,
            pid=child.pid,
            lane=lane,
            thread=f"0x{row[THREAD]:016x}" if child.lanes > 1 and row[THREAD] else None,
            **held.fields(age=f"{held.seconds:.1f}s"),
        )
