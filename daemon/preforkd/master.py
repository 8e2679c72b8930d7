"""The master: forks the molds, and keeps every pool as it is wanted. It never runs the target's code.

One thread, one loop, one wait. Signals change what is wanted; ``service_actions`` settles the difference.
"""

import os
import selectors
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import monotonic, time_ns

from setproctitle import setproctitle

from preforkd import log
from preforkd.descriptors import Store
from preforkd.exits import Exit
from preforkd.notify import Manager, Phase, newline, status_line
from preforkd.plan import Haste
from preforkd.service import Service
from preforkd.wakeup import WakeUp
from preforkd_workers.prctl import become_subreaper
from preforkd_workers.scoreboard import HEARTBEAT, STARTED_AT, Scoreboard

# How often the master shows that its loop turns, in seconds.
HEARTBEAT_EVERY = 1.0


class Master:
    """Serves the services until nothing is wanted and nobody is left."""

    def __init__(
        self,
        name: str,
        services: Sequence[Service],
        exporter: Service | None,
        board: Scoreboard,
        selector: selectors.BaseSelector,
        ready_fd: int,
        manager: Manager,
        store: Store,
    ) -> None:
        self.services = services
        self.exporter = exporter
        self.everyone = [*services, exporter] if exporter else [*services]
        self.board = board
        self.selector = selector
        self.ready_fd = ready_fd
        self.manager = manager
        self.store = store
        self.started = monotonic()
        self.is_ready = False
        self.is_stopping = False
        self.next_heartbeat = 0.0
        self.exit = Exit.STOPPED
        self.wakeup = WakeUp(SIGNALS)
        selector.register(self.wakeup, selectors.EVENT_READ, self.answer_signals)
        become_subreaper()
        setproctitle(f"preforkd: master {name}")
        board.daemon[STARTED_AT] = time_ns()

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
        for service in self.everyone:
            service.settle()
        has_failed = self.report_failures()
        if self.is_stopping:
            self.stop_exporter_last()
        elif has_failed and not self.is_ready:
            self.exit = Exit.TARGET
            self.stop(Haste.KILL)
        elif not self.is_ready and all(service.pool.is_full for service in self.everyone):
            self.announce()
        if monotonic() >= self.next_heartbeat:
            self.beat()
        if self.manager.is_there:
            self.manager.turn(self.phase, self.status(), is_well=all(each.is_manned for each in self.services))

    def patience(self) -> float:
        """Until the earliest deadline, in seconds."""
        if self.is_stopping and not self.is_waited_for:
            return 0.0
        earliest = min(service.wake_at() for service in self.everyone)
        return max(0.0, min(earliest, self.next_heartbeat, self.manager.wake_at) - monotonic())

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody is left whom we wait for: ``block_on_close`` of the service says whether we do."""
        return any(service.is_waited_for for service in self.everyone)

    def report_failures(self) -> bool:
        """Say which targets could not be started since the last time, and why; whether there was any."""
        failures = {service: failure for service in self.everyone if (failure := service.take_failure())}
        for service, failure in failures.items() if not self.is_stopping else ():
            log.event("boot_failed", service=service.name, target=service.spec.target)
            log.text(service.name, failure)
        return bool(failures)

    def announce(self) -> None:
        """Say that we are ready, in every way that a supervisor may want."""
        self.is_ready = True
        workers = sum(len(service.pool.children) for service in self.everyone)
        log.event("ready", pid=os.getpid(), workers=workers, seconds=round(monotonic() - self.started, 3))
        self.store.sync([bound for service in self.everyone for bound in service.listeners], self.board)
        self.manager.ready(self.status())
        if self.ready_fd:
            newline(self.ready_fd)

    @property
    def phase(self) -> Phase:
        return Phase.STOPPING if self.is_stopping else Phase.SERVING if self.is_ready else Phase.BOOTING

    def status(self) -> str:
        """How we are, in a line for the service manager."""
        children = [child for service in self.services for child in service.pool.children.values()]
        busy = sum(child.busy for child in children)
        return status_line(busy, len(children) - busy, max(each.pool.generation for each in self.services), None)

    def stop_exporter_last(self) -> None:
        """Have it show the drain of the others to its end."""
        if self.exporter and not any(service.pool.children for service in self.services):
            self.exporter.stop()

    def beat(self) -> None:
        """Show that the loop turns, and what waits at the listeners."""
        self.next_heartbeat = monotonic() + HEARTBEAT_EVERY
        self.board.daemon[HEARTBEAT] = time_ns()
        for service in self.everyone:
            service.sample_listeners()

    # Children that have died.

    def reap(self) -> None:
        """Collect every dead child: workers, molds, and strangers that were reparented to us (prctl(2), subreaper).

        Molds are heard first: a worker's pid is told before it becomes our child, so whom nobody knows is a stranger.
        """
        for service in self.everyone:
            service.hear_mold()
        while (pid := _next_dead_child()) is not None:
            if not any(service.reap(pid) for service in self.everyone):
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
            self.manager.stopping()
        self.is_stopping = True
        for service in self.everyone:
            service.pool.haste = max(service.pool.haste, haste)
            if service is not self.exporter or not self.is_ready:
                service.stop()

    def reload(self) -> None:
        """Reload: not yet."""
        log.event("reload", result="not yet")

    def upgrade(self) -> None:
        """Upgrade: not yet."""
        log.event("upgrade", result="not yet")

    def dump(self) -> None:
        """Write the state of every lane and the stacks of every worker to the log."""
        for service in self.everyone:
            service.dump()

    def more(self) -> None:
        """One worker more for each service."""
        self.resize(+1)

    def fewer(self) -> None:
        """One worker less for each service, down to one."""
        self.resize(-1)

    def resize(self, by: int) -> None:
        for service in self.services if not self.is_stopping else ():
            size = min(max(service.pool.size + by, 1), service.board.section.rows)
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
