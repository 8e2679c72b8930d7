"""What was measured, as pictures. Needs matplotlib, which is imported when there is something to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench import crowd, pools
from tests.bench.report import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS = "#1764ab", "#b05a3c"


def draw(outcomes: Sequence[Outcome], folder: Path) -> dict[str, str]:
    """Draw every plot of which something was measured. Their file names, and titles."""
    from matplotlib.figure import Figure

    drawn = {}
    for name, (title, plot) in PLOTS.items():
        shown = [outcome for outcome in outcomes if outcome.row.plot == name and outcome.rounds]
        if shown:
            figure = Figure(layout="constrained")
            plot(figure, shown)
            figure.suptitle(title)
            figure.savefig(folder / f"{name}.png", dpi=110)
            drawn[f"{name}.png"] = title
    return drawn


def rates(figure: Figure, outcomes: Sequence[Outcome]) -> None:
    """A dot for each row, with the spread of its rounds, and what is required of it."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.ratio)
    figure.set_size_inches(9, 0.4 * len(outcomes) + 1.4)
    axes = figure.subplots()
    for position, outcome in enumerate(outcomes):
        ratios, middle = outcome.ratios(), outcome.ratio
        axes.plot([min(ratios), max(ratios)], [position, position], color=OURS, linewidth=1)
        axes.plot(middle, position, "o", color=OURS)
        if outcome.row.at_least is not None:
            axes.plot(outcome.row.at_least, position, "|", color=THEIRS, markersize=14, markeredgewidth=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
    axes.set_xticks([], minor=True)
    names = [f"{outcome.row.what}\nnext to {outcome.row.peer}" for outcome in outcomes]
    axes.set_yticks(range(len(outcomes)), names, fontsize="small")
    axes.set_xlabel("exchanges a second, times the peer's\n(line: all rounds, bar: required)")
    axes.grid(axis="x", alpha=0.3)


def sizes(figure: Figure, outcomes: Sequence[Outcome]) -> None:
    """Throughput and CPU time, by number of processes."""
    figure.set_size_inches(9, 3.6)
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "per_second", "connections a second"), (right, "cpu_us", "CPU us for each")):
        found = {outcome.row.at: outcome.medians() for outcome in outcomes if outcome.row.figure == name}
        for side, (color, who) in enumerate(((OURS, "preforkd"), (THEIRS, "C pre-fork"))):
            axes.plot(list(found), [medians[side] for medians in found.values()], "o-", color=color, label=who)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found), list(map(str, found)))
        axes.set_xlabel("processes")
        from_zero(axes, label)


def memory(figure: Figure, outcomes: Sequence[Outcome]) -> None:
    """Memory of each server, by number of open connections."""
    figure.set_size_inches(9, 4.2)
    axes = figure.subplots()
    peers = set()
    for outcome in outcomes:
        kind = outcome.row.what.rpartition(", ")[2]
        sides = [(f"preforkd, {kind}", 0, "o-"), (outcome.row.peer, 1, "s--")]
        for name, side, style in sides:
            if name not in peers:
                grown = [outcome.medians(f"mib_{size}")[side] for size in crowd.SIZES]
                axes.plot(crowd.SIZES, grown, style, label=name)
                peers.add(name)
    axes.set_xlabel("open connections")
    from_zero(axes, "MiB, all processes (PSS)")


def latency(figure: Figure, outcomes: Sequence[Outcome]) -> None:
    """Bars for the median, and a mark for the 99th percentile."""
    figure.set_size_inches(9, 2.6)
    axes = figure.subplots()
    bars = {"preforkd, max_requests=1": (outcomes[0], 0)} | {each.row.peer: (each, 1) for each in outcomes}
    for position, (name, (outcome, side)) in enumerate(bars.items()):
        axes.barh(position, outcome.medians("p50_us")[side] / 1000, color=OURS if "preforkd" in name else THEIRS)
        axes.plot(outcome.medians("p99_us")[side] / 1000, position, "|", color="black", markersize=16)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("ms; bar: median, mark: 99 % are faster")


def from_zero(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


PLOTS: dict[str, tuple[str, Callable[[Figure, Sequence[Outcome]], None]]] = {
    "rates": ("preforkd next to other servers, on the same machine", rates),
    "memory": ("Memory, by connections that are open", memory),
    "sizes": (f"{pools.MANY_CLIENTS} clients, pools of many sizes", sizes),
    "latency": ("A process for each request, 50 requests a second", latency),
}
