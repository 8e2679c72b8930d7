"""The phases of a reload as values: every event in every phase, and the verdicts at their boundaries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preforkd.transaction import (
    CRASHES,
    ENDS,
    FEWEST_REQUESTS,
    Count,
    Event,
    Phase,
    Probation,
    after,
    judge,
    judge_roll,
)

# What every phase comes to, event by event: written out, for this is the promise and the table in the code keeps it.
EXPECTED = {
    # phase: (succeeded, failed, late, stopped)
    Phase.SETTINGS: (Phase.MOLDS, Phase.REFUSED, Phase.SETTINGS, Phase.ABANDONED),
    Phase.MOLDS: (Phase.PROBATION, Phase.ROLLING_BACK, Phase.ROLLING_BACK, Phase.ABANDONED),
    Phase.PROBATION: (Phase.ROLLING, Phase.ROLLING_BACK, Phase.ROLLING_BACK, Phase.ABANDONED),
    Phase.ROLLING: (Phase.DONE, Phase.ROLLING_BACK, Phase.ROLLING_BACK, Phase.ABANDONED),
    Phase.ROLLING_BACK: (Phase.ROLLED_BACK, Phase.ROLLING_BACK, Phase.ROLLED_BACK, Phase.ABANDONED),
    Phase.DONE: (Phase.DONE, Phase.DONE, Phase.DONE, Phase.DONE),
    Phase.ROLLED_BACK: (Phase.ROLLED_BACK, Phase.ROLLED_BACK, Phase.ROLLED_BACK, Phase.ROLLED_BACK),
    Phase.REFUSED: (Phase.REFUSED, Phase.REFUSED, Phase.REFUSED, Phase.REFUSED),
    Phase.ABANDONED: (Phase.ABANDONED, Phase.ABANDONED, Phase.ABANDONED, Phase.ABANDONED),
}


def test_the_table_here_names_every_phase_and_every_event() -> None:
    assert set(EXPECTED) == set(Phase)
    assert list(Event) == [Event.SUCCEEDED, Event.FAILED, Event.LATE, Event.STOPPED]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_every_event_in_every_phase(phase: Phase, event: Event) -> None:
    assert after(phase, event) is EXPECTED[phase][list(Event).index(event)]


@pytest.mark.parametrize("phase", Phase)
def test_what_has_ended_stays_so_and_nothing_else_does(phase: Phase) -> None:
    stays = all(after(phase, event) is phase for event in Event)
    assert stays is (phase in ENDS)


@pytest.mark.parametrize("event", [Event.SUCCEEDED, Event.LATE])
@pytest.mark.parametrize("phase", [each for each in Phase if each not in ENDS | {Phase.SETTINGS}])
def test_whatever_has_begun_ends_if_only_it_succeeds_or_if_only_its_time_passes(phase: Phase, event: Event) -> None:
    passed = [phase]
    while phase not in ENDS:
        phase = after(phase, event)
        assert phase not in passed
        passed.append(phase)


@given(st.lists(st.sampled_from(Event)))
def test_a_reload_is_done_by_success_alone_and_refused_before_anything_was_changed(events: list[Event]) -> None:
    phase, passed = Phase.SETTINGS, [Phase.SETTINGS]
    for event in events:
        phase = after(phase, event)
        passed.append(phase)
    if phase is Phase.DONE:
        assert Phase.ROLLING_BACK not in passed
        assert {Phase.MOLDS, Phase.PROBATION, Phase.ROLLING} <= set(passed)
    if phase is Phase.REFUSED:
        assert set(passed) == {Phase.SETTINGS, Phase.REFUSED}


# The verdict on a worker on probation.

RULES = Probation(seconds=5.0, requests=50, max_error_ratio=0.1)


@pytest.mark.parametrize(
    ("elapsed", "new", "old", "verdict"),
    [
        (0.0, Count(), Count(), None),
        (4.999, Count(49, 0), Count(), None),
        (5.0, Count(), Count(), Event.SUCCEEDED),
        (0.0, Count(50, 0), Count(), Event.SUCCEEDED),
        # Too few requests say nothing, however many of them have raised.
        (0.0, Count(FEWEST_REQUESTS - 1, FEWEST_REQUESTS - 1), Count(), None),
        (5.0, Count(FEWEST_REQUESTS - 1, FEWEST_REQUESTS - 1), Count(), Event.SUCCEEDED),
        (0.0, Count(FEWEST_REQUESTS, FEWEST_REQUESTS), Count(), Event.FAILED),
        # The ratio itself is still allowed, anything above is not.
        (0.0, Count(10, 1), Count(), None),
        (0.0, Count(10, 2), Count(), Event.FAILED),
        (0.0, Count(30, 3), Count(), None),
        # As bad as the old ones, or twice as bad, is not the new code's fault.
        (0.0, Count(10, 5), Count(100, 50), None),
        (0.0, Count(10, 4), Count(100, 20), None),
        (0.0, Count(10, 5), Count(100, 20), Event.FAILED),
        (0.0, Count(10, 10), Count(100, 50), None),
        (0.0, Count(10, 2), Count(100, 1), Event.FAILED),
        # A failure counts before the time, and before the number of requests, is looked at.
        (5.0, Count(10, 2), Count(), Event.FAILED),
        (0.0, Count(50, 6), Count(), Event.FAILED),
        (0.0, Count(50, 5), Count(), Event.SUCCEEDED),
    ],
)
def test_the_verdict_on_a_worker_on_probation(elapsed: float, new: Count, old: Count, verdict: Event | None) -> None:
    assert judge(elapsed, RULES, new, old) is verdict


@pytest.mark.parametrize(("boot_failures", "crashes"), [(0, 0), (0, CRASHES - 1)])
def test_a_roll_forgives_a_crash(boot_failures: int, crashes: int) -> None:
    assert judge_roll(boot_failures, crashes) is None


@pytest.mark.parametrize(("boot_failures", "crashes"), [(1, 0), (0, CRASHES), (1, CRASHES)])
def test_a_roll_forgives_neither_a_failed_boot_nor_a_second_crash(boot_failures: int, crashes: int) -> None:
    assert judge_roll(boot_failures, crashes) is Event.FAILED


COUNTS = st.integers(0, 200).flatmap(lambda n: st.builds(Count, st.just(n), st.integers(0, n)))


@given(st.floats(0, 20), COUNTS, COUNTS)
def test_no_probation_goes_on_for_ever_and_none_fails_without_errors(elapsed: float, new: Count, old: Count) -> None:
    assert judge(RULES.seconds, RULES, new, old) is not None
    if not new.errors:
        assert judge(elapsed, RULES, new, old) is not Event.FAILED
