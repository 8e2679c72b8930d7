"""A service's pool: keeps as many workers as are wanted, by taking the steps of ``plan``.

It does not know how workers are made, only whom to ask (``Nursery``): a mold in the daemon, a fork in the library.
"""

import json
import os
import selectors
import signal
import socket
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from resource import struct_rusage
from time import monotonic, monotonic_ns

from msgspec.structs import replace

from preforkd import log, memory, usermetrics
from preforkd.children import Child
from preforkd.deaths import Obituary, cause_of, held_by
from preforkd.holdback import HoldBack
from preforkd.log import Journal
from preforkd.nursery import Nursery
from preforkd.plan import (
    EndOfFile,
    Haste,
    Kill,
    Retire,
    Spawn,
    State,
    Timeouts,
    Wanted,
    plan,
    wake_at,
)
from preforkd.recycling import Recycler
from preforkd.stacks import Stacks, is_plumbing
from preforkd.watch import Watch
from preforkd.wear import MAX_RSS, WEAR
from preforkd_workers.protocol import (
    ABANDONED,
    DRAIN,
    END_OF_FILE,
    FAILED,
    LEAVING,
    LOOK,
    NOTICE,
    READY,
    SHUTDOWN,
    STACK_OF_THE_DEAF,
    STACKS,
    TRIED,
    WORN,
)
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
HEARING = 3.0


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
        self.recycler = Recycler(self.children, self._log)
        memory.ours()  # from now on it can tell whom the kernel kills
        self.serials = count(1)
        self.held_back: dict[int, HoldBack] = defaultdict(HoldBack)  # by slot
        self.shutdown_asked = False
        self.watch = Watch(self)
        self.stacks = Stacks(journal)
        self.want(wanted)

    # What is wanted.

    def want(self, wanted: Wanted) -> None:
        """Come to this from now on. What other code has made a slot hold back for is forgiven."""
        self.wanted = wanted
        words = self.board.words
        words[GENERATION], words[SIZE] = wanted.generation, wanted.size
        self.held_back.clear()
        self.recycler.forget()

    def resize(self, size: int) -> None:
        self.want(replace(self.wanted, size=size))

    def breathe(self, size: int) -> None:
        """Come to this size because of the load. It says nothing of the code, so what holds back still does."""
        self.wanted = replace(self.wanted, size=size)
        self.board.words[SIZE] = size

    def hurry(self, haste: Haste) -> None:
        """Stop in this haste, or in that of an earlier call, whichever is greater."""
        self.wanted = replace(self.wanted, haste=max(self.wanted.haste, haste))

    def replace_all(self) -> list[Child]:
        """Have all that serve now replaced, as if they were worn; who they are. Who is outdated leaves anyway."""
        serving = self.ready(self.wanted.generation)
        for child in serving:
            child.worn = child.worn or "drained"
        return serving

    @property
    def size(self) -> int:
        return self.wanted.size

    @property
    def is_full(self) -> bool:
        """Whether there are as many workers as wanted, all ready and of the generation that is wanted.

        One that boots in place of one that was worn counts as ready: or else a pool of workers that do not live long
        would never be full.
        """
        live = [child for child in self.children.values() if child.state in (State.BOOTING, State.READY)]
        serving = [child for child in live if child.state is State.READY or child.slot in self.recycler.worn_slots]
        return (
            len(serving) >= self.wanted.total
            and all(map(self._is_current, live))
            and not any(self._may_still_accept(child) for child in self.children.values())
        )

    def _is_current(self, child: Child) -> bool:
        return child.generation == self.wanted.generation

    def _may_still_accept(self, child: Child) -> bool:
        """Whether it is of another generation and has not heard yet that it must leave."""
        return not self._is_current(child) and child.state is State.DRAINING and self.may_accept(child)

    def may_accept(self, child: Child) -> bool:
        """Whether it serves, or may not have heard yet that it must leave. The stuck accept nothing."""
        is_unheard = not child.is_leaving and monotonic() < child.since + HEARING
        return child.state is State.READY or (child.state is State.DRAINING and is_unheard)

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

    def _not_before(self) -> dict[int, float]:
        return {slot: each.until for slot, each in self.held_back.items()}

    def wake_at(self) -> float:
        planned = wake_at(self._wanted_now(), [*self.children.values()], self.timeouts, self._not_before())
        return min(planned, self.watch.wake_at, self.recycler.wake_at(), self.stacks.wake_at())

    def count_held_back(self) -> int:
        """How many slots are left empty for a while, after their workers died young again and again."""
        now = monotonic()
        return sum(each.until > now for each in self.held_back.values())

    # What is done about it.

    def settle(self) -> None:
        """Take the steps that are due."""
        for child in [each for each in self.children.values() if each.is_mute and each.pidfd < 0]:
            self.bury(child)
        self.watch.settle()
        self.stacks.settle(monotonic())
        for child in [*self.recycler.settle(monotonic())]:
            self.kill(child, MAX_RSS)
        wanted, children = self._wanted_now(), [*self.children.values()]
        for step in plan(monotonic(), wanted, children, self.timeouts, self._not_before()):
            match step:
                case Spawn(slot, generation):
                    self._spawn(slot, generation)
                case Retire(Child() as child, reason):
                    child.reason = reason
                    self.retire(child)
                case EndOfFile(Child() as child):
                    child.enter(State.HALF_CLOSED)
                    child.was_cut = child.busy
                    child.send(END_OF_FILE)
                    self._log("end_of_file", child)
                case Kill(Child() as child, cause):
                    self.kill(child, cause)

    def _spawn(self, slot: int, generation: int) -> None:
        try:
            nursery = self.nurseries[generation]
            lanes = nursery.lanes
            at = self.board.use(slot, lanes)
            ours, theirs = socket.socketpair()
        except MemoryError as error:
            return self._spawn_refused(slot, generation, str(error), "have fewer services, or fewer workers")
        except OSError as error:  # the master is out of descriptors
            advice = "raise RLIMIT_NOFILE (ulimit -Hn, LimitNOFILE=): the master needs two descriptors a worker"
            return self._spawn_refused(slot, generation, error.strerror or str(error), advice)
        ours.setblocking(False)
        child = self.children[slot] = Child(
            next(self.serials),
            slot,
            generation,
            at,
            self.board.rows(slot, lanes),
            ours,
            nursery.limits,
            nursery.endurance(),
            nursery.urls,
        )
        # Before the fork: a signal handler of the library's user may raise right behind it.
        self.selector.register(ours, selectors.EVENT_READ, lambda: self._hear(child))
        with theirs:
            try:
                pid = nursery.spawn(child, theirs)
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
        self._attend(child)
        self.watch.adopt()

    def _attend(self, child: Child) -> None:
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
        self._attend(child)
        if child.state is State.DRAINING:  # told before anybody knew its pid
            child.send(DRAIN)
        if child.must_look:
            child.send(LOOK)

    def refused(self, serial: int, reason: str) -> None:
        """The system would not fork this child: try again later."""
        child = self._by_serial(serial)
        if child is None or child.pid is not None:
            return
        self._forget(child)
        advice = "check RLIMIT_NPROC (ulimit -u), the cgroup's pids.max, and memory"
        self._spawn_refused(child.slot, child.generation, reason, advice)

    def _spawn_refused(self, slot: int, generation: int, reason: str, advice: str) -> None:
        self.held_back[slot].fail(monotonic())
        wait = self._retry_in(slot) or "0s"
        where = {"service": self.name, "slot": slot, "gen": generation}
        self.journal.event("spawn_refused", **where, reason=reason, retry_in=wait, advice=advice)

    def retire(self, child: Child, cause: str | None = None) -> None:
        """Step one of stopping: nothing new, and a time-out to finish what it holds."""
        child.cause = child.cause or cause
        child.enter(State.DRAINING)
        child.hang_up()
        child.send(DRAIN)

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
        """Have every worker write its stacks to the log, and look where that is."""
        for child in self.children.values():
            self._log("lane", child, state=child.state.value, busy=child.busy, requests=child.requests)
            if child.state is not State.BOOTING:
                self.ask_for_stacks(child)
        self.have_all_look()

    def ask_for_stacks(self, child: Child) -> None:
        """Have a worker write its stacks to the log, by itself or, if it does not hear, by force."""
        child.send(STACKS)
        self.stacks.expect(f"{self.name}#{child.slot}", lambda: child.send(STACK_OF_THE_DEAF))

    def have_all_look(self) -> None:
        """Have every worker look where the log is, and which levels loggers have. Who cannot hear yet is told later."""
        for child in self.children.values():
            child.must_look = child.pid is None
            child.send(LOOK)

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
                self.recycler.is_replaced(child.slot)
                self.watch.expect(child)
                self._log("worker_ready", child)
        elif word == FAILED:
            # A keeper serves already: the lines are for the log. Of the others it is why they have not booted.
            child.failure = None if child.state is State.READY else []
        elif word == NOTICE:
            event, fields = json.loads(rest)
            self._log(event, child, **fields)
        elif word == LEAVING:
            child.is_leaving = True
        elif word == WORN:
            self.recycler.look_at(child, monotonic())
        elif word == ABANDONED:
            child.cause = child.cause or "deadline"
        elif word == TRIED:
            pass  # and the loop turns for it, which is what it was said for
        elif word == SHUTDOWN:
            self.shutdown_asked = True
        elif line and not is_plumbing(line):
            self.stacks.add(f"{self.name}#{child.slot}", line)

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
            self._bury(child, os.waitstatus_to_exitcode(status), usage)
        return None

    def bury_unknown(self) -> None:
        """Take those off the books who died before anybody could tell their pid, once nobody can tell it any more."""
        for child in [each for each in self.children.values() if each.is_mute and each.pid is None]:
            nursery = self.nurseries.get(child.generation)
            if nursery is None or not nursery.may_tell:
                self._bury(child, None)

    def _bury(self, child: Child, status: int | None, usage: struct_rusage | None = None) -> None:
        """Take a dead child off the books: ``status`` is negative for a signal, None when it was never known."""
        self._hear_last_words(child)
        self.stacks.tell(f"{self.name}#{child.slot}")
        self._forget(child)
        usermetrics.forget(self.board.board, self.name, child.slot)
        held = held_by(child.rows, child.urls, monotonic_ns())
        lost = child.rows.settle()
        is_oom = status == -signal.SIGKILL and child.cause is None and memory.ours().has_killed()
        cause = cause_of(child, status, is_oom=is_oom)
        has_booted = child.state is not State.BOOTING
        age = monotonic() - child.born
        death = Obituary(cause, status, usage, age, child.requests, lost, held if lost else None, has_booted)
        words = self.board.words
        words[KILLED] += lost
        words[SPAWNS] += child.pid is None  # forked after all, though nobody could tell
        words[EXITS + CAUSES.index(cause)] += 1
        if death.is_failed_start:
            self.held_back[child.slot].fail(monotonic())
        else:
            self.held_back.pop(child.slot, None)
        self.recycler.has_died(child.slot, of_wear=cause in WEAR and has_booted and self._is_current(child))
        self._log("worker_exit", child, **death.fields(), retry_in=self._retry_in(child.slot))
        nursery = self.nurseries.get(child.generation)
        if nursery is not None:
            nursery.lost(child, cause, death.failure(child.failure))

    def _hear_last_words(self, child: Child) -> None:
        with suppress(EOFError, BlockingIOError):
            while True:
                for line in child.hear():
                    self._heard(child, line)

    def _retry_in(self, slot: int) -> str | None:
        """For the log; None when the slot is filled again at once."""
        seconds = self.held_back[slot].seconds(monotonic()) if slot in self.held_back else 0.0
        return f"{seconds:.1f}s" if seconds else None

    def _forget(self, child: Child) -> None:
        for descriptor in (child.lifeline.fileno(), child.pidfd):
            if descriptor >= 0 and descriptor in self.selector.get_map():
                self.selector.unregister(descriptor)
        child.close()
        del self.children[child.slot]

    def _log(self, event: str, child: Child, **fields: object) -> None:
        self.journal.event(event, service=self.name, slot=child.slot, gen=child.generation, pid=child.pid, **fields)
