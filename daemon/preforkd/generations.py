"""A generation of a service: one loading of its code and settings, and the mold that holds it."""

import json
import os
import selectors
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Protocol

from msgspec.structs import replace

from preforkd import log, settings
from preforkd.children import Child
from preforkd.holdback import HoldBack
from preforkd.listeners import Bound
from preforkd.molds import Mold
from preforkd.plan import KILL_TIMEOUT, Timeouts
from preforkd.pool import Pool
from preforkd.scripts import binds_for_itself
from preforkd.sizing import Bounds
from preforkd.sources import EXPORTER
from preforkd.stacks import is_plumbing
from preforkd.transaction import Count
from preforkd.wakeup import name_of
from preforkd.wear import Endurance, draw
from preforkd_workers import protocol
from preforkd_workers.hooks import HOOKS
from preforkd_workers.resources import Resources
from preforkd_workers.scoreboard import Scoreboard
from preforkd_workers.spec import DAEMONS_LOG, Limits, Spec, is_script


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
        listeners=() if binds_for_itself(wanted) else tuple(bound.listener for bound in listeners),
        kind=wanted.kind,
        lanes=wanted.lanes + wanted.spare_lanes,
        preload=wanted.preload,
        max_packet_size=wanted.max_packet_size,
        graceful_timeout=wanted.graceful_timeout,
        eof_timeout=wanted.eof_timeout,
        scoreboard=board,
        master=os.getpid(),
        resources=Resources(wanted.nice, wanted.cpu_affinity, wanted.oom_score_adjust, wanted.rlimits),
        hooks={hook: name for hook in HOOKS if (name := getattr(wanted, hook))},
        fork_safety=wanted.fork_safety,
        limits=wanted.limits,
        is_rehearsal=is_rehearsal,
        access_log=_place_of(wanted.access_log),
        access_log_format=wanted.access_log_format,
        args=tuple(wanted.args),
        server=wanted.server,
    )


