"""A reload as a transaction, pure: its phases, what may happen in each, and the verdicts on what was tried.

    settings → molds → probation → rolling → done
        ↓         ↓         ↓          ↓
     refused      └───── rolling back ─┴→ rolled back          anywhere: stopped → abandoned

No clock, no process and no socket in here. ``plan.py`` has the rules by which workers are replaced meanwhile.
"""

from collections.abc import Mapping
from enum import Enum

from msgspec import Struct

# So many requests must have ended before their errors say anything.
FEWEST_REQUESTS = 5

# So many new workers may die during the roll before it is taken back.
CRASHES = 2


class Phase(Enum):
    """Where a reload is. The last four are its ends."""

    SETTINGS = "settings"  # read, checked, new listeners bound
    MOLDS = "molds"  # new molds import the targets
    PROBATION = "probation"  # one new worker for each service serves beside the old ones
    ROLLING = "rolling"  # the old workers are replaced
    ROLLING_BACK = "rolling_back"  # the new ones are
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    REFUSED = "refused"
    ABANDONED = "abandoned"


class Event(Enum):
    """What a phase may come to."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LATE = "late"  # its deadline has passed
    STOPPED = "stopped"  # the daemon stops


ENDS = {Phase.DONE, Phase.ROLLED_BACK, Phase.REFUSED, Phase.ABANDONED}

TABLE: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.SETTINGS, Event.SUCCEEDED): Phase.MOLDS,
    (Phase.SETTINGS, Event.FAILED): Phase.REFUSED,
    (Phase.MOLDS, Event.SUCCEEDED): Phase.PROBATION,
    (Phase.MOLDS, Event.FAILED): Phase.ROLLING_BACK,
    (Phase.MOLDS, Event.LATE): Phase.ROLLING_BACK,
    (Phase.PROBATION, Event.SUCCEEDED): Phase.ROLLING,
    (Phase.PROBATION, Event.FAILED): Phase.ROLLING_BACK,
    (Phase.PROBATION, Event.LATE): Phase.ROLLING_BACK,
    (Phase.ROLLING, Event.SUCCEEDED): Phase.DONE,
    (Phase.ROLLING, Event.FAILED): Phase.ROLLING_BACK,
    (Phase.ROLLING, Event.LATE): Phase.ROLLING_BACK,
    (Phase.ROLLING_BACK, Event.SUCCEEDED): Phase.ROLLED_BACK,
    (Phase.ROLLING_BACK, Event.LATE): Phase.ROLLED_BACK,  # what is still missing is the pool's to fill, as ever
}


def after(phase: Phase, event: Event) -> Phase:
    """The phase that follows. What has ended stays so; an event that a phase does not know changes nothing."""
    if event is Event.STOPPED:
        return phase if phase in ENDS else Phase.ABANDONED
    return TABLE.get((phase, event), phase)


class Probation(Struct, frozen=True):
    """The rules of probation: how long in seconds, how many requests at most, and which share may be errors."""

    seconds: float
    requests: int
    max_error_ratio: float


class Count(Struct, frozen=True):
    """Requests that have ended in the window of the probation, and how many of them with an error."""

    requests: int = 0
    errors: int = 0

    @property
    def ratio(self) -> float:
        return self.errors / self.requests if self.requests else 0.0


def judge(elapsed: float, rules: Probation, new: Count, old: Count) -> Event | None:
    """What the probation of a worker that lives has come to after so many seconds; None: it goes on."""
    if new.requests >= FEWEST_REQUESTS and new.ratio > max(rules.max_error_ratio, 2 * old.ratio):
        return Event.FAILED
    return Event.SUCCEEDED if elapsed >= rules.seconds or new.requests >= rules.requests else None


def judge_roll(boot_failures: int, crashes: int) -> Event | None:
    """Whether so many new workers have failed that the roll must be taken back."""
    return Event.FAILED if boot_failures or crashes >= CRASHES else None
