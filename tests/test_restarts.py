"""The rules by which programs are restarted, as values: any history of answers, processes and pauses."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as some

from preforkd.supervisor.restarts import History, Rules, Verdict, is_to_be_asked, judged, seen

rules = some.builds(
    Rules,
    failures=some.integers(1, 4),
    grace=some.sampled_from([0.0, 30.0]),
    max_restarts=some.integers(0, 3),
    window=some.sampled_from([60.0, 600.0]),
)


@dataclass(frozen=True)
class Moment:
    """A round: so long after the one before, this process is there, and answers if it is asked."""

    pause: float
    pid: int
    answers: bool


@dataclass(frozen=True)
class Asked:
    """What came of a round in which it was asked."""

    at: float
    born: float
    pid: int
    answers: bool
    verdict: Verdict


moments = some.lists(
    some.builds(Moment, some.sampled_from([0.5, 5.0, 45.0]), some.sampled_from([0, 7, 7, 7, 8]), some.booleans()),
    max_size=40,
)


def played(rules: Rules, moments: list[Moment]) -> list[Asked]:
    """What the rules make of these moments. A process that is to be restarted is another one from then on."""
    history, now, births, asked, replaced = History(), 0.0, {0: 0.0}, [], 0
    last = 0
    for moment in moments:
        now += moment.pause
        pid = moment.pid and moment.pid + 100 * replaced
        if pid != last:
            births[pid] = now
        last = pid
        history = seen(history, pid, now - births[pid], now)
        if is_to_be_asked(rules, history, now):
            history, verdict = judged(rules, history, moment.answers, now)
            asked.append(Asked(now, births[pid], pid, moment.answers, verdict))
            replaced += verdict is Verdict.RESTART
    return asked


@given(rules, moments)
def test_who_answers_is_well(rules: Rules, moments: list[Moment]) -> None:
    assert all((each.verdict is Verdict.WELL) == each.answers for each in played(rules, moments))


@given(rules, moments)
def test_only_a_process_is_asked_and_not_within_the_grace(rules: Rules, moments: list[Moment]) -> None:
    assert all(each.pid and each.at - each.born >= rules.grace for each in played(rules, moments))


@given(rules, moments)
def test_a_restart_comes_after_so_many_missed_answers_in_a_row_of_one_process(
    rules: Rules, moments: list[Moment]
) -> None:
    asked = played(rules, moments)
    for at, each in enumerate(asked):
        row = asked[max(0, at - rules.failures + 1) : at + 1]
        is_due = len(row) == rules.failures and all(not one.answers and one.born == each.born for one in row)
        assert (each.verdict in (Verdict.RESTART, Verdict.HELD_BACK)) == is_due


@given(rules, moments)
def test_there_are_at_most_so_many_restarts_in_any_window(rules: Rules, moments: list[Moment]) -> None:
    restarts = [each.at for each in played(rules, moments) if each.verdict is Verdict.RESTART]
    for end in restarts:
        assert sum(end - rules.window < at <= end for at in restarts) <= rules.max_restarts


@given(rules, moments)
def test_it_is_held_back_only_by_restarts_in_the_window(rules: Rules, moments: list[Moment]) -> None:
    asked = played(rules, moments)
    for at, each in enumerate(asked):
        if each.verdict is Verdict.HELD_BACK:
            before = [one.at for one in asked[:at] if one.verdict is Verdict.RESTART]
            assert sum(each.at - one < rules.window for one in before) == rules.max_restarts


def test_the_age_of_a_process_counts_when_it_is_first_seen_whatever_becomes_of_the_clock() -> None:
    rules = Rules(grace=30.0)
    history = seen(History(), 7, -86400.0, 100.0)  # the clock was set back: taken for a new one
    assert not is_to_be_asked(rules, history, 129.0)
    assert is_to_be_asked(rules, seen(history, 7, -86370.0, 130.0), 130.0)
    assert is_to_be_asked(rules, seen(History(), 7, 3600.0, 100.0), 100.0)
