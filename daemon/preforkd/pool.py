"""A service's pool: keeps as many workers as are wanted, by taking the steps of ``plan``.

It does not know how workers are made, only whom to ask (``Nursery``): a mold in the daemon, a fork in the library.
"""

import json
import os
import re
import selectors
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from time import monotonic
from typing import Protocol

from preforkd import log
from preforkd.children import Child
from preforkd.plan import (
    EndOfFile,
    Haste,
    Kill,
    Retire,
    Spawn,
    State,
    Timeouts,
    Wanted,
    is_failed_start,
    pause,
    plan,
    wake_at,
)
from preforkd.wakeup import name_of
from preforkd_workers import protocol
from preforkd_workers.protocol import DRAIN, END_OF_FILE, FAILED, LEAVING, NOTICE, READY, SHUTDOWN, STACKS, TRIED
from preforkd_workers.scoreboard import (
    CAUSES,
    EXITS,
    GENERATION,
    KILLED,
    REAPED_CPU_NS,
    SIZE,
    SPAWNS,
    Service,
)

# How long a worker may take to hear that it must leave, in seconds, before we go on as if it had.
HEARING = 1.0


class Nursery(Protocol):
    """Where the workers of a generation come from."""

    @property
    def ready(self) -> bool:
        """Whether a worker can be asked for now."""
        ...

    @property
    def may_tell(self) -> bool:
        """Whether it may still tell the pid of a worker that it was asked for."""
        ...

    def spawn(self, child: Child, end: socket.socket) -> int | None:
        """Ask for a worker that keeps ``end`` as its end of the lifeline.

        Returns its pid, or None when ``spawned`` will tell it. Raises OSError when it cannot be had.
        """
        ...

    def lost(self, child: Child, cause: str, failure: str | None) -> None:
        """A worker has died, of a cause of CAUSES. ``failure``: why it could not boot, if it could not."""
        ...


class Journal(Protocol):
    """Where a pool says what it does; the module ``log`` is one."""

    def event(self, name: str, /, **fields: object) -> None: ...
    def text(self, prefix: str, lines: str) -> None: ...


