"""No sequence of events takes a reload, or a pool, to where it must not come, or to where it never comes away from.

Driven for real: roster, services, pools, generations, reload. Not there: processes and time (``machine.py``).
"""

import selectors
from math import inf

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from preforkd import log
from preforkd.notify import Manager
from preforkd.plan import State
from preforkd.reload import Reload
from preforkd.roster import Roster
from preforkd.service import Service
from preforkd.settings import Service as Wanted
from preforkd.settings import Settings
from preforkd.sources import Checked, Faults
from preforkd.transaction import ENDS, Phase
from preforkd_workers.protocol import READY
from preforkd_workers.scoreboard import Scoreboard
from tests.machine import Machine, Worker

WANTED = st.builds(
    lambda size, spare, budget, probation, graceful: Wanted(
        target="app:Handler",
        max_children=size,
        max_spare=min(spare, size),
        max_surge=budget[0],
        max_unavailable=budget[1],
        probation=probation,
        boot_timeout=30.0,
        graceful_timeout=graceful,
    ),
    st.integers(1, 5),
    st.sampled_from([0, 0, 1, 3]),
    st.sampled_from([(1, 0), (0, 1), (2, 1), (3, 0), (0, 9)]),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from([1.0, 30.0]),
)


def checked(**services: Wanted) -> Checked:
    return Checked(Settings(name="test", services=services), {name: [] for name in services})


def live(service: Service, *states: State) -> int:
    return sum(child.state in states for child in service.pool.children.values())


