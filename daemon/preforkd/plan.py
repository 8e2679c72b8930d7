"""The rules of a pool, pure: from (now, wanted, children) to steps. No clock, no pid and no socket in here.

A child goes BOOTING → READY → DRAINING → HALF_CLOSED → KILLED, each but READY with a deadline after which it is
pushed on. Who calls ``plan`` takes the steps and records the new states; asking again at once gives no step twice.

A reload is a pool that is wanted in another generation, and so is rolling it back: whoever is of any other generation
is replaced; meanwhile at least ``size - max_unavailable`` are ready, and at most ``size + max_surge`` are not leaving.
In the same way those are replaced that are worn; but one that there is no memory for beside its replacement leaves
first, and is replaced when it is gone.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from itertools import count
from typing import Protocol

from msgspec import Struct

# How many workers of a pool may be booting at a time.
BURST = 32

# From SIGABRT, which leaves the stacks in the log, to SIGKILL; and what an idle worker gets when all is to stop now.
KILL_TIMEOUT = 1.0

# A worker that dies younger than this and without having ended a request is a failed start.
FRUITLESS_AGE = 10.0


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


class Timeouts(Struct, frozen=True):
    """Patience with a worker, in seconds."""

    boot: float = 30.0
    graceful: float = 30.0
    eof: float = 5.0


class Wanted(Struct, frozen=True):
    """What a pool should come to: ``size`` workers of one generation, and perhaps one of another, on trial."""

    size: int
    generation: int = 1
    trial: int | None = None  # the generation of which one worker is wanted besides
    max_surge: int = 1  # workers more than ``size`` while some are replaced
    max_unavailable: int = 0  # workers less than ``size`` that are ready meanwhile
    can_spawn: frozenset[int] = frozenset({1})  # generations that there is something to fork from
    haste: Haste = Haste.NONE
    hurried: frozenset[int] = frozenset()  # generations whose leaving workers read end-of-file at once
    spare: int = 0  # workers besides that are always there, so that one is idle when as many as ``size`` are busy

    @property
    def total(self) -> int:
        """How many workers the pool has when nothing is replaced, and nobody on trial."""
        return self.size + self.spare if self.size else 0


class Child(Protocol):
    """What the rules need to know of a child. ``since``: when it entered its state, on the caller's clock."""

    @property
    def slot(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def state(self) -> State: ...
    @property
    def since(self) -> float: ...
    @property
    def busy(self) -> bool: ...
    @property
    def worn(self) -> str | None: ...  # why it is to be replaced although nothing is wrong with its generation
    @property
    def retires_first(self) -> bool: ...  # there is no memory for it and its replacement at a time


class Spawn(Struct, frozen=True):
    """Fork a worker of this generation for this slot."""

    slot: int
    generation: int


class Retire(Struct, frozen=True):
    """Step one of stopping: hang up the lifeline."""

    child: Child
    cause: str = "drained"


class EndOfFile(Struct, frozen=True):
    """Step two: end the reading side of what it holds."""

    child: Child


class Kill(Struct, frozen=True):
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
    crowd = _Crowd(wanted, children)
    leaving = crowd.leaving()
    for child in children:
        if child in leaving:
            yield Retire(child, crowd.cause(child))
        elif now >= _deadline(child, wanted, timeouts):
            yield _push(child, wanted)
    held = {slot for slot, until in not_before.items() if now < until and slot not in crowd.slots}
    # Who is on trial first: or else whoever makes room for that is replaced instead, and has to make room again.
    due = crowd.missing_on_trial() + [wanted.generation] * (crowd.missing() - len(held))
    due = [generation for generation in due if generation in wanted.can_spawn][: crowd.room(len(leaving))]
    vacant = (slot for slot in count() if slot not in crowd.slots and slot not in held)
    yield from (Spawn(next(vacant), generation) for generation in due)


def wake_at(wanted: Wanted, children: Sequence[Child], timeouts: Timeouts, not_before: Mapping[int, float]) -> float:
    """When ``plan`` may have something new to say although nothing happens; infinity for never."""
    deadlines = [_deadline(child, wanted, timeouts) for child in children]
    crowd = _Crowd(wanted, children)
    held = sorted(until for slot, until in not_before.items() if slot not in crowd.slots)
    missing = crowd.missing()
    if held and missing > 0 and wanted.generation in wanted.can_spawn and crowd.room(len(crowd.leaving())):
        deadlines.append(held[max(0, len(held) - missing)])  # as many of them are waited for as there are missing
    return min(deadlines, default=float("inf"))


class _Crowd:
    """The children that are not leaving, counted by what is wanted of them."""

    def __init__(self, wanted: Wanted, children: Sequence[Child]) -> None:
        self.wanted = wanted
        self.slots = {child.slot for child in children}
        live = [child for child in children if child.state in (State.BOOTING, State.READY)]
        # Of two that could go, first who does not serve yet, then who is idle, then who has the higher slot.
        live.sort(key=lambda child: (child.state is State.READY, child.busy, -child.slot))
        self.live = live
        self.ours = [child for child in live if child.generation == wanted.generation and not child.worn]
        self.on_trial = [child for child in live if child.generation == wanted.trial]
        self.outdated = [child for child in live if child.generation not in (wanted.generation, wanted.trial)]
        self.worn = [child for child in live if child.generation == wanted.generation and child.worn]
        # Who leaves room by leaving only, and so is not missing before it is gone.
        self.in_place = [child for child in children if child.generation == wanted.generation and child.retires_first]

    @property
    def limit(self) -> int:
        """How many may be there that are not leaving."""
        return self.wanted.total + self.wanted.max_surge if self.wanted.size else 0

    @property
    def wants_trial(self) -> bool:
        return self.wanted.trial is not None and self.wanted.size > 0

    def leaving(self) -> list[Child]:
        """Whom to retire: who is too many at once, who is outdated only as others are ready in his place."""
        size = self.wanted.total
        found = self.ours[: max(0, len(self.ours) - size)]
        has_trial_to_come = self.missing_on_trial() and self.wanted.trial in self.wanted.can_spawn
        trial_lacks_room = has_trial_to_come and len(self.live) >= self.limit
        too_many_on_trial = self.on_trial[: max(0, len(self.on_trial) - self.wants_trial)]
        replaceable = [
            *self.outdated,
            *self.worn,
            *too_many_on_trial,
            *(self.ours[len(found) :][:1] if trial_lacks_room else []),
        ]
        found += [child for child in replaceable if child.state is State.BOOTING]
        ready = [child for child in self.live if child.state is State.READY and child not in found]
        spare = len(ready) - (size - self.wanted.max_unavailable) if size else len(ready)
        found += [child for child in replaceable if child.state is State.READY][: max(0, spare)]
        if not found and spare >= 0 and not self.wanted.max_unavailable:
            found += [child for child in self.worn if child.retires_first][:1]
        return found

    def cause(self, child: Child) -> str:
        """Why a child is retired."""
        return (child.worn if child in self.worn and self.wanted.size else None) or "drained"

    def missing(self) -> int:
        """How many of the wanted generation are missing."""
        makes_room = self.wants_trial and not self.wanted.max_surge
        return max(0, self.wanted.total - makes_room - len(self.ours) - len(self.in_place))

    def missing_on_trial(self) -> list[int]:
        return [self.wanted.trial] if self.wants_trial and self.wanted.trial is not None and not self.on_trial else []

    def room(self, leaving: int) -> int:
        """How many may be forked now."""
        booting = sum(child.state is State.BOOTING for child in self.live)
        return max(0, min(BURST - booting, self.limit - len(self.live) + leaving))


def is_failed_start(age: float, ended: int) -> bool:
    """Whether a death unasked for, at this age in seconds and after so many requests, hints at a crash loop."""
    return age < FRUITLESS_AGE and not ended


def _deadline(child: Child, wanted: Wanted, timeouts: Timeouts) -> float:
    match child.state, _haste(child, wanted):
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


def _haste(child: Child, wanted: Wanted) -> Haste:
    """How this one is hurried: with all, or because it is of a generation that has been leaving for too long."""
    return max(wanted.haste, Haste.END_OF_FILE) if child.generation in wanted.hurried else wanted.haste


def _push(child: Child, wanted: Wanted) -> Step:
    """What comes after the deadline of the state that the child is in."""
    if child.state is State.BOOTING:
        return Kill(child, "boot")
    if wanted.haste is Haste.KILL:
        return Kill(child, "operator")
    return EndOfFile(child) if child.state is State.DRAINING else Kill(child, "deadline")
