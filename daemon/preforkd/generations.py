"""A generation of a service: one loading of its code and settings, and the mold that holds it."""

import json
import os
import selectors
import signal
import socket
from collections.abc import Sequence
from time import monotonic

from preforkd import log, settings
from preforkd.children import Child
from preforkd.listeners import Bound
from preforkd.molds import Mold
from preforkd.plan import KILL_TIMEOUT, Timeouts, pause
from preforkd.pool import Pool, is_plumbing
from preforkd.wakeup import name_of
from preforkd_workers import protocol
from preforkd_workers.hooks import HOOKS
from preforkd_workers.scoreboard import Scoreboard
from preforkd_workers.spec import Spec


def spec_of(
    name: str,
    generation: int,
    wanted: settings.Service,
    listeners: Sequence[Bound],
    board: Scoreboard,
    *,
    is_rehearsal: bool = False,
) -> Spec:
    """What a mold is told of the service."""
    return Spec(
        service=name,
        generation=generation,
        target=wanted.target,
        handler=wanted.handler or None,
        listeners=tuple(bound.listener for bound in listeners),
        preload=wanted.preload,
        max_packet_size=wanted.max_packet_size,
        graceful_timeout=wanted.graceful_timeout,
        eof_timeout=wanted.eof_timeout,
        scoreboard=board,
        master=os.getpid(),
        hooks={hook: name for hook in HOOKS if (name := getattr(wanted, hook))},
        is_rehearsal=is_rehearsal,
    )