class Pool:
    """The children of one service, by slot."""

    def __init__(
        self,
        name: str,
        selector: selectors.BaseSelector,
        board: Service,
        nurseries: Mapping[int, Nursery],
        wanted: Wanted,
        timeouts: Timeouts,
        journal: Journal = log,
    ) -> None:
        self.journal = journal
        self.name = name
        self.selector = selector
        self.board = board
        self.nurseries = nurseries
        self.timeouts = timeouts
        self.children: dict[int, Child] = {}
        self.serials = count(1)
        self.failed_starts: dict[int, int] = {}
        self.not_before: dict[int, float] = {}
        self.shutdown_asked = False
        self.want(wanted)

    # What is wanted.

    def want(self, wanted: Wanted) -> None:
        """Come to this from now on. What other code has made a slot hold back for is forgiven."""
        self.wanted = wanted
        words = self.board.words
        words[GENERATION], words[SIZE] = wanted.generation, wanted.size
        self.failed_starts.clear()
        self.not_before.clear()

    def resize(self, size: int) -> None:
        self.want(replace(self.wanted, size=size))

    def hurry(self, haste: Haste) -> None:
        """Stop in this haste, or in that of an earlier call, whichever is greater."""
        self.wanted = replace(self.wanted, haste=max(self.wanted.haste, haste))

    @property
    def size(self) -> int:
        return self.wanted.size

    @property
    def is_full(self) -> bool:
        """Whether there are as many workers as wanted, all ready and of the generation that is wanted."""
        live = [child for child in self.children.values() if child.state in (State.BOOTING, State.READY)]
        return (
            len(live) == self.size
            and all(child.state is State.READY and child.generation == self.wanted.generation for child in live)
            and not any(self._may_still_accept(child) for child in self.children.values())
        )

    def _may_still_accept(self, child: Child) -> bool:
        """Whether it is of another generation and has not heard yet that it must leave. The stuck accept nothing."""
        is_outdated = child.state is State.DRAINING and child.generation != self.wanted.generation
        return is_outdated and not child.is_leaving and monotonic() < child.since + HEARING

    def ready(self, generation: int) -> list[Child]:
        """The workers of this generation that serve."""
        return [
            child for child in self.children.values() if child.generation == generation and child.state is State.READY
        ]

    def is_waiting_for(self, generation: int) -> bool:
        """Whether a worker of this generation was asked for whose pid is not known yet."""
        return any(child.generation == generation and child.pid is None for child in self.children.values())

    def draining(self) -> list[int]:
        """The generations of which some are still leaving, the oldest first."""
        leaving = {
            child.generation for child in self.children.values() if child.state not in (State.BOOTING, State.READY)
        }
        return sorted(leaving - {self.wanted.generation})

    def _wanted_now(self) -> Wanted:
        can_spawn = frozenset(generation for generation, nursery in self.nurseries.items() if nursery.ready)
        return replace(self.wanted, can_spawn=can_spawn)

    def wake_at(self) -> float:
        return wake_at(self._wanted_now(), [*self.children.values()], self.timeouts, self.not_before)

    # What is done about it.

    def settle(self) -> None:
        """Take the steps that are due."""
        for child in [each for each in self.children.values() if each.is_mute and each.pidfd < 0]:
            self.bury(child)
        wanted, children = self._wanted_now(), [*self.children.values()]
        for step in plan(monotonic(), wanted, children, self.timeouts, self.not_before):
            match step:
                case Spawn(slot, generation):
                    self._spawn(slot, generation)
                case Retire(Child() as child):
                    child.enter(State.DRAINING)
                    child.hang_up()
                    child.send(DRAIN)
                case EndOfFile(Child() as child):
                    child.enter(State.HALF_CLOSED)
                    child.was_cut = child.busy
                    child.send(END_OF_FILE)
                    self._log("end_of_file", child)
                case Kill(Child() as child, cause):
                    self.kill(child, cause)

    def _spawn(self, slot: int, generation: int) -> None:
        try:
            row = self.board.use_row(slot)
            ours, theirs = socket.socketpair()
        except MemoryError as error:
            return self._spawn_refused(slot, generation, str(error), "have fewer services, or fewer workers")
        except OSError as error:  # the master is out of descriptors
            advice = "raise RLIMIT_NOFILE (ulimit -Hn, LimitNOFILE=): the master needs two descriptors a worker"
            return self._spawn_refused(slot, generation, error.strerror or str(error), advice)
        ours.setblocking(False)
        child = self.children[slot] = Child(next(self.serials), slot, generation, row, self.board.row(slot), ours)
        # Before the fork: a signal handler of the library's user may raise right behind it.
        self.selector.register(ours, selectors.EVENT_READ, lambda: self._hear(child))
        with theirs:
            try:
                pid = self.nurseries[generation].spawn(child, theirs)
            except OSError as error:
                return self.refused(child.serial, error.strerror or str(error))
        if pid is not None:
            self.spawned(child.serial, pid)
        return None

    def adopt(self, child: Child) -> None:
        """Have this child of a master before us under the same pid."""
        self.children[child.slot] = child
        if not child.is_mute:
            self.selector.register(child.lifeline, selectors.EVENT_READ, lambda: self._hear(child))
        self._watch(child)

    def _watch(self, child: Child) -> None:
        with suppress(OSError):  # out of descriptors: its end is told by that of the lifeline
            if child.pid is not None:
                child.pidfd = os.pidfd_open(child.pid)
                self.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self.bury(child))

    def _is_on_the_books(self, child: Child) -> bool:
        """Whether the child is still ours: what a selector reports at a time may concern one that was just buried."""
        return self.children.get(child.slot) is child

    def _by_serial(self, serial: int) -> Child | None:
        return next((child for child in self.children.values() if child.serial == serial), None)

    def spawned(self, serial: int, pid: int) -> None:
        """This child has this pid. It may be dead already, but it is not reaped before it is known."""
        child = self._by_serial(serial)
        if child is None or child.pid is not None:
            return
        child.pid = pid
        self.board.words[SPAWNS] += 1
        self._watch(child)
        if child.state is State.DRAINING:  # told before anybody knew its pid
            child.send(DRAIN)

    def refused(self, serial: int, reason: str) -> None:
        """The system would not fork this child: try again later."""
        child = self._by_serial(serial)
        if child is None or child.pid is not None:
            return
        self._forget(child)
        advice = "check RLIMIT_NPROC (ulimit -u), the cgroup's pids.max, and memory"
        self._spawn_refused(child.slot, child.generation, reason, advice)

    def _spawn_refused(self, slot: int, generation: int, reason: str, advice: str) -> None:
        self._hold_back(slot)
        wait = self._seconds_held_back(slot) or "0s"
        where = {"service": self.name, "slot": slot, "gen": generation}
        self.journal.event("spawn_refused", **where, reason=reason, retry_in=wait, advice=advice)

    def kill(self, child: Child, cause: str) -> None:
        """First a signal that leaves the stacks (faulthandler), then the one that nothing withstands."""
        number = signal.SIGKILL if child.state is State.KILLED else signal.SIGABRT
        self._log("kill", child, cause=cause, signal=number.name, busy=child.busy)
        child.cause = child.cause or cause
        child.enter(State.KILLED)
        child.send(number)
        if child.pid is None:  # not forked yet, and when it is, it finds that we have hung up
            self._bury(child, None)

    def dump(self) -> None:
        """Have every worker write its stacks to the log."""
        for child in self.children.values():
            self._log("lane", child, state=child.state.value, busy=child.busy, requests=child.requests)
            if child.state is not State.BOOTING:
                child.send(STACKS)

    # What the children say, and how they end.

    def _hear(self, child: Child) -> None:
        if not self._is_on_the_books(child):
            return None
        try:
            lines = child.hear()
        except BlockingIOError:
            return None
        except EOFError:
            self.selector.unregister(child.lifeline)
            child.is_mute = True
            return self.bury_unknown()
        for line in lines:
            self._heard(child, line)
        return None

    def _heard(self, child: Child, line: str) -> None:
        word, _, rest = line.partition(" ")
        if child.failure is not None:
            child.failure.append(line)
        elif word == READY:
            self.spawned(child.serial, int(rest))
            if child.state is State.BOOTING:
                child.enter(State.READY)
                self._log("worker_ready", child)
        elif word == FAILED:
            child.failure = []
        elif word == NOTICE:
            event, fields = json.loads(rest)
            self._log(event, child, **fields)
        elif word == LEAVING:
            child.is_leaving = True
        elif word == TRIED:
            pass  # and the loop turns for it, which is what it was said for
        elif word == SHUTDOWN:
            self.shutdown_asked = True
        elif line and not is_plumbing(line):
            self.journal.text(f"{self.name}#{child.slot}", line)

    def reap(self, pid: int) -> bool:
        """Collect the exit status of this pid, if it is a child of the pool. Whether it was."""
        child = next((each for each in self.children.values() if each.pid == pid), None)
        if child is not None:
            self.bury(child)
        return child is not None

    def bury(self, child: Child) -> None:
        """Collect the exit status of a child that may have died. Harmless when it has not, or not as our child yet."""
        if child.pid is None or not self._is_on_the_books(child):
            return None
        try:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        except ChildProcessError:
            if os.path.exists(f"/proc/{child.pid}"):
                return None  # still the middle process's; it is ours as soon as that has exited
            return self._bury(child, None)  # somebody else has reaped it
        if pid:
            self.board.words[REAPED_CPU_NS] += int((usage.ru_utime + usage.ru_stime) * 1e9)
            self._bury(child, os.waitstatus_to_exitcode(status))
        return None

    def bury_unknown(self) -> None:
        """Take those off the books who died before anybody could tell their pid, once nobody can tell it any more."""
        for child in [each for each in self.children.values() if each.is_mute and each.pid is None]:
            nursery = self.nurseries.get(child.generation)
            if nursery is None or not nursery.may_tell:
                self._bury(child, None)

    def _bury(self, child: Child, status: int | None) -> None:
        """Take a dead child off the books: ``status`` is negative for a signal, None when it was never known."""
        self._hear_last_words(child)
        self._forget(child)
        words = self.board.words
        killed = self.board.settle_row(child.slot)
        words[KILLED] += killed
        words[SPAWNS] += child.pid is None  # forked after all, though nobody could tell
        cause = _cause(child, status)
        words[EXITS + CAUSES.index(cause)] += 1
        age = monotonic() - child.born
        is_targets_fault = status is not None and cause in ("boot", "crash")  # and not that of a mold that was killed
        if is_targets_fault and (cause == "boot" or is_failed_start(age, child.requests)):
            self._hold_back(child.slot)
        else:
            self.failed_starts.pop(child.slot, None)
            self.not_before.pop(child.slot, None)
        how = {"status": status} if status is None or status >= 0 else {"signal": name_of(-status)}
        lost, wait = killed or None, self._seconds_held_back(child.slot)
        self._log(
            "worker_exit",
            child,
            cause=cause,
            **how,
            requests=child.requests,
            lost=lost,
            age=f"{age:.1f}s",
            retry_in=wait,
        )
        nursery = self.nurseries.get(child.generation)
        if nursery is not None:
            nursery.lost(child, cause, _failure(child, status) if cause == "boot" and is_targets_fault else None)

    def _hear_last_words(self, child: Child) -> None:
        with suppress(EOFError, BlockingIOError):
            while True:
                for line in child.hear():
                    self._heard(child, line)

    def _hold_back(self, slot: int) -> None:
        self.failed_starts[slot] = self.failed_starts.get(slot, 0) + 1
        self.not_before[slot] = monotonic() + pause(self.failed_starts[slot])

    def _seconds_held_back(self, slot: int) -> str | None:
        """For the log; None when the slot is filled again at once."""
        seconds = self.not_before.get(slot, 0.0) - monotonic()
        return f"{seconds:.1f}s" if seconds > 0 else None

    def _forget(self, child: Child) -> None:
        for descriptor in (child.lifeline.fileno(), child.pidfd):
            if descriptor >= 0 and descriptor in self.selector.get_map():
                self.selector.unregister(descriptor)
        child.close()
        del self.children[child.slot]

    def _log(self, event: str, child: Child, **fields: object) -> None:
        self.journal.event(event, service=self.name, slot=child.slot, gen=child.generation, pid=child.pid, **fields)


