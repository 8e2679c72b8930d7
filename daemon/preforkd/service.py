"""The master's record of a service: a pool, the generation that serves, and the next one while there is a reload."""

import selectors
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from msgspec.structs import replace

from preforkd import log, settings
from preforkd.backlog import sample
from preforkd.breathing import Breathing
from preforkd.door import TurnedAway
from preforkd.generations import Generation, Host, spec_of
from preforkd.listeners import Bound
from preforkd.plan import State, Timeouts, Wanted
from preforkd.pool import Pool
from preforkd.sizing import Bounds
from preforkd.transaction import Count, Event, Probation, judge, judge_roll
from preforkd_workers.protocol import LOOK
from preforkd_workers.scoreboard import BACKLOG, BACKLOG_LIMIT, CAPACITY, DROPS, ENDS, HELD_BACK, Scoreboard


class Service:
    """One service. Its pool outlives its generations."""

    def __init__(
        self, name: str, board: Scoreboard, selector: selectors.BaseSelector, host: Host | None = None
    ) -> None:
        self.name = name
        self.host = host
        self.scoreboard = board
        self.board = board.add(name)
        self.selector = selector
        self.generations: dict[int, Generation] = {}  # the current, the next, and those whose molds are leaving
        self.current: Generation | None = None
        self.next: Generation | None = None
        self.pool = Pool(name, selector, self.board, self.generations, Wanted(0, generation=0), Timeouts())
        self.breathing = Breathing(self.pool)
        self.turned_away = TurnedAway(name, self.board)
        self.wanted_before = self.pool.wanted
        self.trial: Trial | None = None
        self.block_on_close = True

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
        if self.current is not None and wanted.max_children == self.current.settings.max_children:
            self.next.scaled_to = self.current.scaled_to  # or else the settings have the last word
        self.wanted_before = self.pool.wanted
        self.list_listeners()

    def restore(self, number: int, wanted: settings.Service, listeners: Sequence[Bound]) -> Generation:
        """Have the record of a generation, with a mold or without."""
        spec = spec_of(self.name, number, wanted, listeners, self.scoreboard)
        generation = Generation(number, wanted, listeners, spec, self.pool, self.selector, self.host)
        self.generations[number] = generation
        return generation

    def has_loaded(self) -> Event | None:
        """Whether the mold of the next generation is ready, or has failed."""
        return Event.FAILED if self.newest.has_failed else Event.SUCCEEDED if self.newest.ready else None

    def try_out(self) -> None:
        """Have one worker of the next generation serve, beside those of the current one if there is one."""
        number, wanted = self.newest.number, self.newest.settings
        self.trial = Trial(self.newest, self.current, self.pool, has_passed=self.is_drained or not wanted.probation)
        if self.trial.has_passed:
            return
        if self.current is None:
            self.pool.timeouts = self.newest.timeouts
            self.pool.want(Wanted(0, number))
            self.breathing.begin(Bounds(1))
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
        wanted = self.newest.settings
        self.pool.timeouts = self.newest.timeouts
        self._tell_who_ends(stays=self.newest.listeners)
        self.pool.want(
            replace(
                self.pool.wanted,
                generation=self.newest.number,
                spare=wanted.spare_workers,
                trial=None,
                max_surge=wanted.max_surge,
                max_unavailable=wanted.max_unavailable,
                hurried=self._hurried(self.current, max_old_generations),
            )
        )
        if self.current is None:
            self.breathing.begin(self.newest.bounds)
        else:
            self.breathing.limit(self.newest.bounds)

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
        now, hurried = self.pool.wanted, self._hurried(failed, max_old_generations)
        self.pool.timeouts = self.current.timeouts
        self.pool.want(replace(self.wanted_before, haste=now.haste, hurried=hurried))
        self.breathing.limit(self.current.bounds)
        self.list_listeners()
        return None

    def has_rolled_back(self) -> bool:
        """Whether the old generation is whole again, or cannot be for now: its mold is gone, and none starts again."""
        return self.pool.is_full or bool(self.current and self.current.held_back.failed_starts)

    def commit(self) -> None:
        """The next generation is the current one from now on."""
        if self.current is not None:
            self.current.let_go()
        self.current, self.next, self.trial = self.newest, None, None
        self.block_on_close = self.current.settings.block_on_close
        self.list_listeners()

    def _hurried(self, outdated: Generation | None, most: int) -> frozenset[int]:
        """The generations that have been leaving for longest, as this one begins to leave and only so many may."""
        others = {each.number for each in (self.current, outdated) if each}
        leaving = [number for number in self.pool.draining() if number not in others]
        return frozenset(leaving[: max(0, len(leaving) + (outdated is not None) - most)])

    # What an operator says of the size.

    @property
    def is_drained(self) -> bool:
        """Whether no workers are wanted for the time being."""
        return self.breathing.is_drained

    def scale(self, to: int | None = None, by: int = 0) -> None:
        """Move the limit of the pool: to so many workers, or by so many. A reload under way keeps that, either way."""
        for generation in [each for each in (self.current, self.next) if each is not None]:
            before = generation.bounds.most
            wanted = before + by if to is None else to
            generation.scaled_to = max(1, min(wanted, settings.MOST_CHILDREN))
            if generation.number == self.pool.wanted.generation:
                log.event("resized", service=self.name, workers=generation.scaled_to, before=before)
                self.breathing.limit(generation.bounds)

    # What is to be done now.

    def settle(self) -> None:
        """Settle the molds and the pool; forget the generations that are gone."""
        for generation in [*self.generations.values()]:
            generation.settle()
            if generation.is_gone:
                del self.generations[generation.number]
        self.breathing.settle()
        self.board.words[CAPACITY] = self.capacity
        self.pool.settle()

    @property
    def capacity(self) -> int:
        """How many requests the service may hold at a time; 0 when that is for nobody to say."""
        lanes = [each.settings.lanes for each in (self.current, self.next) if each is not None]
        return self.breathing.bounds.most * max(lanes, default=0)

    def wake_at(self) -> float:
        times = [generation.wake_at() for generation in self.generations.values()]
        times.append(self.breathing.wake_at())
        return min(self.pool.wake_at(), self.trial.wake_at() if self.trial else float("inf"), *times)

    def stop(self) -> None:
        """Want no workers any more, and so no molds."""
        self._tell_who_ends(stays=())
        self.breathing.stop()
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

    def look_after_log(self) -> None:
        """Have molds and workers follow the log's file."""
        for generation in self.generations.values():
            if generation.mold is not None:
                generation.mold.kill(LOOK)
        self.pool.have_all_look()

    # What the master shows.

    def beat(self) -> None:
        """Show what is seen now and then, whatever is wanted."""
        self.sample_listeners()
        self.board.words[HELD_BACK] = self.pool.count_held_back()
        if any(generation.limits.has_door for generation in self.generations.values()):
            self.turned_away.tell()

    def sample_listeners(self) -> None:
        """Write what waits at each listener to the scoreboard."""
        words = self.board.listeners()
        for each in self.listeners:
            with suppress(OSError):  # a kernel that does not tell leaves zeros
                found = words[each.listener.url]
                found[BACKLOG], found[BACKLOG_LIMIT], found[DROPS] = sample(each.listener.socket)

    def list_listeners(self) -> None:
        self.scoreboard.list_listeners(self.name, [bound.listener.url for bound in self.listeners])
        self._tell_who_ends(stays=self.listeners)

    def _tell_who_ends(self, stays: Sequence[Bound]) -> None:
        """Have the lanes know which listeners they are the last to serve."""
        urls = {bound.listener.url for bound in stays}
        for url, words in self.board.listeners().items():
            words[ENDS] = url not in urls

    def dump(self) -> None:
        """Write the state of every lane, and all stacks, to the log."""
        for each in self.generations.values():
            log.event("mold", service=self.name, gen=each.number, pid=each.mold and each.mold.pid, ready=each.ready)
        log.event("service", service=self.name, workers=self.pool.size, gen=self.pool.wanted.generation)
        self.pool.dump()


