"""preforkd with itself: what metrics cost, pools of many sizes, and workers that do nothing."""

from __future__ import annotations

from tests.bench.probes import exchanges
from tests.bench.rest import at_rest
from tests.bench.rows import Contest, Row
from tests.bench.servers import PROCESSES, in_c, preforkd

CLIENTS = 8
MANY_CLIENTS = 128
ECHO = "tests/bench/handlers.py:Echo"
UPPER = "preforkd_workers.samples:Upper"
CONNECT = "connect-echo-close TCP"
CPU = "CPU time per connection"
SIZES = (1, 2, 4, 8, 16, 32, 64)  # processes


def metrics() -> Contest:
    """An exporter that is scraped once a second. The scoreboard is always there, and written to."""
    return Contest(
        exchanges(preforkd(ECHO), "connect", CLIENTS, scraped=True),
        exchanges(preforkd(ECHO, has_metrics=False), "connect", CLIENTS),
        (Row(f"{CONNECT}, metrics scraped", "preforkd, no exporter", "per_second", "{:,.0f}/s", at_least=0.95),),
    )


def sizes() -> Contest:
    """The same load on pools of many sizes: what is promised of a few processes holds for many.

    There are more clients than processes, so that those of every size have as much to do.
    """
    ours = [exchanges(preforkd(ECHO, processes=size), "connect", MANY_CLIENTS) for size in SIZES]
    theirs = [exchanges(in_c("connect", size), "connect", MANY_CLIENTS) for size in SIZES]
    rows = [row for index, size in enumerate(SIZES) for row in of_size(index, size)]
    few, most = SIZES.index(PROCESSES), len(SIZES) - 1
    size, peer = f"{SIZES[most]} processes", f"preforkd, {PROCESSES} processes"
    rows.append(Row(f"{CONNECT}, {size}", peer, "per_second", "{:,.0f}/s", at_least=0.9, side=most, against=few))
    rows.append(Row(f"{CPU}, {size}", peer, "cpu_us", "{:.1f} us", at_most=1.5, side=most, against=few))
    return Contest(ours[0], theirs[-1], tuple(rows), more=(*ours[1:], *theirs[:-1]))


def of_size(index: int, size: int) -> tuple[Row, Row]:
    """Sides are those of preforkd in the order of SIZES, then those in C."""
    what, peer = f"{size} process{'es' if size > 1 else ''}", "C pre-fork, as many"
    against = len(SIZES) + index
    return (
        Row(f"{CONNECT}, {what}", peer, "per_second", "{:,.0f}/s", 0.8,
            side=index, against=against, plot="sizes", at=size),
        Row(f"{CPU}, {what}", peer, "cpu_us", "{:.1f} us", at_most=2.2,
            side=index, against=against, plot="sizes", at=size),
    )  # fmt: skip


def slots() -> Contest:
    """The master, and the exporter, of many workers."""
    few, many, most = (at_rest(preforkd(UPPER, processes=workers)) for workers in (PROCESSES, 512, 1000))
    peer, cpu, scrape = f"preforkd, {PROCESSES} workers", "CPU time of the master at rest, a second", "scrape"
    return Contest(
        many,
        few,
        (
            Row(f"{cpu}, 512 workers", peer, "cpu_ms", "{:.2f} ms", at_most=10, of_figure=True),
            Row(f"{cpu}, 1,000 workers", peer, "cpu_ms", "{:.2f} ms", side=1),
            Row(f"{scrape}, 512 workers", peer, "scrape_ms", "{:.1f} ms"),
            Row(f"{scrape}, 1,000 workers", peer, "scrape_ms", "{:.1f} ms", side=1),
        ),
        more=(most,),
    )


POOLS = (metrics(), sizes(), slots())
