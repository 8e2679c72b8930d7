"""Who is compared with whom, by what, and what ratio is required: one table. Never runs anything itself."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.probes import GET, LINE, Side, exchanges, memory, pages, time_to_ready
from tests.bench.servers import PROCESSES, gunicorn, in_c, in_python, preforkd

CLIENTS = 8
ECHO, TALK, DATAGRAM = (f"tests/bench/handlers.py:{name}" for name in ("Echo", "Talk", "Datagram"))
PAGE = "tests/bench/web.py:Page"
UPPER = "preforkd_workers.samples:Upper"


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
    """Two sides measured by turns, and the rows that come of it."""

    preforkd: Side
    peer: Side
    rows: tuple[Row, ...]
    modules: tuple[str, ...] = ()  # importable, besides preforkd
    commands: tuple[str, ...] = ()  # on the PATH


def rate(what: str, peer: str, at_least: float, aim: float | None = None) -> Row:
    return Row(what, peer, "per_second", "{:,.0f}/s", at_least=at_least, aim=aim)


def connect(peer: Side, *rows: Row, modules: tuple[str, ...] = ()) -> Contest:
    return Contest(exchanges(preforkd(ECHO), "connect", CLIENTS), peer, rows, modules)


CONNECT = "connect-echo-close TCP"
CPU = "CPU time per connection"
C = "C pre-fork"
GUNICORN = "gunicorn sync"
CONTESTS = (
    connect(
        exchanges(in_c("connect"), "connect", CLIENTS),
        rate(CONNECT, C, at_least=0.80, aim=0.90),
        Row(CPU, C, "cpu_us", "{:.1f} us", at_most=2.2),
    ),
    connect(
        exchanges(in_python("threading"), "connect", CLIENTS),
        rate(CONNECT, "ThreadingTCPServer", at_least=4.5),
    ),
    connect(
        exchanges(in_python("forking"), "connect", CLIENTS),
        rate(CONNECT, "ForkingTCPServer", at_least=20),
    ),
    connect(
        exchanges(in_python("uvloop-streams"), "connect", CLIENTS),
        rate(CONNECT, "uvloop streams", at_least=1.3),
        modules=("uvloop",),
    ),
    connect(
        exchanges(in_python("uvloop-protocol"), "connect", CLIENTS),
        rate(CONNECT, "uvloop Protocol", at_least=1.0),
        modules=("uvloop",),
    ),
    Contest(  # a worker holds one connection at a time: no more clients than workers
        exchanges(preforkd(TALK), "persistent", PROCESSES),
        exchanges(in_c("persistent"), "persistent", PROCESSES),
        (rate("persistent echo TCP", C, at_least=0.85),),
    ),
    Contest(
        exchanges(preforkd(DATAGRAM, "udp"), "udp", CLIENTS),
        exchanges(in_c("udp"), "udp", CLIENTS),
        (rate("echo UDP", C, at_least=0.45),),
    ),
    Contest(
        exchanges(preforkd(DATAGRAM, "udp"), "udp", CLIENTS),
        exchanges(in_python("threading-udp"), "udp", CLIENTS),
        (rate("echo UDP", "ThreadingUDPServer", at_least=10),),
    ),
    Contest(
        pages(preforkd(PAGE), CLIENTS),
        pages(gunicorn(), CLIENTS),
        (
            rate("HTTP by wrk, http.server", GUNICORN, at_least=2.0),
            Row("CPU time per page, http.server", GUNICORN, "cpu_us", "{:.1f} us"),
        ),
        modules=("gunicorn",),
        commands=("wrk",),
    ),
    Contest(
        memory(lambda workers: preforkd(UPPER, processes=workers), LINE),
        memory(gunicorn, GET),
        (Row("memory of one more worker", GUNICORN, "mib", "{:.2f} MiB", at_most=2.0, of_figure=True),),
        modules=("gunicorn",),
    ),
    Contest(
        time_to_ready(preforkd(UPPER), LINE),
        time_to_ready(gunicorn(), GET),
        (Row("time to ready, sample", GUNICORN, "ms", "{:.0f} ms", at_most=1.2),),
        modules=("gunicorn",),
    ),
    Contest(
        time_to_ready(preforkd(PAGE), GET),
        time_to_ready(gunicorn(), GET),
        (Row("time to ready, http.server", GUNICORN, "ms", "{:.0f} ms", at_most=1.2),),
        modules=("gunicorn",),
    ),
)