class Generation:
    """The nursery of the workers of one generation: has a mold as long as it is needed, and asks it for them."""

    def __init__(
        self,
        number: int,
        wanted: settings.Service,
        listeners: Sequence[Bound],
        spec: Spec,
        pool: Pool,
        selector: selectors.BaseSelector,
    ) -> None:
        self.number = number
        self.settings = wanted
        self.listeners = listeners
        self.spec = spec
        self.selector = selector
        self.pool = pool  # that asks us for workers
        self.mold: Mold | None = None
        self.is_needed = True  # and so its mold, whenever that dies
        self.failed_molds = 0
        self.not_before = 0.0
        self.leaving: set[int] = set()  # pids of molds that were let go and are to be reaped
        self.failure: str | None = None  # why the target could not be started, since somebody took notice
        self.refusal = ""  # why the system would not fork a mold
        self.molds_lost = 0
        self.boot_failures = 0
        self.crashes = 0

    @property
    def timeouts(self) -> Timeouts:
        return Timeouts(self.settings.boot_timeout, self.settings.graceful_timeout, self.settings.eof_timeout)

    @property
    def has_failed(self) -> bool:
        """Whether anything has gone wrong that a reload does not forgive."""
        return self.failure is not None or bool(self.molds_lost or self.boot_failures)

    @property
    def is_gone(self) -> bool:
        return self.mold is None and not self.is_needed and not self.leaving

    # The nursery of the pool.

    @property
    def ready(self) -> bool:
        return self.mold is not None and self.mold.ready and not self.mold.is_mute

    @property
    def may_tell(self) -> bool:
        return self.ready

    def spawn(self, child: Child, end: socket.socket) -> int | None:
        assert self.mold is not None
        trial_ms = int(self.settings.probation * 1000) if self.pool.wanted.trial == self.number else 0
        self.mold.ask(protocol.Order(child.serial, child.slot, child.row_at, trial_ms), end)
        return None

    def lost(self, child: Child, cause: str, failure: str | None) -> None:
        if failure is not None:
            self.failure = failure
            self.boot_failures += 1
        elif cause in ("boot", "crash", "oom", "deadline"):
            self.crashes += 1

    # The mold.

    def settle(self) -> None:
        """Have a mold if one is needed, and kill one that boots, or leaves, for too long."""
        if self.mold is None:
            if self.is_needed and monotonic() >= self.not_before:
                self._fork()
        elif monotonic() >= self.mold.deadline:
            self._kill(self.mold)

    def wake_at(self) -> float:
        if self.mold is None:
            return self.not_before if self.is_needed else float("inf")
        return self.mold.deadline

    def _kill(self, mold: Mold) -> None:
        """Kill a mold that takes too long: to boot, and then first with a signal that leaves its stack; or to leave."""
        number = signal.SIGKILL if mold.cause else signal.SIGABRT
        mold.deadline = float("inf") if mold.cause else monotonic() + KILL_TIMEOUT
        mold.cause = mold.cause or "boot"
        self._log("kill", mold, cause=mold.cause, signal=number.name)
        mold.kill(number)

    def _fork(self) -> None:
        try:
            mold = Mold.fork(self.spec, self.settings.boot_timeout)
        except OSError as error:
            self._hold_back(failed=True)
            self.refusal = error.strerror or str(error)
            retry_in = f"{pause(self.failed_molds):.1f}s"
            log.event("mold_refused", service=self.spec.service, reason=error.strerror, retry_in=retry_in)
            return
        self.attend(mold)

    def attend(self, mold: Mold) -> None:
        """Have this mold, and listen to it."""
        self.mold = mold
        self.selector.register(mold.channel, selectors.EVENT_READ, self.hear)

    def hear(self) -> None:
        """Act on what the mold has said. Its end is told by its death, not by the end of the channel."""
        mold = self.mold
        if mold is None:
            return
        for word, rest in mold.hear():
            self._heard(mold, word, rest)
        if mold.is_mute and mold.channel in self.selector.get_map():
            self.selector.unregister(mold.channel)

    def _heard(self, mold: Mold, word: str, rest: str) -> None:
        match word:
            case protocol.READY:
                mold.ready, mold.deadline = True, float("inf")
                self._log("mold_ready", mold, kind=rest, seconds=round(monotonic() - mold.born, 3))
            case protocol.FAILED:
                self.failure, mold.has_said_why = rest, True
            case protocol.SPAWNED:
                serial, pid = map(int, rest.split())
                self.pool.spawned(serial, pid)
            case protocol.REFUSED:
                number, _, reason = rest.partition(" ")
                self.pool.refused(int(number), reason)
            case protocol.NOTICE:
                event, fields = json.loads(rest)
                self._log(event, mold, **fields)

    def reap(self, pid: int) -> bool:
        """Collect the exit status of this pid, if it is a mold of ours. Whether it was."""
        if self.mold is not None and self.mold.pid == pid:
            self.leaving.discard(pid)
            self._died(self.mold, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        elif pid in self.leaving:
            os.waitpid(pid, 0)
            self.leaving.remove(pid)
        else:
            return False
        return True

    def _died(self, mold: Mold, exitcode: int) -> None:
        """The mold's workers live on; it is replaced if it is still needed."""
        self.hear()
        self._let_go_of(mold)
        self.pool.bury_unknown()
        if not self.is_needed:
            return
        self.molds_lost += 1
        stack = "".join(f"\n{line}" for line in mold.stack.splitlines() if line and not is_plumbing(line))
        how = f"signal {name_of(-exitcode)}" if exitcode < 0 else f"status {exitcode}"
        if mold.cause == "boot":
            self.failure = f"the import of {self.spec.target} took longer than boot_timeout{stack}"
        elif not mold.ready and not mold.has_said_why:
            self.failure = f"{self.spec.target}: the import ended the process ({how}){stack}"
        elif stack:
            log.text(self.spec.service, stack)
        self._hold_back(failed=not mold.ready)
        self._log("mold_exit", mold, how=how, retry_in=f"{max(0.0, self.not_before - monotonic()):.1f}s")

    def _let_go_of(self, mold: Mold) -> None:
        if mold.channel in self.selector.get_map():
            self.selector.unregister(mold.channel)
        mold.close()
        self.mold = None

    def let_go(self) -> None:
        """Need no mold any more. It holds nothing: killing it is the surest.

        But one that is forking a worker is given the time to tell its pid, or nobody would reap it.
        """
        self.is_needed = False
        if self.mold is None:
            return
        self.leaving.add(self.mold.pid)
        if self.mold.ready and self.pool.is_waiting_for(self.number):
            self.mold.cause = self.mold.cause or "operator"
            self.mold.deadline = min(self.mold.deadline, monotonic() + KILL_TIMEOUT)
            self.mold.hang_up()
        else:
            self.mold.kill(signal.SIGKILL)
            self._let_go_of(self.mold)

    def _hold_back(self, *, failed: bool) -> None:
        """Fork the next mold at once when this one had worked, later and later when it had not."""
        self.failed_molds = self.failed_molds + 1 if failed else 0
        self.not_before = monotonic() + pause(self.failed_molds)

    def _log(self, event: str, mold: Mold, **fields: object) -> None:
        log.event(event, service=self.spec.service, gen=self.number, pid=mold.pid, **fields)
