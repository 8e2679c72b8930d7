"""A reload: takes the roster through the phases of ``transaction.py``. It never waits, nor leaves half a change."""

from collections.abc import Callable, Sequence
from time import monotonic

from msgspec import Struct

from preforkd import log
from preforkd.plan import KILL_TIMEOUT
from preforkd.roster import Change, Roster
from preforkd.service import Service
from preforkd.sources import Checked, Faults
from preforkd.transaction import ENDS, Event, Phase, after

# What a phase may take beyond the patience with the processes in it, in seconds.
ALLOWANCE = 2 * KILL_TIMEOUT


class Verdict(Struct, frozen=True):
    """How a reload has ended."""

    result: Phase
    generation: int
    seconds: float
    failed_in: Phase | None = None
    reason: str = ""  # one line or many: faults, or a traceback


class Reload:
    """One reload, from the reading of the settings to its verdict."""

    def __init__(self, roster: Roster, read: Callable[[], Checked], only: frozenset[str] | None = None) -> None:
        self.roster = roster
        self.phase = Phase.SETTINGS
        self.started = self.since = monotonic()  # ``since``: in this phase
        self.deadline = float("inf")
        self.services: Sequence[Service] = ()
        self.ready = 0  # workers of the new generation, at the last look
        self.failed_in: Phase | None = None
        self.reason = ""
        self.change: Change | None = None
        try:
            self.change = roster.examine(read(), only)
        except Faults as faults:
            self.reason = "\n".join(faults.lines)
            self._happened(Event.FAILED)
        else:
            self._happened(Event.SUCCEEDED)

    @property
    def verdict(self) -> Verdict | None:
        """How it has ended, if it has."""
        if self.phase not in ENDS:
            return None
        seconds = round(monotonic() - self.started, 3)
        return Verdict(self.phase, self.roster.generation, seconds, self.failed_in, self.reason)

    def settle(self) -> None:
        """Look at what has happened, until nothing has."""
        while self.phase not in ENDS and (event := self._look()) is not None:
            self._happened(event)

    def wake_at(self) -> float:
        return float("inf") if self.phase in ENDS else self.deadline

    def stop(self) -> None:
        """The daemon stops: let go of what was begun, wherever we are."""
        if self.phase not in ENDS:
            self.failed_in, self.reason = self.phase, "the daemon is told to stop"
            self._happened(Event.STOPPED)

    # What has happened.

    def _look(self) -> Event | None:
        match self.phase:
            case Phase.MOLDS:
                self._note_additions()
                event = _all([service.has_loaded() for service in self.services])
            case Phase.PROBATION:
                event = _all([service.trial.verdict() for service in self.services if service.trial])
            case Phase.ROLLING:
                event = _all([service.has_rolled() for service in self.services])
                self._note_progress()
            case _:
                event = Event.SUCCEEDED if all(each.has_rolled_back() for each in self.services) else None
        return event or (Event.LATE if monotonic() >= self.deadline else None)

    def _note_additions(self) -> None:
        """Services for further servers of scripts have just begun to boot."""
        if self.change is not None and len(self.change.loaded) > len(self.services):
            self.services = self.roster.loading(self.change)
            self._allow_time()

    def _note_progress(self) -> None:
        """Rolling may take as long as it gets on."""
        ready = sum(len(service.pool.ready(service.newest.number)) for service in self.services)
        if ready > self.ready:
            self.ready = ready
            self._allow_time()

    def _allow_time(self) -> None:
        """For what this phase is about, from now on."""
        patience = self._boot_timeout() + ALLOWANCE
        if self.phase is Phase.PROBATION:
            patience += max((service.newest.settings.probation for service in self.services), default=0.0)
        self.deadline = monotonic() + patience

    def _boot_timeout(self) -> float:
        return max((service.newest.settings.boot_timeout for service in self.services), default=0.0)

    # What is done about it.

    def _happened(self, event: Event) -> None:
        before, self.phase, self.since = self.phase, after(self.phase, event), monotonic()
        if event in (Event.FAILED, Event.LATE) and self.failed_in is None:
            self.failed_in, self.reason = before, self.reason or self._reason(event)
        if self.phase not in ENDS and before is not Phase.SETTINGS:
            log.event("reload", gen=self.roster.generation, phase=self.phase.value)
        self._enter()
        self._allow_time()

    def _enter(self) -> None:
        assert self.change is not None or self.phase is Phase.REFUSED
        match self.phase:
            case Phase.MOLDS if self.change:
                self.services = self.roster.load(self.change)
                log.event("reload_started", gen=self.roster.generation, services=",".join(self.change.loaded))
            case Phase.PROBATION:
                for service in self.services:
                    service.try_out()
            case Phase.ROLLING if self.change:
                for service in self.services:
                    service.roll(self.change.checked.settings.max_old_generations)
            case Phase.ROLLING_BACK if self.change:
                self.roster.roll_back(self.change)
                self.services = [each for each in self.services if each.current is not None]
            case Phase.DONE if self.change:
                self.roster.commit(self.change)

    def _reason(self, event: Event) -> str:
        """Why, for the caller of the reload."""
        for service in self.services:
            generation = service.newest
            if generation.failure is not None:
                return f"services.{service.name}:{_below(generation.failure)}"
            if generation.molds_lost:
                return f"services.{service.name}: the new mold died"
            if generation.crashes:
                return f"services.{service.name}: new workers died: {generation.crashes}"
            if generation.refusal and not generation.ready:
                return f"services.{service.name}: no mold could be forked: {generation.refusal}"
        return f"no progress for {self._boot_timeout():g} s" if event is Event.LATE else ""


def _below(text: str) -> str:
    """A sentence beside its subject, a traceback below it."""
    return f"\n{text}" if "\n" in text else f" {text}"


def _all(events: Sequence[Event | None]) -> Event | None:
    """What services have come to together: failed as soon as one has, succeeded when all have."""
    if Event.FAILED in events:
        return Event.FAILED
    return Event.SUCCEEDED if all(event is Event.SUCCEEDED for event in events) else None
