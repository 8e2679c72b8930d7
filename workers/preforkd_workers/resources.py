"""What a worker is given of the machine: its priority, its CPUs, and what the kernel lets it use.

It is applied by the worker itself, after the fork and before any code of the target runs in it. What the settings say
of a limit is read here as well, so that who checks them and who applies them cannot differ.
"""

import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from msgspec import Struct, field

SPREAD = "spread"

# The limits of setrlimit(2) that this system knows, by name: nofile, as, core …
RLIMITS = {
    name.removeprefix("RLIMIT_").lower(): getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_")
}

Pair = tuple[int, int]  # soft and hard; resource.RLIM_INFINITY for none


class Refused(Exception):
    """The system would not have it: in one line what, why, and what to do."""


class Resources(Struct, frozen=True):
    """As the settings have them; what is 0 or empty stays as it was inherited."""

    nice: int = 0  # added to the master's
    cpu_affinity: str = ""
    oom_score_adjust: int = 0  # added to the master's
    rlimits: Mapping[str, Pair] = field(default_factory=dict)


def apply(given: Resources, slot: int) -> None:
    """Have this process live with what it is given. Raises Refused."""
    if given.nice:
        with _refusals("nice", given.nice, "needs CAP_SYS_NICE, or a higher RLIMIT_NICE"):
            os.nice(given.nice)
    if given.cpu_affinity:
        with _refusals("cpu_affinity", given.cpu_affinity, "name CPUs that the machine, or the cpuset, has"):
            os.sched_setaffinity(0, _cpus(given.cpu_affinity, slot))
    if given.oom_score_adjust:
        with _refusals("oom_score_adjust", given.oom_score_adjust, "less than was inherited needs CAP_SYS_RESOURCE"):
            _adjust_oom_score(given.oom_score_adjust)
    for name, pair in given.rlimits.items():
        with _refusals("rlimits", f"{name}={_shown(pair)}", "more than was inherited needs CAP_SYS_RESOURCE"):
            resource.setrlimit(RLIMITS[name], pair)


@contextmanager
def _refusals(setting: str, value: object, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # the latter: resource's word for EPERM and EINVAL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Refused(f"{setting} = {value}: {reason}; {advice}") from None


def _cpus(affinity: str, slot: int) -> set[int]:
    """The CPUs for the worker in this slot: those of the list, or by turns one of those that were inherited."""
    if affinity != SPREAD:
        return cpus_in(affinity)
    allowed = sorted(os.sched_getaffinity(0))
    return {allowed[slot % len(allowed)]}


def _adjust_oom_score(by: int) -> None:
    with open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:  # proc(5): from -1000 to 1000
        file.write(b"%d" % max(-1000, min(1000, int(file.read()) + by)))


def _shown(pair: Pair) -> str:
    return ":".join("unlimited" if each == resource.RLIM_INFINITY else str(each) for each in dict.fromkeys(pair))


# What the settings say.


def cpus_in(text: str) -> set[int]:
    """The numbers in a list such as ``0,2-3``. Raises ValueError when it is none."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or not first.isdecimal() or numbers[-1] >= 1 << 16:
            raise ValueError(f"{part} is no range of CPUs")
        found.update(numbers)
    return found


def rlimits_in(pairs: Mapping[str, object], number: Callable[[object], int]) -> dict[str, Pair]:
    """The limits in a table of them: ``soft:hard``, or one for both, each a number or "unlimited".

    ``number`` reads a number with whatever suffixes there are, and raises ValueError, as this does.
    """
    found = {}
    for name, raw in pairs.items():
        if name not in RLIMITS:
            raise ValueError(f"names of setrlimit(2), {', '.join(sorted(RLIMITS))}; not {name!r}")
        parts = raw.split(":") if isinstance(raw, str) else [raw]
        if len(parts) > 2:
            raise ValueError(f"for {name} one limit, or soft:hard; not {raw!r}")
        soft, hard = (_limit(name, part, number) for part in (parts[0], parts[-1]))
        if hard != resource.RLIM_INFINITY and not 0 <= soft <= hard:
            raise ValueError(f"for {name} a soft limit that is not above the hard one, not {raw!r}")
        found[name] = soft, hard
    return found


def _limit(name: str, raw: object, number: Callable[[object], int]) -> int:
    try:
        limit = resource.RLIM_INFINITY if raw == "unlimited" else number(raw)
    except ValueError:
        limit = -1
    if raw != "unlimited" and (isinstance(raw, bool) or not 0 <= limit < 1 << 63):
        raise ValueError(f'for {name} a whole number, text such as "2G" or "1024:4096", or "unlimited"; not {raw!r}')
    return limit
