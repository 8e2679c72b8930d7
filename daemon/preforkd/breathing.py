"""How many workers a service's pool is to have, by the rules of ``sizing.py``; none while it is drained."""

from time import monotonic

from preforkd.plan import State
from preforkd.pool import Pool
from preforkd.sizing import Bounds, Breath, begin, breathe, changes, within
from preforkd_workers.scoreboard import LIMIT


class Breathing:
    """Keeps the size of one pool within bounds, and as its load wants it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.bounds = Bounds(0)
        self.breath = Breath(0)
        self.is_drained = False

    def begin(self, bounds: Bounds) -> None:
        """Have as many workers as there should be at the start, and breathe within these bounds from now on."""
        self._have(begin(monotonic(), bounds), bounds)

    def limit(self, bounds: Bounds) -> None:
        """Breathe within these bounds from now on; a drained pool as soon as it is refilled."""
        self._have(within(monotonic(), self.breath, bounds), bounds)

    def resume(self, breath: Breath, bounds: Bounds, *, is_drained: bool) -> None:
        """Go on for one before us."""
        self.is_drained = is_drained
        self._have(breath, bounds)

    def stop(self) -> None:
        """Want nobody any more."""
        self.is_drained = False
        self.limit(Bounds(0))

    def drain(self) -> None:
        """Want nobody until further notice."""
        self.is_drained = True
        self.limit(self.bounds)

    def refill(self) -> None:
        """Want as many as before the drain, if the bounds are still the same."""
        self.is_drained = False
        self.limit(self.bounds)

    def _have(self, breath: Breath, bounds: Bounds) -> None:
        self.breath, self.bounds = breath, bounds
        self.pool.board.words[LIMIT] = 0 if self.is_drained else bounds.most
        self.pool.resize(0 if self.is_drained else breath.size)

    def settle(self) -> None:
        """Breathe, if it is time."""
        now, before = monotonic(), self.breath
        if now < self.wake_at():
            return
        busy, ready = self._load()
        self.breath = breathe(now, before, self.bounds, busy, ready)
        if self.breath.size != before.size:
            self.pool.breathe(self.breath.size)
        for event, reason in changes(before, self.breath):
            self.pool.journal.event(
                event,
                service=self.pool.name,
                reason=reason,
                workers=self.breath.size,
                before=before.size,
                busy=busy,
                idle=ready - busy,
                patience=f"{self.breath.patience:g}s",
            )

    def wake_at(self) -> float:
        return float("inf") if self.is_drained else self.breath.wake_at

    def _load(self) -> tuple[int, int]:
        """How many lanes are busy, and how many are ready, those among them; whoever leaves has none."""
        ready = [child for child in self.pool.children.values() if child.state is State.READY]
        return sum(child.rows.busy for child in ready), sum(child.lanes for child in ready)
