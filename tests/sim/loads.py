"""The loads: what comes when, and for how long. Each is made from a seed, so that a run can be repeated."""

import csv
from collections.abc import Callable, Iterator
from math import pi, sin
from pathlib import Path
from random import Random

from preforkd.sizing import Bounds
from tests.sim.model import Request, Scenario

TRACE = Path(__file__).parent / "trace.csv"

Rate = Callable[[float], float]
MINUTE = 60.0


def poisson(
    rate: Rate, most: float, lasts: float, takes: Callable[[float, Random], float], seed: int = 1
) -> Iterator[Request]:
    """Requests at random, ``rate(t)`` of them a second at time t and never more than ``most`` (thinning)."""
    random = Random(seed)
    at = random.expovariate(most)
    while at < lasts:
        if random.random() * most < rate(at):
            yield Request(at, takes(at, random))
        at += random.expovariate(most)


def about(mean: float) -> Callable[[float, Random], float]:
    """Service times with this mean, exponentially distributed."""
    return lambda _, random: random.expovariate(1 / mean)


def held(number: int, begins: float, ends: float) -> Iterator[Request]:
    """So many connections, opened at once and held."""
    yield from (Request(begins, ends - begins) for _ in range(number))


def recorded(path: Path = TRACE) -> Iterator[Request]:
    """What was recorded: a line for each request, with its time and how long it took, in seconds.

    ``trace.csv`` is of a daemon that served files, and now and then an archive packed on the spot, to 48 clients
    who come over three minutes, stay for one in the mean, and read at paces between 10 KB/s and all.
    """
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield Request(float(row["at"]), float(row["takes"]))


def _steps(at: float) -> float:
    return (5.0, 50.0, 15.0)[min(int(at // (5 * MINUTE)), 2)]


def _bursts(at: float) -> float:
    return 75.0 if at % (2 * MINUTE) < 5 else 1.0


def _leak(at: float, random: Random) -> float:
    """A service time that doubles every five minutes, until what leaks is mended."""
    mean = 0.2 * 2 ** (at / (5 * MINUTE)) if at < 25 * MINUTE else 0.2
    return random.expovariate(1 / mean)


BOUNDS = Bounds(64, min_spare=2, max_spare=6)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "held",
            "40 connections come at once, are held for five minutes, and leave at once",
            BOUNDS,
            lambda: held(40, 10, 310),
            8 * MINUTE,
        ),
        Scenario(
            "steady",
            "25 requests a second of 0.4 s, at random: the pool finds its size and keeps it",
            BOUNDS,
            lambda: poisson(lambda _: 25, 25, 3600, about(0.4)),
            3600,
        ),
        Scenario(
            "steps",
            "5, then 50, then 15 requests a second, five minutes each",
            BOUNDS,
            lambda: poisson(_steps, 50, 15 * MINUTE, about(0.4)),
            15 * MINUTE,
        ),
        Scenario(
            "sine",
            "0 to 50 requests a second and back, every ten minutes",
            BOUNDS,
            lambda: poisson(lambda at: 25 - 25 * sin(pi / 2 + at * 2 * pi / 600), 50, 30 * MINUTE, about(0.4)),
            30 * MINUTE,
        ),
        Scenario(
            "bursts",
            "75 requests a second for five seconds, every two minutes: what is retired is soon missed",
            BOUNDS,
            lambda: poisson(_bursts, 75, 30 * MINUTE, about(0.4)),
            30 * MINUTE,
        ),
        Scenario(
            "slow boot",
            "the same steps, with workers that take eight seconds to boot",
            BOUNDS,
            lambda: poisson(_steps, 50, 15 * MINUTE, about(0.4)),
            15 * MINUTE,
            boot=8.0,
        ),
        Scenario(
            "leak",
            "8 requests a second whose service time grows from 0.2 s to 6.4 s, until it is mended",
            BOUNDS,
            lambda: poisson(lambda _: 8, 8, 35 * MINUTE, _leak),
            35 * MINUTE,
        ),
        Scenario(
            "crash loop",
            "from the first to the fourth minute whoever is forked dies at once, while the load rises",
            BOUNDS,
            lambda: poisson(lambda at: 5 if at < 2 * MINUTE else 38, 38, 8 * MINUTE, about(0.4)),
            8 * MINUTE,
            crashes=(MINUTE, 4 * MINUTE),
        ),
        Scenario(
            "full",
            "more than the limit can serve for two minutes, and then little",
            Bounds(16, min_spare=2, max_spare=6),
            lambda: poisson(lambda at: 50 if 60 < at < 180 else 2, 50, 8 * MINUTE, about(0.4)),
            8 * MINUTE,
        ),
        Scenario(
            "recorded",
            "661 requests of clients who read slowly, as recorded in trace.csv",
            Bounds(16, min_spare=1, max_spare=3),
            recorded,
            6 * MINUTE,
        ),
    )
}