# A stack begins with what the worker does and ends with how it came to be forked: nobody needs to read that.
_MASTERS, _WORKERS = (re.escape(os.path.dirname(str(each.__file__))) for each in (log, protocol))
_RUNNERS = r'.*/bin/preforkd"|<frozen (?:runpy|importlib\._bootstrap(?:_external)?)>'
_PLUMBING = re.compile(rf'  File "(?:{_MASTERS}/|{_WORKERS}/(?!lane\.py|samples\.py)|{_RUNNERS})')


def is_plumbing(line: str) -> bool:
    """Whether a line of a stack is about how the code came to run, and not about what it does."""
    return _PLUMBING.match(line) is not None


def _cause(child: Child, status: int | None) -> str:
    """Why a child has left, in the words of CAUSES."""
    if child.cause is not None:
        return child.cause
    if child.state is State.BOOTING:
        return "boot"
    if child.state in (State.DRAINING, State.HALF_CLOSED) and status in (0, -DRAIN):
        return "eof" if child.was_cut else "drained"
    return "drained" if status == 0 and child.is_leaving else "crash"


def _failure(child: Child, status: int | None) -> str:
    """Why a child could not boot: what it has said, or else how it ended."""
    if child.failure is not None:
        return "\n".join(child.failure).rstrip()
    return f"a worker {'exited' if status is None else _how(status)} before it was ready"


def _how(status: int) -> str:
    return f"was killed by {name_of(-status)}" if status < 0 else f"exited with status {status}"
