"""The master's record of a service: settings, listeners, the mold, and the pool that is forked from it."""

import json
import os
import selectors
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from preforkd import log, settings
from preforkd.backlog import sample
from preforkd.children import Child
from preforkd.listeners import Bound
from preforkd.molds import Mold
from preforkd.plan import KILL_TIMEOUT, State, Timeouts, pause
from preforkd.pool import Pool
from preforkd.wakeup import name_of
from preforkd_workers import protocol
from preforkd_workers.scoreboard import BACKLOG, BACKLOG_LIMIT, DROPS, Scoreboard, Section
from preforkd_workers.spec import Spec


def section(name: str, wanted: settings.Service, listeners: Sequence[Bound]) -> Section:
    """The service's part of a scoreboard, with room for TTIN to double the pool."""
    urls = tuple(bound.listener.url for bound in listeners)
    return Section(name, wanted.kind, urls, 2 * wanted.max_children + 8)


def spec_of(
    name: str,
    wanted: settings.Service,
    listeners: Sequence[Bound],
    board: Scoreboard,
    *,
    generation: int = 1,
    preload: bool,
    lock: int = -1,
) -> Spec:
    """What a mold is told of the service."""
    return Spec(
        service=name,
        generation=generation,
        target=wanted.target,
        handler=wanted.handler or None,
        listeners=tuple(bound.listener for bound in listeners),
        preload=preload,
        max_packet_size=wanted.max_packet_size,
        graceful_timeout=wanted.graceful_timeout,
        eof_timeout=wanted.eof_timeout,
        scoreboard=board,
        master=os.getpid(),
        lock=lock,
    )


