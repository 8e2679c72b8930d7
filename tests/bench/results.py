"""The results that are kept beside the code: one whole run, as a page, as JSON, and as plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.machine import description
from tests.bench.plots import draw
from tests.bench.report import Outcome, markdown

FOLDER = Path(__file__).parent / "results"

PAGE = """# Results of the benchmark

Written by `make bench BENCH='--save'`; do not edit. {rounds} rounds of {seconds:g} s for each side, by turns; medians.
"ratio" is preforkd's figure by the peer's in the same round, "required" is what that ratio should be, or, where it says
so, preforkd's figure. Every figure of every round is in [figures.json](figures.json).

{machine}

{table}

{plots}
"""


def save(outcomes: Sequence[Outcome], rounds: int, seconds: float) -> None:
    """Replace what is there."""
    machine = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **description()}
    content = {"machine": machine, "rows": [outcome.as_json() for outcome in outcomes]}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "figures.json").write_text(json.dumps(content, indent=1) + "\n")
    names = draw(outcomes, FOLDER)
    page = PAGE.format(
        rounds=rounds,
        seconds=seconds,
        machine="\n".join(f"- {name}: {value}" for name, value in machine.items()),
        table=markdown(outcomes),
        plots="\n\n".join(f"![{title}]({name})" for name, title in names.items()),
    )
    (FOLDER / "README.md").write_text(page)
