"""Reloads and upgrades: never two of them at a time. What is asked for meanwhile comes afterwards, once."""

import platform
import selectors
import sys
from collections.abc import Callable
from time import monotonic, time_ns
from typing import Any, Literal

from msgspec import Struct, field

from preforkd import __version__, log
from preforkd.reload import Reload, Verdict
from preforkd.roster import Roster
from preforkd.sources import Checked
from preforkd.transaction import Phase
from preforkd.upgrade import Preflight
from preforkd_workers.scoreboard import RELOAD_FAILED, RELOAD_NS, RELOADED_AT, RELOADS, RESULTS


class Outcome(Struct, frozen=True):
    """How a reload or an upgrade has ended."""

    what: Literal["reload", "upgrade"]
    result: str  # of a reload: its last phase; of an upgrade: done, refused, or without_reload
    error: str = ""  # why it is not done, in one line or many
    details: dict[str, object] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.result == Phase.DONE.value

    def __str__(self) -> str:
        """For a line of status."""
        return f"{self.what} {self.result}" + (f": {log.summary(self.error)}" if self.error else "")


Tell = Callable[[Outcome], object]


class _Wanted(Struct):
    """What comes next, and who is to be told how it has ended."""

    only: frozenset[str] | None = None  # of a reload: these services; None: all
    python: str = ""  # of an upgrade: the interpreter
    tell: list[Tell] = field(default_factory=list)


