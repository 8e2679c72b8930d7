"""A run of the simulator as a picture: the size of the pool over time, and below it how long requests waited."""

from pathlib import Path

import matplotlib

from tests.sim.model import Course, Scenario

matplotlib.use("Agg")  # no display
from matplotlib import pyplot


def draw(scenario: Scenario, course: Course, directory: Path) -> Path:
    """Write the PNG and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 6), height_ratios=(2, 1))
    times = [at / 60 for at, _, _ in course.sizes]
    above.step(times, [size for _, size, _ in course.sizes], where="post", label="workers wanted", color="tab:blue")
    above.step(
        times, [ready for _, _, ready in course.sizes], where="post", label="workers ready", color="tab:orange", lw=0.8
    )
    above.axhline(scenario.bounds.most, ls=":", color="gray", label="max_children")
    regrets = [(at / 60, 0) for at, event, reason in course.events if (event, reason) == ("held_back", "flapping")]
    if regrets:
        above.plot(*zip(*regrets, strict=True), "v", color="tab:red", label="more patient")
    above.set_ylabel("workers")
    above.set_ylim(bottom=0)
    above.legend(loc="upper right")
    above.set_title(f"{scenario.name}: {scenario.tells}", fontsize=10)
    below.plot([at / 60 for at, _ in course.waits], [wait for _, wait in course.waits], ".", ms=1.5)
    below.set_ylabel("waiting time, s")
    below.set_xlabel("minutes")
    below.set_ylim(bottom=0)
    figure.tight_layout()
    path = directory / f"{scenario.name.replace(' ', '_')}.png"
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path
