"""What a daemon costs while nobody asks anything of it: the master's ticks, and scrapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import monotonic, sleep

from tests.bench import procfs
from tests.bench.probes import Figures, Probe, Side
from tests.bench.scrapes import scrape
from tests.bench.servers import Opening
from tests.bench.tools import Tools

SCRAPES = 5


def at_rest(opening: Opening) -> Side:
    """The master's CPU time for each second, and how long a scrape takes, both in ms. In whole seconds, as it ticks."""

    @contextmanager
    def side(tools: Tools) -> Iterator[Probe]:
        with opening(tools) as server:

            def probe(seconds: float) -> Figures:
                spent, begun = procfs.cpu_seconds([server.pid]), monotonic()
                sleep(max(1, round(seconds)))
                spent, passed = procfs.cpu_seconds([server.pid]) - spent, monotonic() - begun
                scrapes = [scrape(server.metrics) * 1000 for _ in range(SCRAPES)]
                return {
                    "cpu_ms": spent / passed * 1000,
                    "scrape_ms": median(scrapes),
                    "longest_scrape_ms": max(scrapes),
                }

            yield probe

    return side
