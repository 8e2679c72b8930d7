"""How many workers an elastic pool should have, pure: from (now, breath, bounds, load) to the next breath.

No clock, no pid and no socket in here. Bounds and load speak of lanes, sizes of workers: one worker has ``lanes`` of
them. A worker that is wanted and not ready yet will be idle: however slow a boot, or endless a crash loop, nobody is
forked in the place of those who are coming. But it is not idle: nobody is retired before it has shown what it is for.

Once a second: too few idle, and the pool grows by 1, then 2, 4 … BURST workers, as Apache's prefork does
(perform_idle_server_maintenance), and begins with 1 again when enough are idle. Too many idle for as long as its
patience lasts, and it shrinks by one worker a second, no further than what the busiest moment of that time needed.
Patience is one second at first; growing soon after shrinking doubles it, and shrinking again after a shrinking that has
stood halves it (uWSGI's cheaper modes are the model).
"""

from collections.abc import Iterator
from math import ceil, inf
from typing import Self

from msgspec import Struct
from msgspec.structs import replace

from preforkd.plan import BURST
from preforkd.settings import Service

# How often a pool breathes, and the least patience with too many idle lanes; seconds.
TICK = 1.0

# The most patience, in seconds.
LONGEST_PATIENCE = 256.0

# Growing within so many seconds after shrinking is regret; shrinking that stands for longer was right.
SOON = 120.0


class Bounds(Struct, frozen=True):
    """Within which a pool is sized. One without ``max_spare`` is not elastic: it always has ``most`` workers."""

    most: int  # workers
    min_spare: int = 1  # lanes that should be idle, at least
    max_spare: int = 0  # and at most
    start: int = 0  # workers to begin with; 0: as few as may be
    lanes: int = 1  # of a worker

    @classmethod
    def of(cls, wanted: Service) -> Self:
        """What the settings say."""
        return cls(wanted.max_children, wanted.min_spare, wanted.max_spare, wanted.start_children, wanted.lanes)

    @property
    def is_elastic(self) -> bool:
        return bool(self.max_spare and self.most)

    @property
    def fewest(self) -> int:
        """The least number of workers: they have ``min_spare`` lanes, for all may be idle."""
        return min(self.most, ceil(self.min_spare / self.lanes)) if self.is_elastic else self.most

    def within(self, size: int) -> int:
        """The size that is allowed and nearest to this one."""
        return max(self.fewest, min(size, self.most))

    def needed(self, busy: int) -> int:
        """As many workers as have ``max_spare`` lanes idle beside so many busy ones."""
        return self.within(ceil((busy + self.max_spare) / self.lanes))

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Settings that no pool can keep together: which one, and what is wrong with it."""
        if not self.max_spare:
            if self.min_spare > 1:
                yield "min_spare", f"{self.min_spare} spare of a fixed number; max_spare makes the pool elastic"
            if self.start:
                yield "start_children", f"{self.start} of a fixed number; max_spare makes the pool elastic"
            return
        if self.min_spare > self.max_spare:
            yield "min_spare", f"at most max_spare, which is {self.max_spare}, not {self.min_spare}"
        if self.max_spare > self.most * self.lanes:
            yield (
                "max_spare",
                f"at most what max_children can have idle, {self.most * self.lanes}, not {self.max_spare}",
            )
        if self.start > self.most:
            yield "start_children", f"at most max_children, which is {self.most}, not {self.start}"


class Breath(Struct, frozen=True):
    """The size of a pool, and what it remembers of how it came to that. Times are on the caller's clock."""

    size: int  # workers
    wake_at: float = inf  # when to breathe again
    spurt: int = 1  # workers by which it grows next
    patience: float = TICK  # how long too many must be idle, in seconds
    since: float = -inf  # when the present span of patience began,
    peak: int = 0  # and how many lanes were not idle at its busiest
    ceiling: int | None = None  # the size that the span before has shown to be enough; None: none has yet
    shrunk_at: float = -inf  # unless it has grown since
    held: str = ""  # what keeps it from growing although few are idle: its "limit", or workers that are "starting"


def begin(now: float, bounds: Bounds) -> Breath:
    """The first breath of a pool."""
    return within(now, Breath(bounds.start), bounds)