class Host(Protocol):
    """Whom scripts ask for what their generation cannot know."""

    def socket_files(self) -> tuple[str, ...]: ...
    def bind(self, generation: "Generation", place: str) -> tuple[str, int | None]: ...
    def serves(self, generation: "Generation", urls: Sequence[str]) -> None: ...


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
        host: Host | None = None,
    ) -> None:
        self.host = host
        self.given: list[Bound] = []  # what the script of the mold has bound
        self.has_served = False  # that script has come to where it serves
        self.number = number
        self.settings = wanted
        self.listeners = listeners
        self.spec = spec
        self.selector = selector
        self.pool = pool  # that asks us for workers
        self.scaled_to: int | None = None  # the limit that an operator has set, in place of max_children
        self.mold: Mold | None = None
        self.is_needed = True  # and so its mold, whenever that dies
        self.held_back = HoldBack()  # when a mold could not be started, or died before it was ready
        self.leaving: set[int] = set()  # pids of molds that were let go and are to be reaped
        self.failure: str | None = None  # why the target could not be started, since somebody took notice
        self.refusal = ""  # why the system would not fork a mold
        self.molds_lost = 0
        self.boot_failures = 0
        self.crashes = 0
        self.buried = Count()  # what its workers that have died had ended

    @property
    def timeouts(self) -> Timeouts:
        return Timeouts(self.settings.boot_timeout, self.settings.graceful_timeout, self.settings.eof_timeout)

    @property
    def bounds(self) -> Bounds:
        """Within which the pool is sized: as the settings say, or an operator since."""
        declared = Bounds.of(self.settings)
        return declared if self.scaled_to is None else replace(declared, most=self.scaled_to)

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
    def lanes(self) -> int:
        return self.spec.lanes

    @property
    def limits(self) -> Limits:
        return self.spec.limits

    @property
    def urls(self) -> Sequence[str]:
        return [listener.url for listener in self.spec.listeners]

    def endurance(self) -> Endurance:
        return draw(self.settings, _chance)

    @property
    def may_tell(self) -> bool:
        return self.ready

    def spawn(self, child: Child, end: socket.socket) -> int | None:
        assert self.mold is not None
        trial_ms = int(self.settings.probation * 1000) if self.pool.wanted.trial == self.number else 0
        may = child.endurance
        order = protocol.Order(child.serial, child.slot, child.rows_at, trial_ms, may.requests, int(may.is_fresh))
        self.mold.ask(order, end)
        return None

    def count(self) -> Count:
        """What its workers have ended, those that have died included."""
        living = [child for child in self.pool.children.values() if child.generation == self.number]
        requests, errors = sum(child.requests for child in living), sum(child.errors for child in living)
        return Count(self.buried.requests + requests, self.buried.errors + errors)

    def lost(self, child: Child, cause: str, failure: str | None) -> None:
        self.buried = Count(self.buried.requests + child.requests, self.buried.errors + child.errors)
        if failure is not None:
            self.failure = failure
            self.boot_failures += 1
        elif cause in ("boot", "crash", "oom", "deadline"):
            self.crashes += 1

    # The mold.

    def settle(self) -> None:
        """Have a mold if one is needed, and kill one that boots, or leaves, for too long."""
        if self.mold is None:
            if self.is_needed and monotonic() >= self.held_back.until:
                self._fork()
        elif monotonic() >= self.mold.deadline:
            self._kill(self.mold)

    def wake_at(self) -> float:
        if self.mold is None:
            return self.held_back.until if self.is_needed else float("inf")
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
            mold = Mold.fork(self._spec_now(), self.settings.boot_timeout)
        except OSError as error:
            self.held_back.fail(monotonic())
            self.refusal = error.strerror or str(error)
            log.event("mold_refused", service=self.spec.service, reason=error.strerror, retry_in=self._retry_in())
            return
        self.attend(mold)

    def _user_metrics(self) -> str:
        """Where the target's own metrics are kept, if there is a page to show them."""
        board = self.spec.scoreboard
        return board.user_metrics if EXPORTER in board.services and self.spec.service != EXPORTER else ""

    def _spec_now(self) -> Spec:
        spec = replace(self.spec, user_metrics=self._user_metrics(), log=log.of_children())
        if self.host is None or not is_script(self.spec.target):
            return spec
        self.given = []
        return replace(spec, kept_files=self.host.socket_files())

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
            case protocol.BIND if self.host is not None:
                with suppress(OSError):  # it is dead by now, and is heard no more
                    mold.answer(*self.host.bind(self, rest))
            case protocol.SERVES if self.host is not None:
                self.host.serves(self, json.loads(rest))
            case protocol.NOTICE:
                event, fields = json.loads(rest)
                if event == "log_dropped":
                    log.count_dropped(fields["lines"])
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
            self.failure = f"{_late(self.spec.target)}{stack}"
        elif not mold.ready and not mold.has_said_why:
            what = "the script" if is_script(self.spec.target) else "the import"
            self.failure = f"{self.spec.target}: {what} ended the process ({how}){stack}"
        elif stack:
            log.text(self.spec.service, stack)
        if mold.ready:
            self.held_back.forgive()
        else:
            self.held_back.fail(monotonic())
        self._log("mold_exit", mold, how=how, retry_in=self._retry_in())

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

    def _retry_in(self) -> str:
        return f"{self.held_back.seconds(monotonic()):.1f}s"

    def _log(self, event: str, mold: Mold, **fields: object) -> None:
        log.event(event, service=self.spec.service, gen=self.number, pid=mold.pid, **fields)


def _place_of(access_log: str) -> str:
    """Where it is written, wherever the target goes."""
    return access_log if access_log in ("", DAEMONS_LOG) else os.path.abspath(access_log)


def _late(target: str) -> str:
    if is_script(target):
        return f"{target} has not called serve_forever() within boot_timeout"
    return f"the import of {target} took longer than boot_timeout"


def _chance() -> float:
    """A number from 0 to 1. Not by the module random, which loads OpenSSL and has a hook in every fork."""
    return int.from_bytes(os.urandom(4)) / 2**32