class Renewals:
    """The reload or upgrade that there is, and those that are wanted.

    ``read`` gives the settings as they are now; it raises Faults. ``write_state`` gives a descriptor of the state as it
    is now. ``hand_over`` becomes another program; if it returns, it says why not.
    """

    def __init__(
        self,
        roster: Roster,
        selector: selectors.BaseSelector,
        read: Callable[[], Checked],
        write_state: Callable[[], int],
        hand_over: Callable[[str], str],
    ) -> None:
        self.roster = roster
        self.selector = selector
        self.read = read
        self.write_state = write_state
        self.hand_over = hand_over
        self.reload: Reload | None = None
        self.reloads = 0  # how many have begun
        self.preflight: Preflight | None = None
        self.last: Outcome | None = None
        self._reload_wanted: _Wanted | None = None
        self._upgrade_wanted: _Wanted | None = None
        self._tell: list[Tell] = []  # how the one that there is ends
        self._upgraded_from = ""  # the release whose upgrade ends with this reload

    @property
    def is_idle(self) -> bool:
        """Whether there is none, and none wanted."""
        return not (self.reload or self.preflight or self._reload_wanted or self._upgrade_wanted)

    @property
    def next_upgrade(self) -> str | None:
        """The interpreter of the upgrade that comes next, empty for ours; None when there is none."""
        return self._upgrade_wanted.python if self._upgrade_wanted is not None else None

    def report(self) -> dict[str, object] | None:
        """What there is, and how far it is; None: nothing."""
        if self.preflight is not None:
            return {"what": "upgrade", "phase": "preflight"}
        if self.reload is None:
            return None
        seconds = round(monotonic() - self.reload.since, 3)
        where = {"phase": self.reload.phase.value, "seconds": seconds, "generation": self.roster.generation}
        return {"what": "upgrade" if self._upgraded_from else "reload", **where}

    # What is wanted.

    def ask_for_reload(self, only: str | None = None, tell: Tell | None = None) -> None:
        """Want a reload, of one service or of all."""
        wanted = self._reload_wanted or _Wanted(None if only is None else frozenset())
        wanted.only = None if only is None or wanted.only is None else wanted.only | {only}
        wanted.tell += [tell] if tell else []
        self._reload_wanted = wanted

    def ask_for_upgrade(self, python: str = "", tell: Tell | None = None) -> None:
        """Want what this interpreter runs to take over under our pid; ours, if none is given."""
        wanted = self._upgrade_wanted or _Wanted()
        wanted.python = python or wanted.python
        wanted.tell += [tell] if tell else []
        self._upgrade_wanted = wanted

    def resume(self, release: str, next_upgrade: str | None, refusal: str) -> None:
        """We are what an upgrade has come to, from this release: a reload is its end.

        ``next_upgrade``: the one that was asked for meanwhile. ``refusal``: why somebody has come back to us.
        """
        if next_upgrade is not None:
            self.ask_for_upgrade(next_upgrade)
        if refusal:
            return self._refuse_upgrade(refusal)
        self._upgraded_from = release
        log.event("upgraded", **{"from": release, "to": __version__}, python=platform.python_version())
        return self.ask_for_reload()

    # What is done about it.

    def settle(self, *, may_begin: bool) -> None:
        """Begin with what is wanted, take on what has begun, and say how it has ended."""
        if self.reload is None and self.preflight is None and may_begin:
            self._begin()
        if self.preflight is not None:
            self.preflight.settle()
            if self.preflight.is_over:
                self._after_preflight(self.preflight)
        if self.reload is not None:
            self.reload.settle()
            if (verdict := self.reload.verdict) is not None:
                self.reload = None
                self._conclude(verdict)
                self.settle(may_begin=may_begin)  # what was asked for meanwhile
            self.roster.settle()

    def wake_at(self) -> float:
        if self.reload is not None:
            return self.reload.wake_at()
        return self.preflight.deadline if self.preflight is not None else float("inf")

    def reap(self, pid: int) -> bool:
        """Collect the exit status of this pid, if it is a child of ours. Whether it was."""
        return self.preflight is not None and self.preflight.reap(pid)

    def stop(self) -> None:
        """The daemon stops: let go of everything."""
        wanted: list[tuple[Literal["reload", "upgrade"], _Wanted | None]]
        wanted = [("reload", self._reload_wanted), ("upgrade", self._upgrade_wanted)]
        self._reload_wanted = self._upgrade_wanted = None
        for what, each in wanted:
            for tell in each.tell if each else ():
                tell(Outcome(what, Phase.ABANDONED.value, "the daemon is stopping"))
        if self.preflight is not None:
            self.preflight.let_go()
            self.preflight = None
            self._refuse_upgrade("the daemon is told to stop")
        if self.reload is not None:
            self.reload.stop()
            self.settle(may_begin=False)

    def _begin(self) -> None:
        if self._reload_wanted is not None:
            wanted, self._reload_wanted = self._reload_wanted, None
            self._tell = wanted.tell
            self.reloads += 1
            self.reload = Reload(self.roster, self.read, wanted.only)
            self.roster.settle()
        elif self._upgrade_wanted is not None:
            wanted, self._upgrade_wanted = self._upgrade_wanted, None
            self._tell = wanted.tell
            python = wanted.python or sys.executable
            boot_timeout = sum(service.newest.settings.boot_timeout for service in self.roster.targets)
            try:
                self.preflight = Preflight(python, self.write_state(), boot_timeout, self.selector)
            except (OSError, ValueError) as error:
                self._refuse_upgrade(f"{python}: {error}")

    def _after_preflight(self, preflight: Preflight) -> None:
        """Upgrade, if the preflight went well."""
        self.preflight = None
        try:
            self._refuse_upgrade(preflight.failure or self.hand_over(preflight.python))
        except (OSError, ValueError) as error:
            self._refuse_upgrade(f"{preflight.python}: {error}")

    def _refuse_upgrade(self, reason: str) -> None:
        if "\n" in reason:
            log.text("upgrade", reason)
        log.event("upgrade_refused", reason=log.summary(reason))
        self._end(Outcome("upgrade", Phase.REFUSED.value, reason))

    def _conclude(self, verdict: Verdict) -> None:
        """Say how a reload has ended: to the scoreboard, to the log, and to those who asked for it."""
        result, daemon = verdict.result, self.roster.board.daemon
        why: dict[str, Any] = {}
        if verdict.failed_in is not None:
            if "\n" in verdict.reason:
                log.text("reload", verdict.reason)
            why = {"phase": verdict.failed_in.value, "reason": log.summary(verdict.reason)}
        if result.value in RESULTS:
            daemon[RELOADS + RESULTS.index(result.value)] += 1
            daemon[RELOAD_FAILED] = result is not Phase.DONE
        daemon[RELOAD_NS] = int(verdict.seconds * 1e9)
        if result is Phase.DONE:
            daemon[RELOADED_AT] = time_ns()
        log.event(f"reload_{result.value}", gen=verdict.generation, **why, seconds=verdict.seconds)
        details: dict[str, object] = {"generation": verdict.generation, "seconds": verdict.seconds, **why}
        if not self._upgraded_from:
            return self._end(Outcome("reload", result.value, verdict.reason, details))
        versions = {"from": self._upgraded_from, "to": __version__}
        self._upgraded_from = ""
        is_done = result is Phase.DONE
        log.event("upgrade_done" if is_done else "upgrade_without_reload", **versions, seconds=verdict.seconds)
        return self._end(
            Outcome("upgrade", "done" if is_done else "without_reload", verdict.reason, {**versions, **details})
        )

    def _end(self, outcome: Outcome) -> None:
        self.last = outcome
        tell, self._tell = self._tell, []
        for each in tell:
            each(outcome)
