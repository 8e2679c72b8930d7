"""The rules of the size of an elastic pool, as values: a fake clock, and loads that are numbers."""

from collections.abc import Iterable
from itertools import pairwise
from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from preforkd.plan import BURST
from preforkd.sizing import (
    LONGEST_PATIENCE,
    SOON,
    TICK,
    Bounds,
    Breath,
    begin,
    breathe,
    changes,
    recovery,
    within,
)
from tests.sim.loads import BOUNDS, MINUTE, SCENARIOS, about, held, poisson
from tests.sim.model import Pool, Request, Scenario

ELASTIC = Bounds(100, min_spare=2, max_spare=5)


def ticks(breath: Breath, bounds: Bounds, loads: Iterable[int]) -> list[Breath]:
    """A breath a second, each with so many lanes busy, or with all that there are; who is wanted is ready."""
    found = []
    for load in loads:
        lanes = breath.size * bounds.lanes
        breath = breathe(breath.wake_at, breath, bounds, min(load, lanes), lanes)
        found.append(breath)
    return found


def sizes(breaths: list[Breath]) -> list[int]:
    return [each.size for each in breaths]


def test_a_pool_without_max_spare_has_its_limit_for_ever() -> None:
    bounds = Bounds(7, min_spare=1)
    breath = begin(50.0, bounds)
    assert (breath.size, breath.wake_at) == (7, inf)
    assert breathe(1e9, breath, bounds, 0, 7) == breath


@pytest.mark.parametrize(
    ("bounds", "size"),
    [
        (Bounds(10, 2, 4), 2),
        (Bounds(10, 2, 4, start=6), 6),
        (Bounds(10, 3, 4, start=1), 3),
        (Bounds(10, 5, 16, lanes=4), 2),
    ],
)
def test_a_pool_begins_with_what_the_settings_say_or_with_as_few_as_may_be(bounds: Bounds, size: int) -> None:
    assert begin(0.0, bounds).size == size


def test_too_few_idle_and_it_grows_by_1_2_4_and_so_on_up_to_a_burst_a_second() -> None:
    bounds = replace(ELASTIC, most=1000)
    grown = sizes([begin(0, bounds), *ticks(begin(0, bounds), bounds, [1000] * 8)])
    assert [b - a for a, b in pairwise(grown)] == [1, 2, 4, 8, 16, 32, 32, 32]


def test_it_breathes_once_a_second() -> None:
    breath = begin(10.0, ELASTIC)
    assert breath.wake_at == 10 + TICK
    assert breathe(10.9, breath, ELASTIC, 2, 2) == breath
    assert breathe(11.0, breath, ELASTIC, 2, 2).wake_at == 12.0


def test_enough_idle_and_it_begins_with_one_again() -> None:
    after = ticks(begin(0, ELASTIC), ELASTIC, [100, 100, 100, 3, 100])
    assert sizes(after) == [3, 5, 9, 9, 10]


def test_workers_that_start_are_waited_for_and_then_it_goes_on_where_it_was() -> None:
    first = breathe(1, begin(0, ELASTIC), ELASTIC, 2, 2)
    second = breathe(2, first, ELASTIC, 3, 3)
    assert (first.size, second.size) == (3, 5)
    waits = [second]
    for now in range(3, 30):
        waits.append(breathe(now, waits[-1], ELASTIC, 3, 3))  # two of five boot and boot
    assert {each.size for each in waits} == {5}
    assert [*changes(waits[0], waits[1]), *changes(waits[1], waits[2])] == [("held_back", "starting")]
    assert breathe(30, waits[-1], ELASTIC, 5, 5).size == 9


def test_too_many_idle_and_it_shrinks_by_one_a_second_to_max_spare() -> None:
    breath = Breath(12, wake_at=1.0)
    assert sizes(ticks(breath, ELASTIC, [3] * 8)) == [12, 11, 10, 9, 8, 8, 8, 8]


def test_who_starts_is_not_retired_before_it_has_shown_what_it_is_for() -> None:
    breath = Breath(12, wake_at=1.0)
    for now in range(1, 20):
        breath = breathe(now, breath, ELASTIC, 1, 1)
    assert breath.size == 12


