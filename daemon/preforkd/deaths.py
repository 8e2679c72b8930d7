"""What the death of a worker means: its cause, and all that is known of it in one event. Nobody is asked here."""

from collections.abc import Sequence
from resource import struct_rusage
from typing import Protocol, Self

from msgspec import Struct

from preforkd.plan import State, is_failed_start
from preforkd.wakeup import name_of
from preforkd.wear import MAX_RSS
from preforkd_workers.protocol import DRAIN
from preforkd_workers.scoreboard import LISTENER, MARK, PEER, SINCE, Rows, read_text


class Dying(Protocol):
    """What has to be known of a child."""

    @property
    def state(self) -> State: ...
    @property
    def cause(self) -> str | None: ...
    @property
    def reason(self) -> str: ...
    @property
    def is_leaving(self) -> bool: ...
    @property
    def was_cut(self) -> bool: ...


def cause_of(child: Dying, status: int | None, *, is_oom: bool = False) -> str:
    """Why a child has died, in the words of CAUSES.

    ``status``: negative for a signal, None when it was never known. ``is_oom``: the kernel wanted its memory.
    """
    if child.cause is not None:
        return child.cause
    if is_oom:
        return "oom"
    if child.state is State.BOOTING:
        return "boot"
    was_told = child.state in (State.DRAINING, State.HALF_CLOSED) and status in (0, -DRAIN)
    if not was_told and not (status == 0 and child.is_leaving):
        return "crash"
    return "eof" if child.was_cut and child.reason == "drained" else child.reason


class Held(Struct, frozen=True):
    """A request that a lane holds, or held when it died."""

    peer: str
    listener: str
    seconds: float
    mark: str

    @classmethod
    def of(cls, row: memoryview, urls: Sequence[str], seconds: float) -> Self:
        """What a row says of it. ``urls``: of the listeners that its lane serves, in the order of their numbers."""
        url = urls[row[LISTENER]] if row[LISTENER] < len(urls) else ""
        return cls(read_text(row, PEER), url, seconds, read_text(row, MARK))

    def fields(self, **time: str) -> dict[str, object]:
        """What an event says of it. ``time``: for how long it was held, by the name that the event has for it."""
        return {"peer": self.peer or None, "listener": self.listener or None, **time, "mark": self.mark or None}


def held_by(rows: Rows, urls: Sequence[str], now_ns: int) -> Held | None:
    """The request that these rows have held for the longest; None when they hold none. ``urls``: as for ``Held.of``."""
    busy = [row for row in rows if row[SINCE]]
    if not busy:
        return None
    row = min(busy, key=lambda row: row[SINCE])
    return Held.of(row, urls, max(0, now_ns - row[SINCE]) / 1e9)


class Obituary(Struct, frozen=True):
    """Everything about the death of one worker. Ages in seconds."""

    cause: str
    status: int | None  # negative for a signal, None when it was never known
    usage: struct_rusage | None
    age: float | None = None
    requests: int | None = None
    lost: int = 0  # requests that died with it
    held: Held | None = None
    has_booted: bool = True

    @property
    def is_failed_start(self) -> bool:
        """Whether it hints at a crash loop. Not so the death of one whose mold was killed while it forked."""
        if self.status is None:
            return False
        is_fruitless = is_failed_start(self.age or 0.0, self.requests or 0)
        return self.is_boot_failure or (self.cause in ("crash", "oom", MAX_RSS) and is_fruitless)

    @property
    def is_boot_failure(self) -> bool:
        """Whether the target is to blame for it that the worker never served."""
        return self.status is not None and (self.cause == "boot" or not self.has_booted)

    def failure(self, said: Sequence[str] | None) -> str | None:
        """Why it could not boot, if it could not: what it has said, or else how it ended."""
        if not self.is_boot_failure:
            return None
        if said is not None:
            return "\n".join(said).rstrip()
        why = ", for the kernel was out of memory," if self.cause == "oom" else ""
        return f"a worker {_how(self.status or 0)}{why} before it was ready"

    def fields(self) -> dict[str, object]:
        """What an event says of it; None where there is nothing to say."""
        found: dict[str, object] = {"cause": self.cause}
        if self.status is None or self.status >= 0:
            found["status"] = self.status
        else:
            found["signal"] = name_of(-self.status)
        found |= {"requests": self.requests, "lost": self.lost or None}
        if self.held is not None:
            found |= self.held.fields(held=f"{self.held.seconds:.3f}s")
        found["age"] = None if self.age is None else f"{self.age:.1f}s"
        if self.usage is not None:
            found["user"], found["system"] = f"{self.usage.ru_utime:.3f}s", f"{self.usage.ru_stime:.3f}s"
            found["max_rss"] = f"{self.usage.ru_maxrss / 1024:.1f}M"  # getrusage(2): in kilobytes
        return found


def _how(status: int) -> str:
    return f"was killed by {name_of(-status)}" if status < 0 else f"exited with status {status}"
