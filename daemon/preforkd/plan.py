"""The rules of a pool, pure: from (now, wanted, children) to steps. No clock, no pid and no socket in here.

A child goes BOOTING → READY → DRAINING → HALF_CLOSED → KILLED, each but READY with a deadline after which it is
pushed on. Who calls ``plan`` takes the steps and records the new states; asking again at once gives no step twice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol

# How many workers of a pool may be booting at a time.
BURST = 32

# From SIGABRT, which leaves the stacks in the log, to SIGKILL; and what an idle worker gets when all is to stop now.
KILL_TIMEOUT = 1.0

# A worker that dies younger than this and without having ended a request is a failed start.
FRUITLESS_AGE = 10.0

# The longest pause before a slot is filled again, in seconds.
LONGEST_PAUSE = 30.0


class State(Enum):
    """Where a child is in its life."""

    BOOTING = "booting"
    READY = "ready"
    DRAINING = "draining"  # told to finish what it holds
    HALF_CLOSED = "half_closed"  # its handlers read end-of-file
    KILLED = "killed"


class Haste(IntEnum):
    """How a stop is hurried: which step of stopping a worker comes next without further patience."""

    NONE = 0
    END_OF_FILE = 2
    KILL = 3


@dataclass(frozen=True)
class Timeouts:
    """Patience with a worker, in seconds."""

    boot: float = 30.0
    graceful: float = 30.0
    eof: float = 5.0


@dataclass(frozen=True)
class Wanted:
    """What a pool should come to: so many workers, in the slots from 0 on."""

    size: int
    can_spawn: bool = True  # there is something to fork from
    haste: Haste = Haste.NONE


class Child(Protocol):
    """What the rules need to know of a child. ``since``: when it entered its state, on the caller's clock."""

    @property
    def slot(self) -> int: ...
    @property
    def state(self) -> State: ...
    @property
    def since(self) -> float: ...
    @property
    def busy(self) -> bool: ...


@dataclass(frozen=True)
class Spawn:
    """Fork a worker for this slot."""

    slot: int


@dataclass(frozen=True)
class Retire:
    """Step one of stopping: hang up the lifeline."""

    child: Child


@dataclass(frozen=True)
class EndOfFile:
    """Step two: end the reading side of what it holds."""

    child: Child


@dataclass(frozen=True)
class Kill:
    """Step three: have it dump its stacks and die; a second time, kill it outright."""

    child: Child
    cause: str


Step = Spawn | Retire | EndOfFile | Kill


def plan(
    now: float,
    wanted: Wanted,
    children: Sequence[Child],
    timeouts: Timeouts,
    not_before: Mapping[int, float],
) -> Iterator[Step]:
    """The steps that bring the pool closer to what is wanted.

    ``not_before``: the earliest time for slots that hold back after failed starts.
    """
    for child in children:
        if child.slot >= wanted.size and child.state in (State.BOOTING, State.READY):
            yield Retire(child)
        elif now >= _deadline(child, wanted, timeouts):
            yield _push(child, wanted)
    if wanted.can_spawn:
        due = [slot for slot in _vacant(wanted, children) if now >= not_before.get(slot, now)]
        yield from map(Spawn, due[: _room(children)])


def wake_at(wanted: Wanted, children: Sequence[Child], timeouts: Timeouts, not_before: Mapping[int, float]) -> float:
    """When ``plan`` may have something new to say although nothing happens; infinity for never."""
    deadlines = [_deadline(child, wanted, timeouts) for child in children]
    if wanted.can_spawn and not_before and _room(children):
        deadlines += [not_before[slot] for slot in _vacant(wanted, children) if slot in not_before]
    return min(deadlines, default=float("inf"))


def pause(failed_starts: int) -> float:
    """How long a slot stays vacant after n failed starts in a row, in seconds: 1.5ⁿ⁻¹ - 1, at most LONGEST_PAUSE.

    One failed start is an accident and costs no time.
    """
    return float(min(1.5 ** min(max(failed_starts - 1, 0), 20) - 1, LONGEST_PAUSE))


def is_failed_start(age: float, ended: int) -> bool:
    """Whether a death unasked for, at this age in seconds and after so many requests, hints at a crash loop."""
    return age < FRUITLESS_AGE and not ended


def _room(children: Iterable[Child]) -> int:
    """How many workers more may boot now."""
    return max(BURST - sum(child.state is State.BOOTING for child in children), 0)


def _vacant(wanted: Wanted, children: Iterable[Child]) -> list[int]:
    taken = {child.slot for child in children}
    return [slot for slot in range(wanted.size) if slot not in taken]


def _deadline(child: Child, wanted: Wanted, timeouts: Timeouts) -> float:
    match child.state, wanted.haste:
        case State.READY, _:
            return float("inf")
        case State.BOOTING, _:
            return child.since + timeouts.boot
        case State.KILLED, _:
            return child.since + KILL_TIMEOUT
        case _, Haste.KILL:
            return child.since if child.busy else child.since + KILL_TIMEOUT
        case State.DRAINING, Haste.END_OF_FILE:
            return child.since
        case State.DRAINING, _:
            return child.since + timeouts.graceful
    return child.since + timeouts.eof


def _push(child: Child, wanted: Wanted) -> Step:
    """What comes after the deadline of the state that the child is in."""
    if child.state is State.BOOTING:
        return Kill(child, "boot")
    if wanted.haste is Haste.KILL:
        return Kill(child, "operator")
    return EndOfFile(child) if child.state is State.DRAINING else Kill(child, "deadline")
