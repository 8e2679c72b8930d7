"""The rules of a pool, as values: a fake clock, children that are records, and steps that are read."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preforkd.plan import (
    BURST,
    FRUITLESS_AGE,
    KILL_TIMEOUT,
    LONGEST_PAUSE,
    Child,
    EndOfFile,
    Haste,
    Kill,
    Retire,
    Spawn,
    State,
    Step,
    Timeouts,
    Wanted,
    is_failed_start,
    pause,
    plan,
    wake_at,
)

TIMEOUTS = Timeouts(boot=20.0, graceful=30.0, eof=5.0)


@dataclass(eq=False)
class Record:
    """A child without a process."""

    slot: int
    state: State
    since: float = 100.0
    busy: bool = False


def steps(now: float, wanted: Wanted, *children: Record, not_before: dict[int, float] | None = None) -> list[Step]:
    return list(plan(now, wanted, children, TIMEOUTS, not_before or {}))


Made = Callable[[Record], Step]

RULES: list[tuple[State, bool, Haste, float, Made]] = [
    # state, busy, haste, patience in seconds, and what follows
    (State.BOOTING, False, Haste.NONE, 20, lambda c: Kill(c, "boot")),
    (State.DRAINING, True, Haste.NONE, 30, EndOfFile),
    (State.DRAINING, False, Haste.NONE, 30, EndOfFile),
    (State.DRAINING, True, Haste.END_OF_FILE, 0, EndOfFile),
    (State.DRAINING, True, Haste.KILL, 0, lambda c: Kill(c, "operator")),
    (State.DRAINING, False, Haste.KILL, KILL_TIMEOUT, lambda c: Kill(c, "operator")),
    (State.HALF_CLOSED, True, Haste.NONE, 5, lambda c: Kill(c, "deadline")),
    (State.HALF_CLOSED, False, Haste.END_OF_FILE, 5, lambda c: Kill(c, "deadline")),
    (State.HALF_CLOSED, True, Haste.KILL, 0, lambda c: Kill(c, "operator")),
    (State.HALF_CLOSED, False, Haste.KILL, KILL_TIMEOUT, lambda c: Kill(c, "operator")),
    (State.KILLED, True, Haste.NONE, KILL_TIMEOUT, lambda c: Kill(c, "deadline")),
    (State.KILLED, True, Haste.END_OF_FILE, KILL_TIMEOUT, lambda c: Kill(c, "deadline")),
    (State.KILLED, False, Haste.KILL, KILL_TIMEOUT, lambda c: Kill(c, "operator")),
]


@pytest.mark.parametrize(("state", "busy", "haste", "patience", "made"), RULES)
def test_every_state_but_ready_is_pushed_on_at_its_deadline_and_not_before(
    state: State, busy: bool, haste: Haste, patience: float, made: Made
) -> None:
    child = Record(0, state, busy=busy)
    wanted = Wanted(1, haste=haste)
    assert wake_at(wanted, [child], TIMEOUTS, {}) == 100 + patience
    if patience:
        assert steps(100 + patience - 0.001, wanted, child) == []
    assert steps(100 + patience, wanted, child) == [made(child)]


@pytest.mark.parametrize("haste", Haste)
@pytest.mark.parametrize("busy", [True, False])
def test_a_ready_child_that_is_wanted_is_left_alone_for_ever(haste: Haste, busy: bool) -> None:
    child = Record(0, State.READY, busy=busy)
    assert steps(1e9, Wanted(1, haste=haste), child) == []
    assert wake_at(Wanted(1, haste=haste), [child], TIMEOUTS, {}) == inf


@pytest.mark.parametrize("state", [State.READY, State.BOOTING])
def test_a_child_beyond_the_size_is_retired_even_when_its_boot_is_overdue(state: State) -> None:
    child, wanted_one = Record(1, state), Record(0, State.READY)
    assert steps(1e6, Wanted(1), wanted_one, child) == [Retire(child)]


def test_a_leaving_child_is_not_retired_twice_and_keeps_its_slot() -> None:
    assert steps(100.5, Wanted(0), Record(0, State.DRAINING), Record(1, State.KILLED)) == []
    assert steps(101, Wanted(2), Record(0, State.DRAINING)) == [Spawn(1)]


def test_vacant_slots_are_filled_from_the_lowest() -> None:
    assert steps(0, Wanted(4), Record(1, State.READY)) == [Spawn(0), Spawn(2), Spawn(3)]


def test_nothing_is_forked_when_there_is_nothing_to_fork_from() -> None:
    assert steps(0, Wanted(2, can_spawn=False)) == []
    assert wake_at(Wanted(2, can_spawn=False), [], TIMEOUTS, {0: 5.0}) == inf


def test_at_most_a_burst_boots_at_a_time() -> None:
    booting = [Record(slot, State.BOOTING) for slot in range(BURST - 2)]
    assert steps(100, Wanted(100), *booting) == [Spawn(BURST - 2), Spawn(BURST - 1)]
    assert steps(100, Wanted(100), *booting, Record(98, State.BOOTING), Record(99, State.BOOTING)) == []
    assert len(steps(100, Wanted(100), *(Record(slot, State.READY) for slot in range(BURST)))) == BURST


def test_while_a_burst_boots_the_clock_has_nothing_to_say_for_a_slot_that_is_due() -> None:
    booting = [Record(slot, State.BOOTING) for slot in range(BURST)]
    assert wake_at(Wanted(100), booting, TIMEOUTS, {99: 10.0}) == 100 + TIMEOUTS.boot


def test_a_slot_that_holds_back_waits_and_does_not_keep_others_waiting() -> None:
    assert steps(9.9, Wanted(2), not_before={0: 10.0}) == [Spawn(1)]
    assert steps(10.0, Wanted(2), Record(1, State.READY), not_before={0: 10.0}) == [Spawn(0)]
    assert wake_at(Wanted(2), [Record(1, State.READY)], TIMEOUTS, {0: 10.0, 7: 1.0}) == 10.0


def test_the_pause_grows_from_nothing_to_its_longest() -> None:
    pauses = [pause(failed) for failed in range(100)]
    assert pauses[:5] == [0.0, 0.0, 0.5, 1.25, 2.375]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE == 30.0
    assert pause(10**9) == LONGEST_PAUSE


@pytest.mark.parametrize(
    ("age", "ended", "failed"),
    [(0.0, 0, True), (FRUITLESS_AGE - 0.1, 0, True), (FRUITLESS_AGE, 0, False), (0.0, 1, False)],
)
def test_a_start_has_failed_when_it_was_short_and_fruitless(age: float, ended: int, failed: bool) -> None:
    assert is_failed_start(age, ended) is failed


# What holds for every pool there can be.

TIMES = st.floats(0, 200)
WANTED = st.builds(Wanted, st.integers(0, 50), st.booleans(), st.sampled_from(Haste))
NOT_BEFORE = st.dictionaries(st.integers(0, 50), TIMES, max_size=5)
CHILDREN = st.lists(
    st.builds(Record, st.integers(0, 60), st.sampled_from(State), TIMES, st.booleans()),
    max_size=60,
    unique_by=lambda child: child.slot,
)


def child_of(step: Step) -> Child | None:
    return None if isinstance(step, Spawn) else step.child


@given(TIMES, WANTED, CHILDREN, NOT_BEFORE)
def test_no_plan_has_two_steps_for_one_child_or_fills_a_slot_that_is_taken_or_not_wanted(
    now: float, wanted: Wanted, children: list[Record], not_before: dict[int, float]
) -> None:
    found = list(plan(now, wanted, children, TIMEOUTS, not_before))
    pushed = [id(child) for step in found if (child := child_of(step))]
    spawned = [step.slot for step in found if isinstance(step, Spawn)]
    assert len(set(pushed)) == len(pushed)
    assert len(set(spawned)) == len(spawned)
    assert not set(spawned) & {child.slot for child in children}
    assert all(slot < wanted.size and now >= not_before.get(slot, now) for slot in spawned)
    booting = sum(child.state is State.BOOTING for child in children)
    assert not spawned or (wanted.can_spawn and booting + len(spawned) <= BURST)


@given(TIMES, WANTED, CHILDREN, NOT_BEFORE)
def test_there_is_something_to_do_at_the_time_to_wake_unless_that_is_never(
    now: float, wanted: Wanted, children: list[Record], not_before: dict[int, float]
) -> None:
    wake = wake_at(wanted, children, TIMEOUTS, not_before)
    if wake < inf:
        assert list(plan(wake, wanted, children, TIMEOUTS, not_before))
    if now < wake:  # whatever there is to do before, there is to do at once
        at_once = list(plan(now, wanted, children, TIMEOUTS, not_before))
        assert all(isinstance(step, Retire | Spawn) for step in at_once)
        assert list(plan(min(wake - 1e-9, 1e6), wanted, children, TIMEOUTS, not_before)) == at_once


def take(step: Step, now: float, pool: dict[int, Record], random: Random) -> None:
    """Do what the step says to a pool of records; some children obey, some are stuck."""
    match step:
        case Spawn(slot):
            pool[slot] = Record(slot, State.BOOTING, now, random.random() < 0.5)
        case Retire(Record() as child):
            child.state, child.since = State.DRAINING, now
        case EndOfFile(Record() as child):
            child.state, child.since = State.HALF_CLOSED, now
        case Kill(Record() as child) if child.state is State.KILLED:
            del pool[child.slot]
        case Kill(Record() as child):
            child.state, child.since = State.KILLED, now


@given(st.integers(0, 50), st.sampled_from(Haste), CHILDREN, NOT_BEFORE, st.randoms(use_true_random=False))
def test_whatever_the_children_do_the_pool_becomes_what_is_wanted(
    size: int, haste: Haste, children: list[Record], not_before: dict[int, float], random: Random
) -> None:
    pool = {child.slot: child for child in children}
    wanted = Wanted(size, haste=haste)
    now, end = 200.0, 200.0 + 60 * (TIMEOUTS.boot + TIMEOUTS.graceful + TIMEOUTS.eof + 2 * KILL_TIMEOUT)
    while sorted(pool) != list(range(size)) or any(child.state is not State.READY for child in pool.values()):
        for step in plan(now, wanted, [*pool.values()], TIMEOUTS, not_before):
            take(step, now, pool, random)
        for child in list(pool.values()):
            if child.state is State.BOOTING and random.random() < 0.7:
                child.state = State.READY
            elif child.state in (State.DRAINING, State.HALF_CLOSED) and random.random() < 0.3:
                del pool[child.slot]
        wake = wake_at(wanted, [*pool.values()], TIMEOUTS, not_before)
        now = max(now, min(wake, now + 1))
        assert now < end, (wanted, pool)
