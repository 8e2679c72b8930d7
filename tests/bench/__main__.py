"""`python -m tests.bench`: run the chosen contests, one after the other, and print the table.

Exit status 0 when everything asked for was measured, reached or not (this is no test), or is not installed
here; 1 when something could not run. Never leaves loopback, nor a server of one contest to the next one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from tests.bench.contests import CONTESTS
from tests.bench.machine import in_one_line
from tests.bench.probes import Figures
from tests.bench.report import Outcome, table
from tests.bench.results import save
from tests.bench.rows import Contest
from tests.bench.spawned import CannotRunError, complain
from tests.bench.tools import Tools, built

WARM_UP = 0.2  # seconds of load to each side before the first round
MOST_ROUNDS, MOST_SECONDS = 1000, 600


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: sys.exit(128 + received))  # by way of every `finally`
    for module in ["preforkd", *(["matplotlib"] if options.save else [])]:
        if find_spec(module) is None:
            complain(f"{module} is not installed for this python")
            return 1
    try:
        with built() as tools:
            outcomes = [outcome for contest in CONTESTS for outcome in outcomes_of(contest, tools, options)]
    except CannotRunError as error:
        complain(str(error))
        return 1
    if not outcomes:
        complain(f"no row has {options.only!r} in it")
        return 1
    sys.stdout.write(f"{table(outcomes)}\n{in_one_line()}\n")
    if options.json:
        content = {"machine": in_one_line(), "rows": [outcome.as_json() for outcome in outcomes]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.save:
        save(outcomes, options.rounds, options.seconds)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def outcomes_of(contest: Contest, tools: Tools, options: argparse.Namespace) -> list[Outcome]:
    """The chosen rows of this contest; it is not run if there are none."""
    rows = [row for row in contest.rows if options.only.lower() in row.title.lower()]
    if not rows:
        return []
    if missing := not_installed(contest):
        return [Outcome(row, missing=missing) for row in rows]
    complain(f"measuring {'; '.join(row.title for row in rows)}")
    try:
        rounds = fought(contest, tools, options.rounds, options.seconds)
    except (CannotRunError, OSError) as error:  # OSError: a server that refuses, hangs up or is gone
        complain(f"could not run: {error}")
        return [Outcome(row, failure=str(error)) for row in rows]
    return [Outcome(row, rounds) for row in rows]


def fought(contest: Contest, tools: Tools, rounds: int, seconds: float) -> list[list[Figures]]:
    """All sides warmed up, then measured by turns."""
    with ExitStack() as stack:
        probes = [stack.enter_context(side(tools)) for side in contest.sides]
        for probe in probes:
            probe(WARM_UP)
        return [[probe(seconds) for probe in probes] for _ in range(rounds)]


def not_installed(contest: Contest) -> str:
    """The first thing that this contest needs and that is not here."""
    modules = [name for name in contest.modules if find_spec(name) is None]
    commands = [name for name in contest.commands if shutil.which(name) is None]
    return next(iter(modules + commands), "")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.bench", description="preforkd next to its peers")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of load, each round and side (default: 1.5)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help='only rows with this in "what, peer"')
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round there")
    parser.add_argument("--save", action="store_true", help="write table, figures and plots to tests/bench/results")
    options = parser.parse_args(arguments)
    if options.save and options.only:
        parser.error("--save: the results are those of one whole run, without --only")
    if not (1 <= options.rounds <= MOST_ROUNDS and 0 < options.seconds <= MOST_SECONDS):
        parser.error(f"rounds: 1 to {MOST_ROUNDS}; seconds: more than 0, at most {MOST_SECONDS}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