class Trial:
    """The probation of one worker of a new generation, beside the old ones: of one after the other, if they are soon
    worn."""

    def __init__(self, generation: Generation, old: Generation | None, pool: Pool, has_passed: bool) -> None:
        wanted = generation.settings
        self.rules = Probation(wanted.probation, wanted.probation_requests, wanted.probation_max_error_ratio)
        self.generation, self.old = generation, old
        self.pool = pool
        self.since: float | None = None  # when the first worker was ready
        self.old_before = Count()
        self.has_passed = has_passed

    def verdict(self) -> Event | None:
        """What it has come to by now; None: it goes on."""
        if self.generation.has_failed or self.generation.crashes:
            return Event.FAILED
        if self.since is None:
            self._begin()
        if self.since is not None and not self.has_passed:
            new = self.generation.count()
            event = judge(monotonic() - self.since, self.rules, new, self._old())
            if event is Event.FAILED:
                self.generation.failure = f"on probation {new.errors} of {new.requests} requests have raised"
                return event
            self.has_passed = event is Event.SUCCEEDED
        return Event.SUCCEEDED if self.has_passed else None

    def wake_at(self) -> float:
        if self.since is None or self.has_passed:
            return float("inf")
        return self.since + self.rules.seconds

    def _begin(self) -> None:
        """Once a worker is ready, the window opens in which it is compared with the old ones."""
        worker = next(iter(self.pool.ready(self.generation.number)), None)
        if worker is not None:
            self.since, self.old_before = worker.since, self.old.count() if self.old else Count()

    def _old(self) -> Count:
        """What the old workers have done in the same window."""
        now = self.old.count() if self.old else Count()
        return Count(now.requests - self.old_before.requests, now.errors - self.old_before.errors)