def test_growing_soon_after_shrinking_makes_it_more_patient_and_a_shrinking_that_stands_less() -> None:
    breath = Breath(10, wake_at=1.0)
    for doubled in (2, 4, 8, 16, 32, 64, 128, LONGEST_PATIENCE, LONGEST_PATIENCE):
        breath = ticks(breath, ELASTIC, [1] * (2 * ceil(breath.patience) + 1))[-1]  # shrinks
        assert breath.size < 10
        before, breath = breath, ticks(breath, ELASTIC, [breath.size])[-1]
        assert breath.patience == doubled
        assert (("held_back", "flapping") in [*changes(before, breath)]) is (breath.patience > before.patience)
        breath = replace(breath, size=10, spurt=1)
    waits = sizes(ticks(breath, ELASTIC, [1] * 600))
    assert waits.index(9) in range(256, 513)
    stood = Breath(10, wake_at=SOON + 2, patience=64.0, since=0.0, shrunk_at=1.0)
    assert ticks(stood, ELASTIC, [1])[-1] == replace(
        stood, wake_at=SOON + 3, since=SOON + 2, peak=1, ceiling=6, size=9, shrunk_at=SOON + 2, patience=32.0
    )


def test_what_was_needed_at_the_busiest_moment_of_its_patience_is_kept() -> None:
    patient = Breath(40, wake_at=1.0, patience=10.0)
    after = ticks(patient, ELASTIC, [1, 1, 20, *[1] * 9])
    assert sizes(after) == [40] * 10 + [39, 38]
    assert min(sizes(ticks(after[-1], ELASTIC, [1] * 8))) == 30
    assert after[-1].ceiling == 25


def test_at_the_limit_it_says_so_once() -> None:
    bounds = replace(ELASTIC, most=4)
    after = ticks(begin(0, bounds), bounds, [100, 100, 3, 100, 2, 100, 100])
    told = [told for a, b in pairwise(after) for told in changes(a, b)]
    assert told == [("grown", "few_idle"), ("held_back", "limit")]


def test_lanes_are_counted_and_workers_are_wanted() -> None:
    bounds = Bounds(10, min_spare=4, max_spare=12, lanes=8)
    assert sizes(ticks(begin(0, bounds), bounds, [4, 5, 12])) == [1, 2, 2]
    assert bounds.needed(busy=5) == 3
    assert sizes(ticks(Breath(10, wake_at=1.0), bounds, [5] * 12))[-1] == 3


@pytest.mark.parametrize(
    ("bounds", "key"),
    [
        (Bounds(4, min_spare=3, max_spare=2), "min_spare"),
        (Bounds(4, max_spare=5), "max_spare"),
        (Bounds(4, max_spare=2, start=5), "start_children"),
        (Bounds(4, min_spare=2), "min_spare"),
        (Bounds(4, start=2), "start_children"),
    ],
)
def test_what_contradicts_itself_is_a_fault(bounds: Bounds, key: str) -> None:
    assert [where for where, _ in bounds.contradictions()] == [key]


def test_what_does_not_is_none() -> None:
    for bounds in (Bounds(4), Bounds(4, max_spare=4), Bounds(4, 4, 4, start=4), Bounds(1, 1, 8, lanes=8)):
        assert not [*bounds.contradictions()]


# What holds for every pool there can be.

ANY_BOUNDS = st.builds(
    lambda most, low, more, start, lanes: Bounds(most, low, low + more, start, lanes),
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(0, 300),
    st.integers(1, 16),
)
NOW = 1000.0
PAST = st.floats(-NOW, NOW) | st.just(-inf)
ANY_BREATH = st.builds(
    Breath,
    size=st.integers(0, 400),
    wake_at=st.floats(NOW, NOW + 5),
    spurt=st.sampled_from([1, 2, 4, 8, 16, 32]),
    patience=st.floats(TICK, LONGEST_PATIENCE),
    since=PAST,
    peak=st.integers(0, 5000),
    ceiling=st.none() | st.integers(1, 400),
    shrunk_at=PAST,
    held=st.sampled_from(["", "limit", "starting"]),
)


@settings(deadline=None)
@given(ANY_BOUNDS, ANY_BREATH, st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), max_size=50))
def test_bounds_hold_and_a_tick_changes_little(bounds: Bounds, breath: Breath, loads: list[tuple[int, int]]) -> None:
    breath = within(NOW, breath, bounds)
    assert breath.wake_at <= NOW + TICK
    for ready, busy in loads:
        before, breath = breath, breathe(breath.wake_at, breath, bounds, min(busy, ready), ready)
        assert bounds.fewest <= breath.size <= bounds.most
        assert 1 <= breath.spurt <= BURST
        assert TICK <= breath.patience <= LONGEST_PATIENCE
        assert breath.wake_at == before.wake_at + TICK
        assert -1 <= breath.size - before.size <= BURST


