"""What was measured, as a table for people and as JSON for programs. Never measures."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from tests.bench.contests import Row
from tests.bench.probes import Figures

HEADINGS = ("what", "peer", "preforkd", "peer's", "ratio", "required", "verdict", "spread of ratio")


@dataclass(frozen=True)
class Outcome:
    """A row and its rounds, each preforkd's figures and the peer's; or why there are none."""

    row: Row
    rounds: Sequence[tuple[Figures, Figures]] = field(default=())
    missing: str = ""  # a peer that is not installed
    failure: str = ""  # what could not run

    def ratios(self) -> list[float]:
        """Preforkd's figure by the peer's, one for each round."""
        return [ours[self.row.figure] / peers[self.row.figure] for ours, peers in self.rounds]

    def errors(self) -> tuple[int, int]:
        """Failed exchanges of preforkd and of the peer, all rounds."""
        ours, peers = (sum(int(figures[side].get("errors", 0)) for figures in self.rounds) for side in (0, 1))
        return ours, peers

    def cells(self) -> tuple[str, ...]:
        row = self.row
        if not self.rounds:
            verdict = f"not measured: {self.missing} is not installed" if self.missing else "could not run"
            return (row.what, row.peer, "-", "-", "-", row.required(), verdict, "-")
        ours, peers = (median(figures[side][row.figure] for figures in self.rounds) for side in (0, 1))
        ratios = self.ratios()
        verdict = "reached" if row.reached(ours, median(ratios)) else "NOT reached"
        verdict = "for information" if row.informs else verdict
        if any(self.errors()):
            verdict += " (failed exchanges: {} and {})".format(*self.errors())
        return (
            row.what, row.peer, row.show.format(ours), row.show.format(peers), f"{median(ratios):.2f}",
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


def machine() -> str:
    """Where it was measured, in one line."""
    cores = len(os.sched_getaffinity(0))
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"machine: {cpu_model()}, {cores} cores, Linux {platform.release()}, {python}"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
