"""When a worker is worn, and what becomes of the worn in a pool, as values."""

from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preforkd.plan import Retire, Spawn, State, Step, Wanted, plan, wake_at
from preforkd.settings import Service
from preforkd.wear import ENDLESS, Endurance, Weight, contradictions, draw, is_unbearable, worn
from tests.test_plan import TIMEOUTS, Record

READY, BOOTING, DRAINING = State.READY, State.BOOTING, State.DRAINING


@pytest.mark.parametrize(
    ("endurance", "requests", "seconds", "weight", "cause"),
    [
        (ENDLESS, 10**9, 1e9, Weight(1 << 50, 1 << 50), None),
        (Endurance(requests=5), 4, 1e9, Weight(), None),
        (Endurance(requests=5), 5, 0.0, Weight(), "max_requests"),
        (Endurance(seconds=2.0), 10**9, 1.999, Weight(), None),
        (Endurance(seconds=2.0), 0, 2.0, Weight(), "max_lifetime"),
        (Endurance(rss=100), 0, 0.0, Weight(100), None),
        (Endurance(rss=100), 0, 0.0, Weight(101), "max_rss"),
        (Endurance(pss=100), 0, 0.0, Weight(101, 100), None),
        (Endurance(pss=100), 0, 0.0, Weight(0, 101), "max_rss"),
        (Endurance(rss_hard=100), 0, 0.0, Weight(101), "max_rss"),
        (Endurance(requests=1, seconds=1.0, rss=1), 1, 1.0, Weight(2), "max_requests"),
    ],
)
def test_a_worker_is_worn_as_soon_as_it_has_come_to_one_of_its_limits(
    endurance: Endurance, requests: int, seconds: float, weight: Weight, cause: str | None
) -> None:
    assert worn(endurance, requests, seconds, weight) == cause


def test_only_the_hard_limit_is_unbearable() -> None:
    assert not is_unbearable(Endurance(rss=1), Weight(1 << 40))
    assert not is_unbearable(Endurance(rss_hard=100), Weight(100))
    assert is_unbearable(Endurance(rss_hard=100), Weight(101))


def test_a_hard_limit_below_the_soft_one_is_a_fault() -> None:
    def faults(soft: int, hard: int) -> list[str]:
        return [key for key, _ in contradictions(Service(target="", max_rss=soft, max_rss_hard=hard))]

    assert faults(200, 100) == faults(100, 100) == ["max_rss_hard"]
    assert faults(0, 100) == faults(100, 0) == faults(100, 200) == []


def test_jitter_is_spread_over_its_range_and_adds_to_the_limit() -> None:
    service = Service(target="a:b", max_requests=100, max_requests_jitter=50, max_lifetime=60, max_lifetime_jitter=30)
    drawn = [draw(service, Random(number).random) for number in range(1000)]
    requests, seconds = {each.requests for each in drawn}, sorted(each.seconds for each in drawn)
    assert requests == set(range(100, 151))
    assert 60 <= seconds[0] < 61
    assert 89 < seconds[-1] <= 90
    assert 74 < seconds[500] < 76


def test_jitter_of_no_limit_is_no_limit() -> None:
    service = Service(target="a:b", max_requests_jitter=50, max_lifetime_jitter=30)
    assert draw(service, Random(1).random) == ENDLESS
    assert not ENDLESS.has_end


# In a pool.


def steps(wanted: Wanted, *children: Record) -> list[Step]:
    return list(plan(0.0, wanted, children, TIMEOUTS, {}))


def ready(slot: int, worn: str | None = None, *, retires_first: bool = False, state: State = READY) -> Record:
    return Record(slot, state, since=0.0, worn=worn, retires_first=retires_first)


def test_a_worn_worker_is_replaced_first_and_retired_after() -> None:
    old, other = ready(0, "max_requests"), ready(1)
    assert steps(Wanted(2), old, other) == [Spawn(2, 1)]
    assert steps(Wanted(2), old, other, ready(2, state=BOOTING)) == []
    assert steps(Wanted(2), old, other, ready(2)) == [Retire(old, "max_requests")]
    assert steps(Wanted(2), ready(0, "max_requests", state=DRAINING), other, ready(2)) == []


