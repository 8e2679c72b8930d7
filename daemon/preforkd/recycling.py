"""Finds those children of a pool that are worn. What becomes of them is for ``plan`` to say.

Of requests a worker tells itself when it has ended enough, a lifetime is a deadline; memory alone has to be asked for
again and again, of those only who have a limit of it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING

from preforkd import memory
from preforkd.children import Child
from preforkd.plan import State
from preforkd.wear import Weight, is_unbearable, worn

if TYPE_CHECKING:
    from psutil import Process

# How often workers are weighed, in seconds: their resident memory; and their proportional memory, for which the kernel
# walks all page tables of a process, so a few have their turn at each weighing.
RSS_EVERY = 1.0
PSS_EVERY = 30.0

# How long a weighing may wait for the loop to turn anyway, in seconds: a turn costs as much as a hundred workers.
LATER = 0.1

# But no more than so many at a weighing, for each costs half a millisecond: beyond 300 workers it takes longer.
MOST_PSS = 10


class Recycler:
    """Looks after the wear of the children in ``children``. ``log``: says that one is worn."""

    def __init__(self, children: Mapping[int, Child], log: Callable[..., None]) -> None:
        self.children = children
        self.log = log
        self.scales = Scales()
        self.next_weighing = 0.0
        self.worn_slots: set[int] = set()  # whose last worker was worn, until its replacement is ready

    def has_died(self, slot: int, *, of_wear: bool) -> None:
        """The worker in this slot has left."""
        (self.worn_slots.add if of_wear else self.worn_slots.discard)(slot)

    def is_replaced(self, slot: int) -> None:
        """Another worker is ready in this slot."""
        self.worn_slots.discard(slot)

    def forget(self) -> None:
        """Other workers are wanted from now on: nobody is the replacement of anybody."""
        self.worn_slots.clear()

    def look_at(self, child: Child, now: float) -> None:
        """See whether a child is worn; from then on it is."""
        if child.worn is not None or child.state is not State.READY:
            return
        child.worn = worn(child.endurance, child.requests, now - child.since, child.weight)
        if child.worn is None:
            return
        headroom = memory.ours().headroom()
        child.retires_first = headroom != float("inf") and headroom < (child.weight.rss or resident(child))
        known = {"rss": child.weight.rss or None, "pss": child.weight.pss or None}
        if child.retires_first:
            known["headroom"] = int(headroom)
        self.log("worker_worn", child, cause=child.worn, requests=child.requests, **known)

    def settle(self, now: float) -> Iterator[Child]:
        """Look at those who are due. Yields whoever is so heavy that it is to be killed."""
        for child in self._mortals():
            if child.endurance.seconds and now >= child.since + child.endurance.seconds:
                self.look_at(child, now)
        if now < self.next_weighing:
            return
        weighed = [child for child in self._mortals() if _is_weighed(child)]
        self.next_weighing = now + RSS_EVERY if weighed else 0.0
        self.scales.weigh(weighed, now)
        for child in weighed:
            self.look_at(child, now)
            if is_unbearable(child.endurance, child.weight) and child.state is not State.KILLED:
                yield child

    def wake_at(self) -> float:
        """When somebody is due to be looked at."""
        times = [
            child.since + child.endurance.seconds
            for child in self._mortals()
            if child.endurance.seconds and child.state is State.READY and child.worn is None
        ]
        if any(_is_weighed(child) for child in self._mortals()):
            times.append(self.next_weighing + LATER)
        return min(times, default=float("inf"))

    def _mortals(self) -> list[Child]:
        return [child for child in self.children.values() if child.endurance.has_end]


def _is_weighed(child: Child) -> bool:
    limits = child.endurance
    return bool(limits.rss or limits.rss_hard or limits.pss) and child.pid is not None


class Scales:
    """Remembers psutil's records of processes, which are dear to make."""

    def __init__(self) -> None:
        self._processes: dict[int, Process] = {}  # by the child's serial, like what follows
        self._pss_at: dict[int, float] = {}

    def weigh(self, children: list[Child], now: float) -> None:
        """Have the weight of these children, and remember nobody else."""
        serials = {child.serial for child in children}
        self._processes = {serial: each for serial, each in self._processes.items() if serial in serials}
        self._pss_at = {serial: at for serial, at in self._pss_at.items() if serial in serials}
        turn = self._turn(children, now)
        for child in children:
            with suppress(psutil_error()):  # the dead weigh what they did
                process = self._process(child)
                rss = process.memory_info().rss if child.endurance.rss or child.endurance.rss_hard else 0
                pss = process.memory_full_info().pss if child in turn else child.weight.pss
                child.weight = Weight(rss, pss)

    def _turn(self, children: list[Child], now: float) -> list[Child]:
        """Whose proportional memory is asked for now: of those that are due, as few as the interval allows."""
        asked = [child for child in children if child.endurance.pss]
        last = {child.serial: self._pss_at.get(child.serial, -PSS_EVERY) for child in asked}
        due = sorted((child for child in asked if now >= last[child.serial] + PSS_EVERY), key=lambda c: last[c.serial])
        turn = due[: min(MOST_PSS, ceil(len(asked) * RSS_EVERY / PSS_EVERY))]
        self._pss_at.update({child.serial: now for child in turn})
        return turn

    def _process(self, child: Child) -> "Process":
        if child.endurance.is_fresh:  # another one at each weighing
            return process_of(child)
        if child.serial not in self._processes:
            self._processes[child.serial] = process_of(child)
        return self._processes[child.serial]


def resident(child: Child) -> int:
    """What a child uses of memory now, in bytes; 0 when it has died."""
    with suppress(psutil_error()):
        return int(process_of(child).memory_info().rss)
    return 0


def process_of(child: Child) -> "Process":
    from psutil import Process  # here: who sets no limit does without

    return Process(_who_serves(child))


def _who_serves(child: Child) -> int | None:
    """The pid of a worker, or of the fresh process that a keeper has (proc_tid_children(5))."""
    if child.endurance.is_fresh:
        with suppress(OSError, IndexError), open(f"/proc/{child.pid}/task/{child.pid}/children") as file:
            return int(file.read().split()[0])
    return child.pid


def psutil_error() -> type[Exception]:
    from psutil import Error

    return Error