class Service:
    """One service. It is the nursery of its own pool: workers come from its mold."""

    def __init__(
        self,
        name: str,
        wanted: settings.Service,
        listeners: Sequence[Bound],
        board: Scoreboard,
        selector: selectors.BaseSelector,
        lock: int = -1,
    ) -> None:
        self.name = name
        self.settings = wanted
        self.listeners = listeners
        self.board = board.services[name]
        self.selector = selector
        self.mold: Mold | None = None
        self.failed_molds = 0
        self.mold_not_before = 0.0
        self.leaving: set[int] = set()  # pids of molds that were let go and are to be reaped
        self.boot_failure: str | None = None
        timeouts = Timeouts(wanted.boot_timeout, wanted.graceful_timeout, wanted.eof_timeout)
        self.pool = Pool(name, selector, self.board, self, timeouts)
        self.spec = spec_of(
            name, wanted, listeners, board, generation=self.pool.generation, preload=wanted.preload, lock=lock
        )
        self.pool.resize(wanted.max_children)

    # The nursery of the pool.

    @property
    def ready(self) -> bool:
        return self.mold is not None and self.mold.ready and not self.mold.is_mute

    @property
    def may_tell(self) -> bool:
        return self.ready

    def spawn(self, child: Child, end: socket.socket) -> int | None:
        assert self.mold is not None
        self.mold.ask(child.serial, child.slot, end)
        return None

    # The mold.

    def settle(self) -> None:
        """Have a mold if workers are wanted, kill one that boots for too long, and settle the pool."""
        if self.mold is None:
            if self.pool.size and monotonic() >= self.mold_not_before:
                self._fork_mold()
        elif monotonic() >= self.mold.deadline:
            self._kill(self.mold)
        self.pool.settle()

    def wake_at(self) -> float:
        if self.mold is None:
            return min(self.pool.wake_at(), self.mold_not_before if self.pool.size else float("inf"))
        return min(self.pool.wake_at(), self.mold.deadline)

    def _kill(self, mold: Mold) -> None:
        """Kill a mold that takes too long: to boot, and then first with a signal that leaves its stack; or to leave."""
        number = signal.SIGKILL if mold.cause else signal.SIGABRT
        mold.deadline = float("inf") if mold.cause else monotonic() + KILL_TIMEOUT
        mold.cause = mold.cause or "boot"
        self._log("kill", mold, cause=mold.cause, signal=number.name)
        mold.kill(number)

    def _fork_mold(self) -> None:
        try:
            self.mold = Mold(self.spec, self.settings.boot_timeout)
        except OSError as error:
            self._hold_back(failed=True)
            log.event(
                "mold_refused", service=self.name, reason=error.strerror, retry_in=f"{pause(self.failed_molds):.1f}s"
            )
            return
        self.selector.register(self.mold.channel, selectors.EVENT_READ, self.hear_mold)

    def hear_mold(self) -> None:
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
                self.boot_failure = rest
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
        """Collect the exit status of this pid, if it is one of the service's own. Whether it was."""
        if self.mold is not None and self.mold.pid == pid:
            self.leaving.discard(pid)
            self._mold_died(self.mold, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        elif pid in self.leaving:
            os.waitpid(pid, 0)
            self.leaving.remove(pid)
        else:
            return self.pool.reap(pid)
        return True

    def _mold_died(self, mold: Mold, exitcode: int) -> None:
        """The mold's workers live on; it is replaced if more may be wanted."""
        self._let_go_of(mold)
        self.pool.bury_unknown()
        if self.pool.size:
            how = f"signal {name_of(-exitcode)}" if exitcode < 0 else f"status {exitcode}"
            if mold.cause == "boot":
                self.boot_failure = (
                    f"the import of {self.spec.target} took longer than boot_timeout; see its stack above"
                )
            elif not mold.ready and self.boot_failure is None:
                self.boot_failure = f"{self.spec.target}: the import ended the process ({how})"
            self._hold_back(failed=not mold.ready)
            self._log("mold_exit", mold, how=how, retry_in=f"{max(0.0, self.mold_not_before - monotonic()):.1f}s")

    def _let_go_of(self, mold: Mold) -> None:
        if mold.channel in self.selector.get_map():
            self.selector.unregister(mold.channel)
        mold.close()
        self.mold = None

    def stop(self) -> None:
        """Want no workers any more, and so no mold. It holds nothing: killing it is the surest.

        But one that is forking a worker is given the time to tell its pid, or nobody would reap it.
        """
        self.pool.size = 0
        if self.mold is None:
            return
        self.leaving.add(self.mold.pid)
        if self.mold.ready and any(child.pid is None for child in self.pool.children.values()):
            self.mold.cause = self.mold.cause or "operator"
            self.mold.deadline = min(self.mold.deadline, monotonic() + KILL_TIMEOUT)
            self.mold.hang_up()
        else:
            self.mold.kill(signal.SIGKILL)
            self._let_go_of(self.mold)

    @property
    def is_manned(self) -> bool:
        """Whether somebody serves, or is about to within a deadline, or nobody is wanted: else the watchdog starves."""
        is_importing = self.mold is not None and not self.mold.ready
        states = {child.state for child in self.pool.children.values()}
        return not self.pool.size or is_importing or bool(states & {State.BOOTING, State.READY})

    @property
    def is_waited_for(self) -> bool:
        """Whether the master stays for the service's processes."""
        return bool(self.leaving) or (self.settings.block_on_close and bool(self.pool.children))

    def take_failure(self) -> str | None:
        """Why the target could not be started since the last time, if so."""
        failure = self.boot_failure or self.pool.boot_failure
        self.boot_failure = self.pool.boot_failure = None
        return failure

    def _hold_back(self, *, failed: bool) -> None:
        """Fork the next mold at once when this one had worked, later and later when it had not."""
        self.failed_molds = self.failed_molds + 1 if failed else 0
        self.mold_not_before = monotonic() + pause(self.failed_molds)

    # What the master shows.

    def sample_listeners(self) -> None:
        """Write what waits at each listener to the scoreboard."""
        for index, bound in enumerate(self.listeners):
            words = self.board.listener(index)
            with suppress(OSError):  # a kernel that does not tell leaves zeros
                words[BACKLOG], words[BACKLOG_LIMIT], words[DROPS] = sample(bound.listener.socket)

    def dump(self) -> None:
        """Write the state of every lane, and all stacks, to the log."""
        log.event("service", service=self.name, workers=self.pool.size, mold=self.mold and self.mold.pid)
        self.pool.dump()

    def _log(self, event: str, mold: Mold, **fields: object) -> None:
        log.event(event, service=self.name, gen=self.spec.generation, pid=mold.pid, **fields)
