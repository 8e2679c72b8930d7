"""The master: forks the molds, and keeps every pool as it is wanted. It never runs the target's code.

One thread, one loop, one wait. Signals change what is wanted; ``service_actions`` settles the difference.
"""

import os
import platform
import selectors
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic, time_ns
from typing import Protocol

from preforkd import __version__, commands, log
from preforkd.control import Control
from preforkd.descriptors import Store
from preforkd.exits import Exit
from preforkd.handover import Surroundings, hand_over
from preforkd.listeners import Bound
from preforkd.notify import Manager, Stage, newline, status_line
from preforkd.plan import Haste
from preforkd.renewals import Renewals
from preforkd.roster import Roster
from preforkd.sources import Checked
from preforkd.takeover import Lock
from preforkd.upgrade import execute
from preforkd.wakeup import WakeUp
from preforkd_workers.prctl import become_subreaper
from preforkd_workers.scoreboard import HEARTBEAT, LOG_DROPPED
from preforkd_workers.title import setproctitle

# How often the master shows that its loop turns, in seconds.
HEARTBEAT_EVERY = 1.0


class Watcher(Protocol):
    """A child that is no worker and no mold."""

    def reap(self, pid: int) -> bool: ...
    def stop(self) -> None: ...


class Master:
    """Serves what is on the roster until nothing is wanted and nobody is left.

    ``read`` gives the settings as they are now, for a reload; it raises Faults. ``manager`` is who has started us, and
    ``store`` what it keeps. ``control`` is the control socket; ``lock`` proves that somebody of us lives.
    """

    def __init__(
        self,
        roster: Roster,
        read: Callable[[], Checked],
        manager: Manager,
        store: Store,
        control: Bound | None,
        lock: Lock | None,
    ) -> None:
        self.roster = roster
        self.selector = selector = roster.selector
        log.losses.count = self.count_dropped
        self.renewals = Renewals(roster, selector, read, lambda: self.write_state()[0], self.hand_over)
        self.control_listener = control
        listener = control.listener.socket if control else None
        self.control = Control(listener, selector, lambda request: commands.answer(self, request))
        self.manager, self.store, self.lock = manager, store, lock
        self.told_stage = Stage.BOOTING
        self.told_reloads = 0
        self.watcher: Watcher | None = None  # in dev mode
        self.started = monotonic()
        self.is_ready = False
        self.is_stopping = False
        self.log_was_moved = False  # when we looked last
        self.next_heartbeat = 0.0
        self.exit = Exit.STOPPED
        self.wakeup = WakeUp(SIGNALS)
        selector.register(self.wakeup, selectors.EVENT_READ, self.answer_signals)
        become_subreaper()
        setproctitle(f"preforkd: master {self.name}")

    def resume(self, release: str, around: Surroundings, refusal: str) -> None:
        """Go on for a master of this release before us under our pid. ``refusal``: why another one could not."""
        self.is_ready, self.told_stage, self.started = True, Stage.SERVING, around.started
        self.renewals.resume(release, around.next_upgrade, refusal)
        self.reap()

    @property
    def name(self) -> str:
        return self.roster.board.name

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
        self.renewals.settle(may_begin=self.is_ready and not self.is_stopping)
        if monotonic() >= self.next_heartbeat:
            self.beat()
        self.control.settle()
        if self.manager.is_there:
            self.tell_manager()

    def patience(self) -> float:
        """Until the earliest deadline, in seconds."""
        if self.is_stopping and not self.is_waited_for:
            return 0.0
        times = [self.next_heartbeat, self.renewals.wake_at(), self.control.wake_at(), self.manager.wake_at]
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
        log.be_quiet()
        if self.roster.checked.settings.ready_fd:
            newline(self.roster.checked.settings.ready_fd)

    @property
    def stage(self) -> Stage:
        """What we are about, as far as a service manager is patient with it."""
        if self.is_stopping:
            return Stage.STOPPING
        if self.renewals.reload is not None:
            return Stage.RELOADING
        return Stage.SERVING if self.is_ready else Stage.BOOTING

    def status(self) -> str:
        """How we are, in a line for the service manager."""
        children = [child for service in self.roster.targets for child in service.pool.children.values()]
        busy, last = sum(child.busy for child in children), self.renewals.last
        return status_line(busy, len(children) - busy, self.roster.generation, str(last) if last else None)

    def tell_manager(self) -> None:
        """Tell the service manager what has changed, and what it wants to hear again and again."""
        stage, before, status = self.stage, self.told_stage, self.status()
        self.told_stage = stage
        if self.renewals.reloads != self.told_reloads:  # each one, for it may have ended already
            self.told_reloads = self.renewals.reloads
            self.manager.reloading()
            before = Stage.RELOADING
        if stage is Stage.SERVING and before is not stage:
            self.store.sync(self.roster.bound, self.roster.board)
            self.manager.ready(status)
        self.manager.turn(stage, status, is_well=all(service.is_manned for service in self.roster.targets))

    def stop_exporter_last(self) -> None:
        """Have it show the drain of the others to its end."""
        exporter = self.roster.exporter
        if exporter and not any(service.pool.children for service in self.roster if service is not exporter):
            exporter.stop()

    def beat(self) -> None:
        """Show that the loop turns, and what waits at the listeners."""
        self.next_heartbeat = monotonic() + HEARTBEAT_EVERY
        self.roster.board.daemon[HEARTBEAT] = time_ns()
        self.look_after_log()
        for service in self.roster:
            service.beat()

    def count_dropped(self, lines: int) -> None:
        self.roster.board.daemon[LOG_DROPPED] += lines

    # Children that have died.

    def reap(self) -> None:
        """Collect every dead child: workers, molds, and strangers that were reparented to us (prctl(2), subreaper).

        A worker's pid is told before it becomes our child: who is unknown after the molds were heard is a stranger.
        """
        while (pid := _next_dead_child()) is not None:
            if self._collect(pid):
                continue
            for service in self.roster:
                service.hear_molds()
            if not self._collect(pid):
                _, status = os.waitpid(pid, 0)
                log.event("stranger_reaped", pid=pid, status=os.waitstatus_to_exitcode(status))

    def _collect(self, pid: int) -> bool:
        """Collect the exit status of this pid, if it is somebody we know. Whether it was."""
        known = any(service.reap(pid) for service in self.roster) or self.renewals.reap(pid)
        return known or (self.watcher is not None and self.watcher.reap(pid))

    # Signals: what is wanted from now on. The first line of each is the reference's.

    def answer_signals(self) -> None:
        for number in self.wakeup.arrived():
            if number is not signal.SIGCHLD:  # that says nothing of what somebody wants
                log.event("signal", name=number.name)
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
            self.manager.stopping()
        self.is_stopping = True
        self.renewals.stop()
        for service in self.roster:
            service.pool.hurry(haste)
            if service is not self.roster.exporter or not self.is_ready:
                service.stop()

    def reload(self) -> None:
        """Reload settings and code: the new generation takes over if it proves itself, else the old one goes on."""
        self.renewals.ask_for_reload()

    def upgrade(self) -> None:
        """Upgrade: what is installed now takes over under the same pid, if it proves that it starts; then reload."""
        self.renewals.ask_for_upgrade()

    def hand_over(self, python: str) -> str:
        """Become another program. Returns only if the system refuses, and why. Raises as ``write_state`` does."""
        log.event("handing_over", python=python)
        for service in self.roster:
            service.pool.stacks.tell()
        state, needed = self.write_state()
        if self.watcher is not None:
            self.watcher.stop()
        return f"{python}: {execute(python, state, needed, self.manager.environment(), self.wakeup).strerror}"

    def write_state(self) -> tuple[int, list[int]]:
        """What a successor needs to know, as a descriptor, and the descriptors that it needs, that one among them.

        Raises OSError and ValueError, as ``hand_over`` does.
        """
        stored = () if self.manager.is_behind else self.store.names  # to be told again, if it may not have been told
        wanted = self.renewals.next_upgrade
        return hand_over(self.roster, Surroundings(self.started, self.control_listener, self.lock, stored, wanted))

    def dump(self) -> None:
        """Write the state of every lane and the stacks of every worker to the log; open log files anew."""
        self.look_after_log()
        for service in self.roster:
            service.dump()

    def look_after_log(self) -> None:
        """Have everybody follow the log's file, if it was moved away.

        They are told twice: a signal that comes right before a wait is answered after it, which may be long.
        """
        was_moved = log.look_after()
        if was_moved or self.log_was_moved:
            for service in self.roster:
                service.look_after_log()
        self.log_was_moved = was_moved

    def more(self) -> None:
        """One worker more for each service; of an elastic pool, one more at most."""
        self.resize(+1)

    def fewer(self) -> None:
        """One worker less for each service, down to one; of an elastic pool, one less at most."""
        self.resize(-1)

    def drain_or_refill(self) -> None:
        """Have all workers finish and leave, but stay. A second time: have workers again. Not in a terminal."""
        if _has_terminal():  # whose window has changed: that is what it sends the signal for
            return
        if self.is_drained:
            self.refill()
        elif self.is_ready:
            self.drain_workers()

    @property
    def is_drained(self) -> bool:
        """Whether no workers are wanted for the time being."""
        return any(service.is_drained for service in self.roster.targets)

    def drain_workers(self) -> None:
        """Want no workers until further notice, but the exporter's."""
        if self.is_stopping or self.is_drained:
            return
        log.event("draining")
        for service in self.roster.targets:
            service.breathing.drain()

    def refill(self) -> None:
        """Want as many workers as before the drain."""
        if self.is_stopping:
            return
        log.event("refilling")
        for service in self.roster.targets:
            service.breathing.refill()

    def resize(self, by: int) -> None:
        for service in self.roster.targets if not (self.is_stopping or self.is_drained) else ():
            service.scale(by=by)

    def identity(self) -> dict[str, object]:
        """Who we are, for whoever asks over the control socket."""
        return {"name": self.name, "pid": os.getpid(), "version": __version__, "python": platform.python_version()}


SIGNALS: Mapping[signal.Signals, Callable[[Master], None]] = {
    signal.SIGTERM: Master.drain,
    signal.SIGINT: Master.stop_now,
    signal.SIGQUIT: Master.stop_now,
    signal.SIGHUP: Master.reload,
    signal.SIGUSR1: Master.dump,
    signal.SIGUSR2: Master.upgrade,
    signal.SIGTTIN: Master.more,
    signal.SIGTTOU: Master.fewer,
    signal.SIGWINCH: Master.drain_or_refill,
    signal.SIGCHLD: Master.reap,
}


def signals_reference() -> str:
    """The table of signals as the reference shows it."""
    rows = [f"| `{number.name}` | {(do.__doc__ or '').splitlines()[0]} |" for number, do in SIGNALS.items()]
    return "\n".join(["| signal | meaning |", "| --- | --- |", *rows])


def _has_terminal() -> bool:
    """Whether there is a terminal that controls this process (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _next_dead_child() -> int | None:
    """A child that has exited and is still to be reaped, without reaping it (waitid(2), WNOWAIT)."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found is not None else None
