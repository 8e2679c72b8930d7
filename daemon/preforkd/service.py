"""The master's record of a service: a pool, the generation that serves, and the next one while there is a reload."""

import selectors
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from time import monotonic

from preforkd import log, settings
from preforkd.backlog import sample
from preforkd.children import Child
from preforkd.generations import Generation, spec_of
from preforkd.listeners import Bound
from preforkd.plan import State, Timeouts, Wanted
from preforkd.pool import Pool
from preforkd.transaction import Count, Event, Probation, judge, judge_roll
from preforkd_workers.scoreboard import BACKLOG, BACKLOG_LIMIT, DROPS, Scoreboard


class Service:
    """One service. Its pool outlives its generations."""

    def __init__(self, name: str, board: Scoreboard, selector: selectors.BaseSelector) -> None:
        self.name = name
        self.scoreboard = board
        self.board = board.add(name)
        self.selector = selector
        self.generations: dict[int, Generation] = {}  # the current, the next, and those whose molds are leaving
        self.current: Generation | None = None
        self.next: Generation | None = None
        self.pool = Pool(name, selector, self.board, self.generations, Wanted(0, generation=0), Timeouts())
        self.wanted_before = self.pool.wanted
        self.trial: Trial | None = None
        self.block_on_close = True
        self.size_on_refill: int | None = None  # of the pool of nobody, as settings loaded since the drain want it

    @property
    def newest(self) -> Generation:
        generation = self.next or self.current
        assert generation is not None
        return generation

    @property
    def listeners(self) -> Sequence[Bound]:
        """The listeners of the current generation, and those of the next one that are not."""
        found = {id(bound): bound for each in (self.current, self.next) if each for bound in each.listeners}
        return [*found.values()]

    # The steps of a reload. The first generation of all takes them as well, but for the trial.

    def load(self, number: int, wanted: settings.Service, listeners: Sequence[Bound]) -> None:
        """Begin with the next generation: its mold is forked as soon as the service is settled."""
        self.next = self.restore(number, wanted, listeners)
        self.wanted_before = self.pool.wanted
        self._list_listeners()

    def restore(self, number: int, wanted: settings.Service, listeners: Sequence[Bound]) -> Generation:
        """Have the record of a generation, with a mold or without."""
        spec = spec_of(self.name, number, wanted, listeners, self.scoreboard)
        generation = Generation(number, wanted, listeners, spec, self.pool, self.selector)
        self.generations[number] = generation
        return generation

    def has_loaded(self) -> Event | None:
        """Whether the mold of the next generation is ready, or has failed."""
        return Event.FAILED if self.newest.has_failed else Event.SUCCEEDED if self.newest.ready else None

    def try_out(self) -> None:
        """Have one worker of the next generation serve, beside those of the current one if there is one."""
        number, wanted = self.newest.number, self.newest.settings
        nobody_serves = self.current is not None and not self.pool.size
        self.trial = Trial(self.newest, self.pool, has_passed=nobody_serves or not wanted.probation)
        if self.trial.has_passed:
            return
        if self.current is None:
            self.pool.timeouts = self.newest.timeouts
            self.pool.want(Wanted(1, number))
        else:
            now = self.pool.wanted
            # One patience for all who boot; that of a generation that boots more slowly is enough for the other.
            patience = max(self.newest.timeouts.boot, self.current.timeouts.boot)
            self.pool.timeouts = replace(self.current.timeouts, boot=patience)
            self.pool.want(
                replace(now, trial=number, max_surge=wanted.max_surge, max_unavailable=wanted.max_unavailable)
            )

    def roll(self, max_old_generations: int) -> None:
        """Replace the workers of every other generation by those of the next one."""
        wanted, size = self.newest.settings, self.newest.settings.max_children
        if self.current is not None and (self._has_size_of(self.current) or not self.pool.size):
            size = self.pool.size
        self.pool.timeouts = self.newest.timeouts
        self.pool.want(
            replace(
                self.pool.wanted,
                size=size,
                generation=self.newest.number,
                trial=None,
                max_surge=wanted.max_surge,
                max_unavailable=wanted.max_unavailable,
                hurried=self._hurried(self.current, max_old_generations),
            )
        )

    def has_rolled(self) -> Event | None:
        """Whether all workers are of the generation that is wanted, or too many of them have failed."""
        failed = self.newest.has_failed or judge_roll(self.newest.boot_failures, self.newest.crashes)
        return Event.FAILED if failed else Event.SUCCEEDED if self.pool.is_full else None

    def roll_back(self, max_old_generations: int) -> None:
        """Replace those of the next generation, from the mold of the current one."""
        failed, self.next, self.trial = self.newest, None, None
        failed.let_go()
        if self.current is None:
            return self.stop()
        size = self.pool.size if self._has_size_of(failed) else self.wanted_before.size
        now, hurried = self.pool.wanted, self._hurried(failed, max_old_generations)
        self.pool.timeouts = self.current.timeouts
        self.pool.want(replace(self.wanted_before, size=size, haste=now.haste, hurried=hurried))
        self._list_listeners()
        return None

    def has_rolled_back(self) -> bool:
        """Whether the old generation is whole again, or cannot be for now: its mold is gone, and none starts again."""
        return self.pool.is_full or bool(self.current and self.current.failed_molds)

    def commit(self) -> None:
        """The next generation is the current one from now on."""
        if self.current is not None:
            if not self.pool.size and not self._has_size_of(self.current):
                self.size_on_refill = self.newest.settings.max_children
            self.current.let_go()
        self.current, self.next, self.trial = self.newest, None, None
        self.block_on_close = self.current.settings.block_on_close
        self._list_listeners()

    def _hurried(self, outdated: Generation | None, most: int) -> frozenset[int]:
        """The generations that have been leaving for longest, as this one begins to leave and only so many may."""
        others = {each.number for each in (self.current, outdated) if each}
        leaving = [number for number in self.pool.draining() if number not in others]
        return frozenset(leaving[: max(0, len(leaving) + (outdated is not None) - most)])

    def _has_size_of(self, other: Generation) -> bool:
        """Whether the settings agree on the size: then what an operator has said of it since goes on."""
        return self.current is not None and self.newest.settings.max_children == other.settings.max_children

    # What is to be done now.

    def settle(self) -> None:
        """Settle the molds and the pool; forget the generations that are gone."""
        for generation in [*self.generations.values()]:
            generation.settle()
            if generation.is_gone:
                del self.generations[generation.number]
        self.pool.settle()

    def wake_at(self) -> float:
        times = [generation.wake_at() for generation in self.generations.values()]
        return min(self.pool.wake_at(), self.trial.wake_at() if self.trial else float("inf"), *times)

    def stop(self) -> None:
        """Want no workers any more, and so no molds."""
        self.pool.resize(0)
        for generation in self.generations.values():
            generation.let_go()
        self.current = self.next = self.trial = None

    @property
    def is_leaving(self) -> bool:
        """Whether it was stopped."""
        return self.current is None and self.next is None

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of a service that was stopped."""
        return not self.generations and not self.pool.children

    # Who has died.

    def hear_molds(self) -> None:
        for generation in self.generations.values():
            generation.hear()

    def reap(self, pid: int) -> bool:
        """Collect the exit status of this pid, if it is one of the service's own. Whether it was."""
        return any(generation.reap(pid) for generation in self.generations.values()) or self.pool.reap(pid)

    @property
    def is_manned(self) -> bool:
        """Whether somebody serves, or is about to within a deadline, or nobody is wanted: else the watchdog starves."""
        is_importing = any(each.mold is not None and not each.mold.ready for each in self.generations.values())
        states = {child.state for child in self.pool.children.values()}
        return not self.pool.size or is_importing or bool(states & {State.BOOTING, State.READY})

    @property
    def is_waited_for(self) -> bool:
        """Whether the master stays for the service's processes."""
        has_molds = any(generation.leaving for generation in self.generations.values())
        return has_molds or (self.block_on_close and bool(self.pool.children))

    # What the master shows.

    def sample_listeners(self) -> None:
        """Write what waits at each listener to the scoreboard."""
        words = self.board.listeners()
        for each in self.listeners:
            with suppress(OSError):  # a kernel that does not tell leaves zeros
                found = words[each.listener.url]
                found[BACKLOG], found[BACKLOG_LIMIT], found[DROPS] = sample(each.listener.socket)

    def _list_listeners(self) -> None:
        self.scoreboard.list_listeners(self.name, [bound.listener.url for bound in self.listeners])

    def dump(self) -> None:
        """Write the state of every lane, and all stacks, to the log."""
        for each in self.generations.values():
            log.event("mold", service=self.name, gen=each.number, pid=each.mold and each.mold.pid, ready=each.ready)
        log.event("service", service=self.name, workers=self.pool.size, gen=self.pool.wanted.generation)
        self.pool.dump()