def test_the_worn_are_replaced_within_the_budget() -> None:
    old = [ready(slot, "max_lifetime") for slot in range(4)]
    assert steps(Wanted(4), *old) == [Spawn(4, 1)]
    assert steps(Wanted(4, max_surge=3), *old) == [Spawn(4, 1), Spawn(5, 1), Spawn(6, 1)]
    assert steps(Wanted(4, max_surge=0, max_unavailable=1), *old) == [Retire(old[3], "max_lifetime"), Spawn(4, 1)]


def test_a_worn_worker_is_not_replaced_when_there_is_nothing_to_fork_from() -> None:
    assert steps(Wanted(1, can_spawn=frozenset()), ready(0, "max_rss")) == []


def test_a_worn_worker_too_many_goes_without_being_replaced_as_does_one_of_a_pool_that_stops() -> None:
    old = ready(0, "max_rss")
    assert steps(Wanted(1), old, ready(1)) == [Retire(old, "max_rss")]
    assert steps(Wanted(0), old) == [Retire(old)]


def test_a_worn_worker_of_another_generation_leaves_as_the_others_of_it_do() -> None:
    old = Record(0, READY, generation=1, worn="max_rss")
    new = Record(1, READY, generation=2)
    assert steps(Wanted(1, generation=2, can_spawn=frozenset({2})), old, new) == [Retire(old)]


def test_a_worn_worker_on_trial_goes_on_until_the_trial_is_over() -> None:
    wanted = Wanted(1, trial=2, can_spawn=frozenset({1, 2}))
    assert steps(wanted, ready(0), Record(1, READY, generation=2, worn="max_requests")) == []


def test_one_that_there_is_no_memory_for_beside_its_replacement_leaves_first() -> None:
    heavy, other = ready(0, "max_rss", retires_first=True), ready(1)
    assert steps(Wanted(2), heavy, other) == [Retire(heavy, "max_rss")]
    heavy.state = DRAINING
    assert steps(Wanted(2), heavy, other) == []
    assert steps(Wanted(2), other) == [Spawn(0, 1)]


def test_of_several_such_one_leaves_at_a_time() -> None:
    heavy = [ready(slot, "max_rss", retires_first=True) for slot in range(3)]
    assert steps(Wanted(3), *heavy) == [Retire(heavy[2], "max_rss")]
    heavy[2].state = DRAINING
    assert steps(Wanted(3), *heavy) == []
    assert steps(Wanted(3), *heavy[:2]) == [Spawn(2, 1)]
    assert steps(Wanted(3), *heavy[:2], ready(2, state=BOOTING)) == []
    assert steps(Wanted(3), *heavy[:2], ready(2)) == [Retire(heavy[1], "max_rss")]


@given(
    st.lists(st.tuples(st.sampled_from([None, "max_rss"]), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_the_worn_are_all_replaced_and_never_too_few_are_ready(
    pool: list[tuple[str | None, bool]], surge: int, unavailable: int
) -> None:
    """Those told to leave are gone at once, those asked for are ready at once: then nobody worn is left."""
    size = len(pool)
    wanted = Wanted(size, max_surge=surge or 1, max_unavailable=unavailable)
    children = [ready(slot, cause, retires_first=first and bool(cause)) for slot, (cause, first) in enumerate(pool)]
    fewest = size - max(unavailable, any(child.retires_first for child in children))
    for _ in range(4 * size):
        found = steps(wanted, *children)
        if not found:
            break
        for step in found:
            match step:
                case Retire(Record() as child):
                    children.remove(child)
                case Spawn(slot):
                    children.append(ready(slot))
        assert len(children) >= fewest
        assert len(children) <= size + wanted.max_surge
    assert len(children) == size
    assert not any(child.worn for child in children)
    assert wake_at(wanted, children, TIMEOUTS, {}) == inf
