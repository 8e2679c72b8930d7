"""``python -m tests.sim [SCENARIO …] [--plot DIR]``: what elastic pools do under load, as a table and as plots."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tests.sim.loads import SCENARIOS
from tests.sim.model import Course, Pool, Scenario

COLUMNS = ("scenario", "requests", "size mean", "most", "changes", "wait mean", "p99", "most")


def row(scenario: Scenario, course: Course) -> Sequence[str]:
    waits = sorted(wait for _, wait in course.waits)
    return (
        scenario.name,
        str(len(waits)),
        f"{course.worker_seconds() / scenario.lasts:.1f}",
        str(max(size for _, size, _ in course.sizes)),
        str(course.changes()),
        _seconds(sum(waits) / len(waits)),
        _seconds(waits[int(len(waits) * 0.99)]),
        _seconds(waits[-1]),
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in (COLUMNS, *rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; all of them")
    parser.add_argument("--plot", metavar="DIR", type=Path, help="write a PNG for each there (needs matplotlib)")
    options = parser.parse_args()
    if unknown := [name for name in options.scenarios if name not in SCENARIOS]:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    rows = []
    for name in options.scenarios or SCENARIOS:
        scenario = SCENARIOS[name]
        course = Pool(scenario).run()
        rows.append(row(scenario, course))
        if options.plot is not None:
            from tests.sim.plot import draw

            draw(scenario, course, options.plot)
    print(table(rows))  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
