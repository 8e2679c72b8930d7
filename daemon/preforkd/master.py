"""The master: forks the molds, and keeps every pool as it is wanted. It never runs the target's code.

One thread, one loop, one wait. Signals change what is wanted; ``service_actions`` settles the difference.
"""

import os
import selectors
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, time_ns

from setproctitle import setproctitle

from preforkd import log, notify
from preforkd.exits import Exit
from preforkd.plan import Haste
from preforkd.reload import Reload, Verdict
from preforkd.roster import Roster
from preforkd.settings import MOST_CHILDREN
from preforkd.sources import Checked
from preforkd.transaction import Phase
from preforkd.wakeup import WakeUp
from preforkd_workers.prctl import become_subreaper
from preforkd_workers.scoreboard import (
    HEARTBEAT,
    RELOAD_NS,
    RELOADED_AT,
    RELOADS,
    RESULTS,
    STARTED_AT,
)

# How often the master shows that its loop turns, in seconds.
HEARTBEAT_EVERY = 1.0


@dataclass(frozen=True)
class ReloadWanted:
    """The reload that comes next: of these services or of all, and who is to be told how it has ended."""

    only: frozenset[str] | None
    tell: list[Callable[[Verdict], None]] = field(default_factory=list)


class Master:
    """Serves what is on the roster until nothing is wanted and nobody is left.

    ``read`` gives the settings as they are now, for a reload; it raises Faults.
    """

    def __init__(self, roster: Roster, selector: selectors.BaseSelector, read: Callable[[], Checked]) -> None:
        self.roster = roster
        self.selector = selector
        self.read = read
        self.started = monotonic()
        self.is_ready = False
        self.is_stopping = False
        self.next_heartbeat = 0.0
        self.exit = Exit.STOPPED
        self.reloading: Reload | None = None
        self.reload_wanted: ReloadWanted | None = None
        self.tell: list[Callable[[Verdict], None]] = []  # how the reload ends
        self.verdict: Verdict | None = None  # of the last reload
        self.wakeup = WakeUp(SIGNALS)
        selector.register(self.wakeup, selectors.EVENT_READ, self.answer_signals)
        become_subreaper()
        setproctitle(f"preforkd: master {roster.board.name}")
        roster.board.daemon[STARTED_AT] = time_ns()

    # The loop.

    def serve_forever(self) -> Exit:
        """Serve until nothing is wanted and nobody is left; the reason is the exit status."""
        while not self.is_stopping or self.is_waited_for:
            self.service_actions()
            for key, _ in self.selector.select(self.patience()):
                try:
                    key.data()
                except Exception:  # a fault of ours: better deaf to one than gone
                    log.text("master", traceback.format_exc())
                    with suppress(KeyError, ValueError):
                        self.selector.unregister(key.fileobj)
        log.event("stopped", status=self.exit.value, seconds=round(monotonic() - self.started, 1))
        return self.exit

    def service_actions(self) -> None:
        """Settle the difference between what is wanted and what is there."""
        self.roster.settle()
        has_failed = self.report_failures()
        if self.is_stopping:
            self.stop_exporter_last()
        elif has_failed and not self.is_ready:
            self.exit = Exit.TARGET
            self.stop(Haste.KILL)
        elif not self.is_ready and all(service.pool.is_full for service in self.roster):
            self.announce()
        self.settle_reload()
        if monotonic() >= self.next_heartbeat:
            self.beat()

    def patience(self) -> float:
        """Until the earliest deadline, in seconds."""
        if self.is_stopping and not self.is_waited_for:
            return 0.0
        times = [self.next_heartbeat, self.reloading.wake_at() if self.reloading else float("inf")]
        return max(0.0, min(*times, *(service.wake_at() for service in self.roster)) - monotonic())

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody is left whom we wait for: ``block_on_close`` of the service says whether we do."""
        return any(service.is_waited_for for service in self.roster)

    def report_failures(self) -> bool:
        """Say which targets that serve could not be started again, and why; whether there was any."""
        failed = False
        for service in self.roster:
            generation = service.current
            if generation is not None and generation.failure is not None:
                log.event("boot_failed", service=service.name, target=generation.spec.target, gen=generation.number)
                log.text(service.name, generation.failure)
                generation.failure, failed = None, True
        return failed

    def announce(self) -> None:
        """Say that we are ready, in every way that a supervisor may want."""
        self.is_ready = True
        workers = sum(len(service.pool.children) for service in self.roster)
        log.event("ready", pid=os.getpid(), workers=workers, seconds=round(monotonic() - self.started, 3))
        notify.systemd("READY=1", f"STATUS={workers} workers ready", f"MAINPID={os.getpid()}")
        if self.roster.checked.settings.ready_fd:
            notify.newline(self.roster.checked.settings.ready_fd)

    def stop_exporter_last(self) -> None:
        """Have it show the drain of the others to its end."""
        exporter = self.roster.exporter
        if exporter and not any(service.pool.children for service in self.roster if service is not exporter):
            exporter.stop()

    def beat(self) -> None:
        """Show that the loop turns, and what waits at the listeners."""
        self.next_heartbeat = monotonic() + HEARTBEAT_EVERY
        self.roster.board.daemon[HEARTBEAT] = time_ns()
        for service in self.roster:
            service.sample_listeners()

    # The reload.

    def ask_for_reload(self, only: str | None = None, tell: Callable[[Verdict], None] | None = None) -> None:
        """Want a reload, of one service or of all. While there is one, the next begins when it has ended."""
        wanted = self.reload_wanted or ReloadWanted(frozenset() if only else None)
        names = None if only is None or wanted.only is None else wanted.only | {only}
        self.reload_wanted = ReloadWanted(names, [*wanted.tell, *([tell] if tell else [])])

    def settle_reload(self) -> None:
        """Begin with the reload that is wanted, take it on, and say how it has ended."""
        if self.reloading is None and self.reload_wanted is not None and self.is_ready and not self.is_stopping:
            wanted, self.reload_wanted = self.reload_wanted, None
            self.tell = wanted.tell
            self.reloading = Reload(self.roster, self.read, wanted.only)
            self.roster.settle()
        if self.reloading is None:
            return
        self.reloading.settle()
        verdict = self.reloading.verdict
        if verdict is not None:
            self.reloading = None
            self.conclude(verdict)
        self.roster.settle()

    def conclude(self, verdict: Verdict) -> None:
        """Say how a reload has ended: to the log, to the scoreboard, and to those who asked for it."""
        self.verdict = verdict
        result, daemon = verdict.result, self.roster.board.daemon
        fields: dict[str, object] = {"gen": verdict.generation, "seconds": verdict.seconds}
        if result is not Phase.DONE and verdict.failed_in is not None:
            first, *more = verdict.reason.splitlines() or [""]
            fields |= {"phase": verdict.failed_in.value, "reason": more[-1] if more else first}
            if more:
                log.text("reload", verdict.reason)
        log.event(f"reload_{result.value}", **fields)
        if result.value in RESULTS:
            daemon[RELOADS + RESULTS.index(result.value)] += 1
        daemon[RELOAD_NS] = int(verdict.seconds * 1e9)
        if result is Phase.DONE:
            daemon[RELOADED_AT] = time_ns()
        for tell in self.tell:
            tell(verdict)

    # Children that have died.

    def reap(self) -> None:
        """Collect every dead child: workers, molds, and strangers that were reparented to us (prctl(2), subreaper).

        Molds are heard first: a worker's pid is told before it becomes our child, so whom nobody knows is a stranger.
        """
        for service in self.roster:
            service.hear_molds()
        while (pid := _next_dead_child()) is not None:
            if not any(service.reap(pid) for service in self.roster):
                _, status = os.waitpid(pid, 0)
                log.event("stranger_reaped", pid=pid, status=os.waitstatus_to_exitcode(status))

    # Signals: what is wanted from now on. The first line of each is README's.

    def answer_signals(self) -> None:
        for number in self.wakeup.arrived():
            SIGNALS[number](self)

    def drain(self) -> None:
        """Stop: the workers finish what they hold. A second time: clients that keep them waiting read end-of-file."""
        self.stop(Haste.END_OF_FILE if self.is_stopping else Haste.NONE)

    def stop_now(self) -> None:
        """Stop now: a worker that holds a request is killed, with its stacks in the log."""
        self.stop(Haste.KILL)

    def stop(self, haste: Haste) -> None:
        """Want nothing any more, in this haste or in that of an earlier call, whichever is greater."""
        log.event("stopping", haste=haste.name.lower())
        if not self.is_stopping:
            notify.systemd("STOPPING=1")
        self.is_stopping = True
        if self.reloading is not None:
            self.reloading.stop()
            self.settle_reload()
        for service in self.roster:
            service.pool.hurry(haste)
            if service is not self.roster.exporter or not self.is_ready:
                service.stop()

    def reload(self) -> None:
        """Reload settings and code: the new generation takes over if it proves itself, else the old one goes on."""
        self.ask_for_reload()

    def upgrade(self) -> None:
        """Upgrade: not yet."""
        log.event("upgrade", result="not yet")

    def dump(self) -> None:
        """Write the state of every lane and the stacks of every worker to the log."""
        for service in self.roster:
            service.dump()

    def more(self) -> None:
        """One worker more for each service."""
        self.resize(+1)

    def fewer(self) -> None:
        """One worker less for each service, down to one."""
        self.resize(-1)

    def resize(self, by: int) -> None:
        for service in self.roster.targets if not self.is_stopping else ():
            size = min(max(service.pool.size + by, 1), MOST_CHILDREN)
            log.event("resized", service=service.name, workers=size, before=service.pool.size)
            service.pool.resize(size)


SIGNALS: Mapping[signal.Signals, Callable[[Master], None]] = {
    signal.SIGTERM: Master.drain,
    signal.SIGINT: Master.stop_now,
    signal.SIGQUIT: Master.stop_now,
    signal.SIGHUP: Master.reload,
    signal.SIGUSR1: Master.dump,
    signal.SIGUSR2: Master.upgrade,
    signal.SIGTTIN: Master.more,
    signal.SIGTTOU: Master.fewer,
    signal.SIGCHLD: Master.reap,
}


def signals_reference() -> str:
    """The table of signals as README shows it."""
    rows = [f"| `{number.name}` | {(do.__doc__ or '').splitlines()[0]} |" for number, do in SIGNALS.items()]
    return "\n".join(["| signal | meaning |", "| --- | --- |", *rows])


def _next_dead_child() -> int | None:
    """A child that has exited and is still to be reaped, without reaping it (waitid(2), WNOWAIT)."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found is not None else None