class Reloads(RuleBasedStateMachine):
    """The master's ``service_actions`` in small, and everything that may happen between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(log, "_write", lambda _: None)
        board = Scoreboard.private("test")
        self.machine = Machine(self.patches, board)
        self.selector = selectors.DefaultSelector()
        self.board = board
        self.reload: Reload | None = None
        self.wanted_next: Checked | None = None
        self.is_stopping = False
        self.serving: dict[str, int] = {}

    @initialize(first=WANTED)
    def start(self, first: Wanted) -> None:
        """As ``serve.py`` does."""
        now = checked(a=first)
        self.roster = Roster(now, self.board, self.selector, Manager({}, 0))
        change = self.roster.examine(now)
        for service in self.roster.load(change):
            service.roll(3)
        self.roster.commit(change)
        self.settle()
        self.let_all_succeed()

    # The master.

    def settle(self) -> None:
        """Reap, settle, take the reload on: in the order in which the master does it."""
        self.hear()
        self.settle_roster()
        for service in self.roster:
            if service.current is not None:
                service.current.failure = None  # as ``report_failures`` does
        if self.reload is None and self.wanted_next is not None and not self.is_stopping:
            wanted, self.wanted_next = self.wanted_next, None
            self.begin(wanted)
        if self.reload is not None:
            self.reload.settle()
            if self.reload.phase in ENDS:
                self.end(self.reload)
            self.settle_roster()

    def begin(self, wanted: Checked) -> None:
        self.serving = {name: each.current.number for name, each in self.roster.services.items() if each.current}
        self.reload = Reload(self.roster, lambda: wanted)
        self.settle_roster()

    def end(self, reload: Reload) -> None:
        """What every verdict promises."""
        current = {name: each.current.number for name, each in self.roster.services.items() if each.current}
        if reload.phase is Phase.DONE:
            assert reload.change is not None
            assert current == dict.fromkeys(reload.change.checked.settings.services, self.roster.generation)
            assert all(each.pool.is_full for each in self.roster.services.values())
            assert not any(each.current.molds_lost for each in self.roster.services.values() if each.current)
        elif reload.phase is not Phase.ABANDONED:
            assert reload.reason
            assert current == self.serving
        for service in self.roster.services.values():
            assert (service.next, service.trial) == (None, None)
            assert service.current is None or service.pool.timeouts == service.current.timeouts
            assert self.is_stopping or service.pool.wanted.generation == current[service.name]
            assert service.current is None or service.breathing.bounds == service.current.bounds
            assert service.pool.size == (0 if service.is_drained else service.breathing.breath.size)
            assert service.pool.wanted.trial is None or self.is_stopping
        self.reload = None

    def hear(self) -> None:
        """What the selector and SIGCHLD would tell."""
        for service in self.roster:
            service.hear_molds()
        for key, _ in self.selector.select(0):
            key.data()
        for process in self.machine.dead:
            assert any(service.reap(process.pid) for service in self.roster) or isinstance(process, Worker)
            if process.pid in self.machine.processes and isinstance(process, Worker):
                del self.machine.processes[process.pid]  # a stranger: forked, and never told of

    def settle_roster(self) -> None:
        """Settle, and see to it that the master itself neither takes too many away nor adds too many."""
        before = {
            service: (live(service, State.READY), live(service, State.READY, State.BOOTING)) for service in self.roster
        }
        self.roster.settle()
        for service, (ready, there) in before.items():
            wanted = service.pool.wanted
            assert live(service, State.READY) >= min(ready, wanted.size - wanted.max_unavailable)
            most = wanted.size + wanted.max_surge if wanted.size else 0
            assert live(service, State.READY, State.BOOTING) <= max(there, most)

    # What may happen. Whoever is drawn by number is one of those who are there.

    @rule(which=st.integers(0, 9), comes_to=st.sampled_from(["ready", "fails", "dies"]))
    def a_mold(self, which: int, comes_to: str) -> None:
        molds = self.machine.molds
        if not molds:
            return
        mold = molds[which % len(molds)]
        if comes_to == "dies":
            self.machine.die(mold, -9)
        elif not mold.ready:
            mold.become_ready() if comes_to == "ready" else mold.fail()
        self.settle()

    @rule()
    def all_is_well_for_a_moment(self) -> None:
        for mold in self.machine.molds:
            if not mold.ready:
                mold.become_ready()
        self.settle()
        for worker in self.machine.workers:
            if not worker.is_ready:
                self.boot(worker)
        self.settle()

    @rule(number=st.integers(1, 9))
    def workers_boot(self, number: int) -> None:
        for worker in [each for each in self.machine.workers if not each.is_ready][:number]:
            self.boot(worker)
        self.settle()

    @rule(which=st.integers(0, 99), status=st.sampled_from([1, -9, -11]))
    def a_worker_dies(self, which: int, status: int) -> None:
        if workers := self.machine.workers[::-1]:  # the newest first: that is where it matters
            self.machine.die(workers[which % len(workers)], status)
            self.settle()

    @rule(number=st.integers(1, 9))
    def workers_leave_as_told(self, number: int) -> None:
        for worker in [each for each in self.machine.workers if each.is_told_to_leave][:number]:
            self.machine.die(worker, 0)
        self.settle()

    @rule(which=st.integers(0, 99), requests=st.integers(1, 60), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    def a_worker_serves(self, which: int, requests: int, share: float) -> None:
        if workers := [each for each in self.machine.workers[::-1] if each.is_ready]:
            workers[which % len(workers)].serve(requests, int(requests * share))
            self.settle()

    @rule(which=st.integers(0, 99))
    def a_worker_is_worn(self, which: int) -> None:
        children = [child for service in self.roster for child in service.pool.children.values()]
        if ready := [child for child in children if child.state is State.READY]:
            ready[which % len(ready)].worn = "max_requests"
            self.settle()

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.machine.now += seconds
        self.settle()

    @rule(luck=st.integers(0, 3))
    def time_passes_to_the_next_deadline(self, luck: int) -> None:
        if self.wake_at() < inf and not luck:
            self.machine.now = max(self.machine.now, self.wake_at())
            self.settle()

    @rule(luck=st.integers(0, 3))
    def the_system_forks_or_does_not(self, luck: int) -> None:
        self.machine.cannot_fork = not luck

    @precondition(lambda self: not self.is_stopping)
    @rule(by=st.sampled_from([-1, 1]))
    def an_operator_scales(self, by: int) -> None:
        for service in self.roster.targets:
            service.scale(by=by)
        self.settle()

    @precondition(lambda self: not self.is_stopping)
    @rule()
    def an_operator_drains_or_refills(self) -> None:
        is_drained = any(service.is_drained for service in self.roster.targets)
        for service in self.roster.targets:
            service.breathing.refill() if is_drained else service.breathing.drain()
        self.settle()

    @precondition(lambda self: not self.is_stopping)
    @rule(a=WANTED, b=st.none() | WANTED)
    def an_operator_reloads(self, a: Wanted, b: Wanted | None) -> None:
        self.wanted_next = checked(a=a) if b is None else checked(a=a, b=b)
        self.settle()

    @precondition(lambda self: not self.is_stopping and self.reload is None)
    @rule()
    def an_operator_reloads_rubbish(self) -> None:
        def read() -> Checked:
            raise Faults(["services.a.target: required"])

        before = self.board.daemon[:].tolist(), self.roster.generation
        assert Reload(self.roster, read).phase is Phase.REFUSED
        assert (self.board.daemon[:].tolist(), self.roster.generation) == before

    @precondition(lambda self: not self.is_stopping)
    @rule(luck=st.integers(0, 9))
    def an_operator_stops(self, luck: int) -> None:
        if luck:  # once in a while: nothing else happens afterwards
            return
        self.stop()
        self.settle()

    def stop(self) -> None:
        """As the master does."""
        self.is_stopping = True
        if self.reload is not None:
            self.reload.stop()
            assert self.reload.phase is Phase.ABANDONED
            self.reload = None
        for service in self.roster:
            service.stop()

    # What holds always.

    @invariant()
    def nobody_is_forgotten(self) -> None:
        if not hasattr(self, "roster"):
            return
        known = {child.pid for service in self.roster for child in service.pool.children.values()}
        untold = {int(rest.split()[1]) for mold in self.machine.molds for _, rest in mold.outbox if rest[:1].isdigit()}
        assert {worker.pid for worker in self.machine.workers if worker.is_ready} <= known | untold

    def wake_at(self) -> float:
        times = [service.wake_at() for service in self.roster]
        return min([*times, self.reload.wake_at() if self.reload else inf])

    # The way out.

    def boot(self, worker: Worker) -> None:
        if worker.is_cut:  # told to leave, or given up, before it began
            return self.machine.die(worker, 0)
        worker.is_ready = True
        return worker.say(f"{READY} {worker.pid}")

    def let_all_succeed(self) -> None:
        """From now on everything succeeds: then the reload ends, and every pool is full in one generation."""
        self.machine.cannot_fork = False
        for _ in range(400):
            for mold in self.machine.molds:
                if mold.has_hung_up:
                    self.machine.die(mold, 0)
                elif not mold.ready:
                    mold.become_ready()
            for worker in self.machine.workers:
                if not worker.is_ready:
                    self.boot(worker)
                elif worker.is_told_to_leave:
                    self.machine.die(worker, 0)
            self.settle()
            if self.is_at_rest():
                return
            if not self.machine.dead and all(each.is_ready for each in self.machine.workers):
                self.machine.now = max(self.machine.now, min(self.wake_at(), self.machine.now + 60))
        raise AssertionError(f"no rest: {self.reload and self.reload.phase}, {[*self.roster]}")

    def is_at_rest(self) -> bool:
        if self.is_stopping:
            return all(service.is_gone for service in self.roster) and not self.machine.processes
        molds = len(self.machine.molds) == len(self.roster.services)
        full = all(service.pool.is_full for service in self.roster.services.values())
        nobody_else = sum(service.pool.size for service in self.roster) == len(self.machine.workers)
        is_quiet = self.reload is None and self.wanted_next is None and not self.machine.dead
        return is_quiet and molds and full and nobody_else

    def teardown(self) -> None:
        try:
            if hasattr(self, "roster"):
                self.let_all_succeed()
                assert self.is_stopping or not self.roster.leaving
                self.stop()
                self.let_all_succeed()
                assert len(self.selector.get_map()) == 0
        finally:
            self.patches.undo()
            self.selector.close()
            for service in self.roster if hasattr(self, "roster") else ():
                for child in service.pool.children.values():
                    child.close()
            self.machine.close()


def test_no_sequence_of_events_breaks_a_promise_or_leads_to_where_there_is_no_way_out() -> None:
    run_state_machine_as_test(
        Reloads,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