def within(now: float, breath: Breath, bounds: Bounds) -> Breath:
    """The breath of a pool that has other bounds from now on."""
    size = bounds.within(breath.size)
    if not bounds.is_elastic:
        return Breath(size)
    held = breath.held if size == bounds.most else ""
    return replace(breath, size=size, wake_at=min(breath.wake_at, now + TICK), held=held)


def breathe(now: float, breath: Breath, bounds: Bounds, busy: int, ready: int) -> Breath:
    """The next breath, of a pool of which so many lanes are busy and so many ready, busy ones included.

    From any state, under a load that keeps ``busy`` lanes busy and with workers that are ready within a tick, it takes
    at most ``recovery(bounds)`` ticks until the size is one that never changes again: ``min_spare`` to ``max_spare``
    lanes idle, or as near to that as the bounds allow.
    """
    if now < breath.wake_at or not bounds.is_elastic:
        return breath
    breath = _watched(now, replace(breath, wake_at=now + TICK), bounds, _not_idle(breath, bounds, busy, ready))
    if breath.size * bounds.lanes < busy + bounds.min_spare:
        return _grown(now, breath, bounds, busy)
    if breath.ceiling is not None and breath.size > breath.ceiling:
        return replace(breath, size=breath.size - 1, shrunk_at=now, spurt=1, held="")
    if ready - busy >= bounds.min_spare:
        return replace(breath, spurt=1, held=breath.held if breath.size == bounds.most else "")
    return replace(breath, held=breath.held or ("starting" if breath.spurt > 1 else ""))


def recovery(bounds: Bounds) -> int:
    """In how many ticks a pool has the size that a constant load needs, whatever it was before.

    Growing takes a tick for each doubling and then for each BURST; the span that it interrupted, and the next one, are
    at most as long as the longest patience; shrinking takes a tick for each worker.
    """
    growing = BURST.bit_length() + bounds.most // BURST
    return growing + 2 * ceil(LONGEST_PATIENCE / TICK) + bounds.most + 2


def changes(before: Breath, after: Breath) -> Iterator[tuple[str, str]]:
    """What there is to tell of a breath: events, each with its reason."""
    if after.size > before.size:
        yield "grown", "few_idle"
    if after.size < before.size:
        yield "shrunk", "many_idle"
    if after.patience > before.patience:
        yield "held_back", "flapping"
    if after.held and after.held != before.held:
        yield "held_back", after.held


def _not_idle(breath: Breath, bounds: Bounds, busy: int, ready: int) -> int:
    """How many lanes are busy or on their way."""
    return busy + max(0, breath.size * bounds.lanes - ready)


def _watched(now: float, breath: Breath, bounds: Bounds, taken: int) -> Breath:
    """Take notice of how many are not idle; at the end of a span, of what its busiest moment needed."""
    peak = max(breath.peak, taken)
    if now < breath.since + breath.patience:
        ceiling = None if breath.ceiling is None else max(breath.ceiling, bounds.needed(taken))
        return replace(breath, peak=peak, ceiling=ceiling)
    breath = replace(breath, since=now, peak=taken, ceiling=bounds.needed(peak) if breath.since > -inf else None)
    has_stood = breath.shrunk_at > -inf and now - breath.shrunk_at > SOON
    if has_stood and breath.ceiling is not None and breath.ceiling < breath.size:
        return replace(breath, patience=max(breath.patience / 2, TICK), shrunk_at=-inf)
    return breath


def _grown(now: float, breath: Breath, bounds: Bounds, busy: int) -> Breath:
    """Grow, if the limit allows it: and do not shrink before a whole span has gone by again."""
    if breath.size == bounds.most:
        return replace(breath, held="limit", spurt=1)
    is_regret = now - breath.shrunk_at <= SOON
    return replace(
        breath,
        size=min(breath.size + breath.spurt, bounds.most),
        spurt=min(2 * breath.spurt, BURST),
        patience=min(2 * breath.patience, LONGEST_PATIENCE) if is_regret else breath.patience,
        since=now,
        peak=busy,
        ceiling=None,
        shrunk_at=-inf,
        held="",
    )