class Trial:
    """The probation of one worker of a new generation, beside the old ones."""

    def __init__(self, generation: Generation, pool: Pool, has_passed: bool) -> None:
        wanted = generation.settings
        self.rules = Probation(wanted.probation, wanted.probation_requests, wanted.probation_max_error_ratio)
        self.generation = generation
        self.pool = pool
        self.worker: Child | None = None  # once it is ready
        self.old_before: dict[int, tuple[int, int]] = {}
        self.has_passed = has_passed

    def verdict(self) -> Event | None:
        """What it has come to by now; None: it goes on."""
        if self.generation.has_failed or self.generation.crashes:
            return Event.FAILED
        if self.worker is None:
            self._begin()
        if self.worker is not None and not self.has_passed:
            new = Count(self.worker.requests, self.worker.errors)
            event = judge(monotonic() - self.worker.since, self.rules, new, self._old())
            if event is Event.FAILED:
                self.generation.failure = f"on probation {new.errors} of {new.requests} requests have raised"
                return event
            self.has_passed = event is Event.SUCCEEDED
        return Event.SUCCEEDED if self.has_passed else None

    def wake_at(self) -> float:
        if self.worker is None or self.has_passed:
            return float("inf")
        return self.worker.since + self.rules.seconds

    def _begin(self) -> None:
        """Once the worker is ready, the window opens in which it is compared with the old ones."""
        self.worker = next(iter(self.pool.ready(self.generation.number)), None)
        self.old_before = {child.serial: (child.requests, child.errors) for child in self._old_workers()}

    def _old(self) -> Count:
        """What the old workers have done in the same window."""
        requests = errors = 0
        for child in self._old_workers():
            requests_before, errors_before = self.old_before.get(child.serial, (0, 0))
            requests += child.requests - requests_before
            errors += child.errors - errors_before
        return Count(requests, errors)

    def _old_workers(self) -> list[Child]:
        return self.pool.ready(self.pool.wanted.generation)
