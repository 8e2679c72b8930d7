"""What a line of the table says and requires, and what has to be measured for some of them. Never measures."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.probes import Side


@dataclass(frozen=True)
class Row:
    """One line of the table: the ratio of preforkd's figure to the peer's."""

    what: str
    peer: str
    figure: str  # its name among the figures of a probe
    show: str  # how it is written
    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None
    of_figure: bool = False  # the limit is on preforkd's figure, not on the ratio
    side: int = 0  # of the contest's sides, preforkd's
    against: int = -1  # and the peer's
    plot: str = ""  # the one that shows it
    at: int = 0  # where on that plot's x-axis, if it has one

    @property
    def title(self) -> str:
        return f"{self.what}, {self.peer}"

    @property
    def informs(self) -> bool:
        """Whether nothing is required: the row explains another one."""
        return self.at_least is None and self.at_most is None

    def required(self) -> str:
        if self.informs:
            return "-"
        bound = f">= {self.at_least:.2f}" if self.at_least is not None else f"<= {self.at_most:.2f}"
        aim = f", aim {self.aim:.2f}" if self.aim is not None else ""
        return f"{bound}{aim}{' (preforkd)' if self.of_figure else ''}"

    def reached(self, figure: float, ratio: float) -> bool:
        """Whether the medians of preforkd's figure and of the ratio are as required."""
        value = figure if self.of_figure else ratio
        enough = self.at_least is None or value >= self.at_least
        return enough and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Contest:
    """Sides measured by turns, and the rows that come of it: preforkd, a peer, and perhaps other set-ups of them."""

    preforkd: Side
    peer: Side
    rows: tuple[Row, ...]
    modules: tuple[str, ...] = ()  # importable, besides preforkd
    commands: tuple[str, ...] = ()  # on the PATH
    more: tuple[Side, ...] = ()

    @property
    def sides(self) -> list[Side]:
        """In the order that rows count them."""
        return [self.preforkd, *self.more, self.peer]


def rate(what: str, peer: str, at_least: float | None = None, aim: float | None = None, side: int = 0) -> Row:
    return Row(what, peer, "per_second", "{:,.0f}/s", at_least=at_least, aim=aim, side=side, plot="rates")


def cpu(what: str, peer: str, at_most: float | None = None) -> Row:
    return Row(what, peer, "cpu_us", "{:.1f} us", at_most=at_most)
