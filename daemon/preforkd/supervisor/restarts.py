"""When supervisord is to restart a program: the rules, pure. No clock, process or socket in it."""

from enum import Enum

from msgspec import Struct
from msgspec.structs import replace


class Rules(Struct, frozen=True):
    """The patience there is. Times are in seconds."""

    failures: int = 2  # missed answers in a row
    grace: float = 30.0  # after a start, in which it is not asked
    max_restarts: int = 3  # in any window
    window: float = 600.0


class Verdict(Enum):
    """What an answer, or that there was none, means for a program."""

    WELL = "it has answered"
    MISSED = "it has not, which may pass"
    RESTART = "it has not answered for long enough"
    HELD_BACK = "so it has, but it was restarted too often of late"


class History(Struct, frozen=True):
    """What is known of a program. Points in time are of one clock that never goes back."""

    pid: int = 0  # of the process that it is now; 0: none
    since: float = 0.0  # its start
    missed: int = 0  # answers in a row, of this process
    restarts: tuple[float, ...] = ()  # that we have asked for, in the window before the last of them


def seen(history: History, pid: int, age: float, now: float) -> History:
    """What is known when the program is this process, which started ``age`` seconds ago. A new one begins anew.

    The age counts once: it comes from a clock that may be set.
    """
    if pid == history.pid:
        return history
    return History(pid, now - max(0.0, age), 0, history.restarts)


def is_to_be_asked(rules: Rules, history: History, now: float) -> bool:
    """Whether the program is a process, and has been for longer than the grace."""
    return history.pid != 0 and now - history.since >= rules.grace


def judged(rules: Rules, history: History, has_answered: bool, now: float) -> tuple[History, Verdict]:
    """What is known after it was asked, and what is to be done."""
    if has_answered:
        return replace(history, missed=0), Verdict.WELL
    history = replace(history, missed=history.missed + 1)
    if history.missed < rules.failures:
        return history, Verdict.MISSED
    recent = tuple(at for at in history.restarts if now - at < rules.window)
    if len(recent) >= rules.max_restarts:
        return history, Verdict.HELD_BACK
    return replace(history, missed=0, restarts=(*recent, now)), Verdict.RESTART
