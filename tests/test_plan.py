"""The rules of a pool, as values: a fake clock, children that are records, and steps that are read."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preforkd.holdback import LONGEST_PAUSE, pause
from preforkd.plan import (
    BURST,
    FRUITLESS_AGE,
    KILL_TIMEOUT,
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
    generation: int = 1
    worn: str | None = None
    retires_first: bool = False


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
    wanted = Wanted(1 if state is State.BOOTING else 0, haste=haste)
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


def test_a_leaving_child_is_not_retired_twice_and_its_place_is_filled_but_not_its_slot() -> None:
    assert steps(100.5, Wanted(0), Record(0, State.DRAINING), Record(1, State.KILLED)) == []
    assert steps(101, Wanted(2), Record(0, State.DRAINING)) == [Spawn(1, 1), Spawn(2, 1)]


def test_vacant_slots_are_filled_from_the_lowest() -> None:
    assert steps(0, Wanted(4), Record(1, State.READY)) == [Spawn(0, 1), Spawn(2, 1), Spawn(3, 1)]


def test_nothing_is_forked_when_there_is_nothing_to_fork_from() -> None:
    assert steps(0, Wanted(2, can_spawn=frozenset())) == []
    assert wake_at(Wanted(2, can_spawn=frozenset()), [], TIMEOUTS, {0: 5.0}) == inf


def test_at_most_a_burst_boots_at_a_time() -> None:
    booting = [Record(slot, State.BOOTING) for slot in range(BURST - 2)]
    assert steps(100, Wanted(100), *booting) == [Spawn(BURST - 2, 1), Spawn(BURST - 1, 1)]
    assert steps(100, Wanted(100), *booting, Record(98, State.BOOTING), Record(99, State.BOOTING)) == []
    assert len(steps(100, Wanted(100), *(Record(slot, State.READY) for slot in range(BURST)))) == BURST


def test_while_a_burst_boots_the_clock_has_nothing_to_say_for_a_slot_that_is_due() -> None:
    booting = [Record(slot, State.BOOTING) for slot in range(BURST)]
    assert wake_at(Wanted(100), booting, TIMEOUTS, {99: 10.0}) == 100 + TIMEOUTS.boot


def test_a_slot_that_holds_back_waits_and_does_not_keep_others_waiting() -> None:
    assert steps(9.9, Wanted(2), not_before={0: 10.0}) == [Spawn(1, 1)]
    assert steps(10.0, Wanted(2), Record(1, State.READY), not_before={0: 10.0}) == [Spawn(0, 1)]
    assert wake_at(Wanted(2), [Record(1, State.READY)], TIMEOUTS, {0: 10.0}) == 10.0
    assert steps(5.0, Wanted(3), Record(1, State.READY), not_before={0: 10.0, 7: 1.0}) == [Spawn(2, 1)]


def test_of_several_slots_that_hold_back_as_many_are_filled_as_are_missing() -> None:
    ready, holds = Record(1, State.READY), {0: 10.0, 2: 20.0, 3: 30.0}
    assert wake_at(Wanted(3), [ready], TIMEOUTS, holds) == 20.0
    assert steps(19.9, Wanted(3), ready, not_before=holds) == []
    assert steps(20.0, Wanted(3), ready, not_before=holds) == [Spawn(0, 1)]


# Two generations: replacing one by the other.


def rolled(wanted: Wanted, *children: Record) -> tuple[int, list[int], list[int]]:
    """Take all steps, with every new worker ready at once and every old one gone, until there are none.

    Returns the number of turns, and how many were ready and how many were there after each.
    """
    pool = {child.slot: child for child in children}
    turns, ready, there = 0, [], []
    while found := steps(100.0, wanted, *pool.values()):
        for step in found:
            take(step, 100.0, pool, Random(0))
        live = [child for child in pool.values() if child.state in (State.BOOTING, State.READY)]
        there.append(len(live))
        ready.append(sum(child.state is State.READY for child in live))
        for child in [*pool.values()]:
            if child.state is State.BOOTING:
                child.state = State.READY
            elif child.state is State.DRAINING:
                del pool[child.slot]
        turns += 1
    assert [child.generation for child in pool.values()] == [wanted.generation] * wanted.size
    return turns, ready, there


@pytest.mark.parametrize(
    ("surge", "unavailable", "turns"), [(1, 0, 5), (0, 1, 4), (2, 0, 3), (1, 1, 3), (4, 0, 2), (0, 4, 1), (9, 9, 1)]
)
def test_a_pool_comes_to_another_generation_within_its_budget(surge: int, unavailable: int, turns: int) -> None:
    old = [Record(slot, State.READY) for slot in range(4)]
    can = frozenset({1, 2})
    wanted = Wanted(4, generation=2, max_surge=surge, max_unavailable=unavailable, can_spawn=can)
    taken, ready, there = rolled(wanted, *old)
    assert taken == turns
    assert min(ready) >= 4 - unavailable
    assert max(there) <= 4 + surge


def test_a_new_worker_is_ready_before_an_old_one_is_told_to_leave() -> None:
    wanted = Wanted(2, generation=2, can_spawn=frozenset({1, 2}))
    old = [Record(0, State.READY), Record(1, State.READY)]
    assert steps(100, wanted, *old) == [Spawn(2, 2)]
    assert steps(100, wanted, *old, Record(2, State.BOOTING, generation=2)) == []
    assert steps(100, wanted, *old, Record(2, State.READY, generation=2)) == [Retire(old[1]), Spawn(3, 2)]


def test_an_old_worker_that_is_still_booting_leaves_at_once() -> None:
    booting = Record(0, State.BOOTING)
    wanted = Wanted(1, generation=2, can_spawn=frozenset({2}))
    assert steps(100, wanted, booting) == [Retire(booting), Spawn(1, 2)]


@pytest.mark.parametrize("surge", [0, 1])
def test_one_worker_is_tried_beside_the_others_or_in_the_place_of_one(surge: int) -> None:
    old = [Record(0, State.READY), Record(1, State.READY)]
    can = frozenset({1, 2})
    wanted = Wanted(2, trial=2, max_surge=surge, max_unavailable=1 - surge, can_spawn=can)
    assert steps(100, wanted, *old) == [*([] if surge else [Retire(old[1])]), Spawn(2, 2)]
    there = [*old[: 1 + surge], Record(2, State.READY, generation=2)]
    assert steps(100, wanted, *there) == []
    assert steps(100, wanted, there[0], there[-1]) == ([Spawn(1, 1)] if surge else []), (
        "an old one that died is replaced"
    )
    back = Wanted(2, max_surge=surge, max_unavailable=1 - surge, can_spawn=can)
    assert rolled(back, *there)[0] <= 2


def test_nobody_is_tried_in_a_pool_of_none() -> None:
    assert steps(100, Wanted(0, trial=2, can_spawn=frozenset({1, 2}))) == []


def test_old_workers_stay_while_there_is_nothing_to_replace_them_from() -> None:
    assert steps(100, Wanted(1, generation=2, can_spawn=frozenset({1})), Record(0, State.READY)) == []


def test_a_generation_that_leaves_for_too_long_is_hurried_and_no_other() -> None:
    oldest, newer = Record(0, State.DRAINING, generation=1), Record(1, State.DRAINING, generation=2)
    wanted = Wanted(0, generation=3, hurried=frozenset({1}))
    assert steps(100, wanted, oldest, newer) == [EndOfFile(oldest)]
    oldest.state = State.HALF_CLOSED
    assert steps(105, wanted, oldest, newer) == [Kill(oldest, "deadline")]


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
GENERATIONS = st.integers(1, 4)
WANTED = st.builds(
    Wanted,
    st.integers(0, 50),
    GENERATIONS,
    st.none() | st.just(9),
    st.integers(1, 5),
    st.integers(0, 5),
    st.frozensets(st.sampled_from([1, 2, 3, 4, 9])),
    st.sampled_from(Haste),
    st.frozensets(GENERATIONS),
)
NOT_BEFORE = st.dictionaries(st.integers(0, 50), TIMES, max_size=5)
CHILDREN = st.lists(
    st.builds(Record, st.integers(0, 60), st.sampled_from(State), TIMES, st.booleans(), GENERATIONS | st.just(9)),
    max_size=60,
    unique_by=lambda child: child.slot,
)


def child_of(step: Step) -> Child | None:
    return None if isinstance(step, Spawn) else step.child


@given(TIMES, WANTED, CHILDREN, NOT_BEFORE)
def test_no_plan_has_two_steps_for_one_child_or_fills_a_slot_that_is_taken_or_takes_more_than_its_budget(
    now: float, wanted: Wanted, children: list[Record], not_before: dict[int, float]
) -> None:
    found = list(plan(now, wanted, children, TIMEOUTS, not_before))
    pushed = [id(child) for step in found if (child := child_of(step))]
    spawned = {step.slot: step.generation for step in found if isinstance(step, Spawn)}
    assert len(set(pushed)) == len(pushed)
    assert len(spawned) == sum(isinstance(step, Spawn) for step in found)
    assert not set(spawned) & {child.slot for child in children}
    assert all(now >= not_before.get(slot, now) for slot in spawned)
    assert set(spawned.values()) <= wanted.can_spawn & {wanted.generation, wanted.trial}
    booting = sum(child.state is State.BOOTING for child in children)
    assert not spawned or booting + len(spawned) <= BURST
    retired = [step.child for step in found if isinstance(step, Retire)]
    live = [child for child in children if child.state in (State.BOOTING, State.READY)]
    staying = [child for child in live if child not in retired]
    assert not spawned or len(staying) + len(spawned) <= wanted.size + wanted.max_surge
    fewest = min(wanted.size - wanted.max_unavailable, sum(child.state is State.READY for child in live))
    ours = [child for child in live if child.generation == wanted.generation]
    if len(ours) <= wanted.size:  # or else it is not a replacement but a smaller pool
        assert sum(child.state is State.READY for child in staying) >= min(fewest, wanted.size - wanted.max_unavailable)


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


def take(step: Step, now: float, pool: dict[int, Record], random: Random) -> None:
    """Do what the step says to a pool of records; some children obey, some are stuck."""
    match step:
        case Spawn(slot, generation):
            pool[slot] = Record(slot, State.BOOTING, now, random.random() < 0.5, generation)
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
    while len(pool) != size or any((each.state, each.generation) != (State.READY, 1) for each in pool.values()):
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


WORN = st.lists(
    st.builds(
        Record,
        st.integers(0, 12),
        st.sampled_from([State.READY, State.READY, *State]),
        TIMES,
        st.booleans(),
        st.sampled_from([1, 9]),
        st.none() | st.just("max_requests"),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda child: child.slot,
)


@settings(max_examples=500)
@given(
    st.integers(0, 6), st.none() | st.just(9), st.integers(0, 2), st.integers(0, 2), st.frozensets(GENERATIONS), WORN
)
def test_whatever_is_to_be_done_it_comes_to_rest_before_anything_else_happens(
    size: int, trial: int | None, surge: int, unavailable: int, can_spawn: frozenset[int], children: list[Record]
) -> None:
    """Nobody is forked and retired in turn, as long as one asks."""
    wanted = Wanted(
        size,
        trial=trial,
        max_surge=surge,
        max_unavailable=max(unavailable, not surge),
        can_spawn=can_spawn | ({9} if 4 in can_spawn else set()),
    )
    pool, turns = {child.slot: child for child in children}, 0
    while found := steps(200.0, wanted, *pool.values()):
        for step in found:
            take(step, 200.0, pool, Random(0))
        turns += 1
        assert turns < 10, (wanted, pool)


def test_who_is_tried_comes_before_the_replacement_of_those_who_are_worn() -> None:
    """Or else the one forked for that has to leave for the one on trial, another is forked for that, and so on."""
    wanted = Wanted(3, trial=2, can_spawn=frozenset({1, 2}))
    worn = [Record(0, State.READY, worn="max_requests"), Record(1, State.READY, worn="max_requests")]
    fresh, booting = Record(2, State.READY), Record(3, State.BOOTING)
    assert steps(100, wanted, *worn, fresh, booting) == [Retire(booting), Spawn(4, 2)]
    assert steps(100, wanted, *worn, fresh, Record(4, State.BOOTING, generation=2)) == []


def test_nobody_makes_room_for_one_on_trial_that_there_is_nothing_to_fork_from() -> None:
    old = [Record(0, State.READY), Record(1, State.READY), Record(2, State.BOOTING)]
    assert steps(100, Wanted(3, trial=2, max_surge=0, max_unavailable=1), *old) == []
