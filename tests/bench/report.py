"""What was measured, as a table for people and as JSON for programs. Never measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from tests.bench.probes import Figures
from tests.bench.rows import Row

HEADINGS = ("what", "peer", "preforkd", "peer's", "ratio", "required", "verdict", "spread of ratio")


@dataclass(frozen=True)
class Outcome:
    """A row and the rounds of its contest, each the figures of every side; or why there are none."""

    row: Row
    measured: Sequence[Sequence[Figures]] = field(default=())
    missing: str = ""  # a peer that is not installed
    failure: str = ""  # what could not run

    @property
    def rounds(self) -> list[tuple[Figures, Figures]]:
        """Preforkd's figures and the peer's."""
        return [(sides[self.row.side], sides[self.row.against]) for sides in self.measured]

    def medians(self, figure: str = "") -> tuple[float, float]:
        """Of preforkd's figures and of the peer's, the row's own or another one of the same probe."""
        ours, peers = (median(sides[side][figure or self.row.figure] for sides in self.rounds) for side in (0, 1))
        return ours, peers

    def ratios(self) -> list[float]:
        """Preforkd's figure by the peer's, one for each round."""
        return [ours[self.row.figure] / peers[self.row.figure] for ours, peers in self.rounds]

    @property
    def ratio(self) -> float:
        return median(self.ratios())

    def errors(self) -> tuple[int, int]:
        """Failed exchanges of preforkd and of the peer, all rounds."""
        ours, peers = (sum(int(figures[side].get("errors", 0)) for figures in self.rounds) for side in (0, 1))
        return ours, peers

    def cells(self) -> tuple[str, ...]:
        row = self.row
        if not self.rounds:
            verdict = f"not measured: {self.missing} is not installed" if self.missing else "could not run"
            return (row.what, row.peer, "-", "-", "-", row.required(), verdict, "-")
        ours, peers = self.medians()
        ratios = self.ratios()
        verdict = "reached" if row.reached(ours, self.ratio) else "NOT reached"
        verdict = "for information" if row.informs else verdict
        if any(self.errors()):
            verdict += " (failed exchanges: {} and {})".format(*self.errors())
        return (
            row.what, row.peer, row.show.format(ours), row.show.format(peers), f"{self.ratio:.2f}",
            row.required(), verdict, f"{min(ratios):.2f}..{max(ratios):.2f}",
        )  # fmt: skip

    def as_json(self) -> dict[str, object]:
        return {
            "row": asdict(self.row),
            "cells": dict(zip(HEADINGS, self.cells(), strict=True)),
            "ratios": self.ratios(),
            "rounds": [{"preforkd": ours, "peer": peers} for ours, peers in self.rounds],
            "missing": self.missing,
            "failure": self.failure,
        }


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per outcome, in columns; the figures to the right."""
    lines = [HEADINGS, *(outcome.cells() for outcome in outcomes)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in (2, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The same table in Markdown."""
    right = (2, 3, 4)
    rule = ["---:" if column in right else "---" for column in range(len(HEADINGS))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADINGS, rule, *(each.cells() for each in outcomes)))
