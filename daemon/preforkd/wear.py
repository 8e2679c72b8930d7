"""When a worker is worn and to be replaced, pure: what it may come to, and what it has come to.

No clock, no process and no chance in here but what the caller brings along.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from preforkd import settings  # not otherwise: the library does without

MAX_REQUESTS, MAX_LIFETIME, MAX_RSS = "max_requests", "max_lifetime", "max_rss"

# The causes of death that say that a worker was worn.
WEAR = MAX_REQUESTS, MAX_LIFETIME, MAX_RSS


class Endurance(Struct, frozen=True):
    """What one worker may come to before it is replaced. 0: whatever it likes."""

    requests: int = 0
    seconds: float = 0.0  # from when it is ready
    rss: int = 0  # bytes, like those that follow
    rss_hard: int = 0  # it is killed beyond this
    pss: int = 0
    is_fresh: bool = False  # a fresh process takes each request

    @property
    def has_end(self) -> bool:
        return self != ENDLESS


ENDLESS = Endurance()


class Weight(Struct, frozen=True):
    """What a worker uses of memory, in bytes, as far as it was asked for; else 0."""

    rss: int = 0
    pss: int = 0


def draw(wanted: "settings.Service", chance: Callable[[], float]) -> Endurance:
    """What the next worker of a service may come to. Its share of the jitter is drawn once, and is its own.

    ``chance`` gives a number from 0 to 1, 1 excluded, at every call.
    """
    requests = wanted.max_requests and wanted.max_requests + int(chance() * (wanted.max_requests_jitter + 1))
    is_fresh = requests == 1 and wanted.lanes + wanted.spare_lanes == 1
    return Endurance(
        requests=0 if is_fresh else requests,
        seconds=wanted.max_lifetime and wanted.max_lifetime + chance() * wanted.max_lifetime_jitter,
        rss=wanted.max_rss,
        rss_hard=wanted.max_rss_hard,
        pss=wanted.max_pss,
        is_fresh=is_fresh,
    )


def contradictions(wanted: "settings.Service") -> Iterator[tuple[str, str]]:
    """Settings that make no sense together: which one, and what is wrong with it."""
    if 0 < wanted.max_rss_hard <= wanted.max_rss:
        yield "max_rss_hard", f"above max_rss, which is {wanted.max_rss} bytes, not {wanted.max_rss_hard}"


def worn(endurance: Endurance, requests: int, seconds: float, weight: Weight) -> str | None:
    """Why a worker is to be replaced that has ended so many requests in so many seconds; None: it is not."""
    if 0 < endurance.requests <= requests:
        return MAX_REQUESTS
    if 0 < endurance.seconds <= seconds:
        return MAX_LIFETIME
    is_too_heavy = 0 < endurance.rss < weight.rss or 0 < endurance.pss < weight.pss
    return MAX_RSS if is_too_heavy or is_unbearable(endurance, weight) else None


def is_unbearable(endurance: Endurance, weight: Weight) -> bool:
    """Whether it is so heavy that it is to be killed."""
    return 0 < endurance.rss_hard < weight.rss