@settings(deadline=None)
@given(ANY_BOUNDS, ANY_BREATH, st.integers(0, 5000))
def test_from_any_state_it_comes_to_rest_in_a_number_of_ticks_that_is_stated(
    bounds: Bounds, breath: Breath, load: int
) -> None:
    breath = within(NOW, breath, bounds)
    after = ticks(breath, bounds, [load] * recovery(bounds))[-1]
    busy = min(load, after.size * bounds.lanes)
    idle = after.size * bounds.lanes - busy
    assert idle >= bounds.min_spare or after.size == bounds.most
    assert idle < bounds.max_spare + bounds.lanes or after.size == bounds.fewest
    assert set(sizes(ticks(after, bounds, [load] * 600))) == {after.size}


@settings(deadline=None)
@given(ANY_BOUNDS, ANY_BREATH, st.integers(1, 20), st.integers(0, 300))
def test_however_slow_the_boot_nobody_is_forked_in_the_place_of_those_who_are_coming(
    bounds: Bounds, breath: Breath, ready: int, seconds: int
) -> None:
    """With nobody who becomes ready the pool grows until as many are coming as should be idle, and no further."""
    breath = within(NOW, breath, bounds)
    before = breath.size
    for _ in range(seconds):
        breath = breathe(breath.wake_at, breath, bounds, ready, ready)
    assert breath.size <= max(before, bounds.within(ceil((ready + bounds.min_spare) / bounds.lanes) + BURST - 1))


# In the simulator, where requests wait and workers boot.


def scenario(bounds: Bounds, requests: list[Request], lasts: float, boot: float) -> Scenario:
    return Scenario("drawn", "", bounds, lambda: requests, lasts, boot)


@pytest.mark.parametrize("name", ["held", "bursts", "crash loop", "full", "slow boot"])
def test_no_more_than_a_burst_boots_at_a_time_and_no_busy_one_leaves_while_another_is_idle(name: str) -> None:
    course = Pool(SCENARIOS[name]).run()
    assert course.most_booting <= BURST
    assert not course.retired_busy
    assert not course.unserved
    assert max(size for _, size, _ in course.sizes) <= SCENARIOS[name].bounds.most


@settings(deadline=None)
@given(
    number=st.integers(1, 80),
    boot=st.floats(0, 20),
    spare=st.tuples(st.integers(1, 5), st.integers(0, 5)),
    most=st.integers(8, 64),
)
def test_whoever_comes_is_served_and_a_constant_load_leaves_the_size_alone(
    number: int, boot: float, spare: tuple[int, int], most: int
) -> None:
    bounds = Bounds(most, spare[0], min(spare[0] + spare[1], most))
    end = 600 + 30 * boot
    course = Pool(scenario(bounds, [*held(number, 5, end + 600)], end + 300, boot)).run()
    assert not course.changes(after=end)
    assert bounds.within(number + bounds.min_spare) <= course.sizes[-1][1] <= bounds.needed(number)
    assert course.unserved == max(0, number - most)
    assert course.most_booting <= BURST


def test_a_load_at_random_that_is_constant_in_the_mean_changes_the_size_less_and_less() -> None:
    """Ten busy in the mean, between none and 22: by the second half hour the size has changed by one in six minutes."""
    steady = Scenario("", "", BOUNDS, lambda: poisson(lambda _: 25, 25, 60 * MINUTE, about(0.4)), 60 * MINUTE)
    course = Pool(steady).run()
    early, late = course.changes() - course.changes(30 * MINUTE), course.changes(30 * MINUTE)
    assert late <= min(10, early / 3)


def test_a_burst_that_comes_again_and_again_is_waited_for_in_the_end() -> None:
    course = Pool(SCENARIOS["bursts"]).run()
    late = course.changes(after=15 * MINUTE)
    assert late < (course.changes() - late) / 4
    early_waits = [wait for at, wait in course.waits if at < 15 * MINUTE]
    late_waits = [wait for at, wait in course.waits if at >= 15 * MINUTE]
    assert sum(late_waits) / len(late_waits) < sum(early_waits) / len(early_waits) / 2
