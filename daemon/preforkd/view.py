"""What ``preforkctl status`` and ``log-level`` show.

What the daemon cannot know of its workers is asked from the machine here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import psutil

from preforkd.formats import printable

_SERVICE = ("SERVICE", "TARGET", "GEN", "WORKERS", "READY", "BUSY")
_LISTENER = ("LISTENER", "SERVICE", "BACKLOG", "LIMIT", "DROPS")
_LEVEL = ("LOGGER", "LEVEL", "SETTINGS")

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def add_what_the_machine_knows(report: dict[str, Any]) -> None:
    """Add each worker's ``memory`` (resident bytes); None where it cannot be told."""
    for service in report["services"]:
        for worker in service["workers"]:
            worker["memory"] = _memory(worker["pid"])


def _memory(pid: int | None) -> int | None:
    try:
        return None if pid is None else int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def table(report: dict[str, Any], is_terminal: bool) -> str:
    """The report, for people. On a terminal the headings are bold."""
    services = report["services"]
    listeners = [
        (each["url"], service["name"], each["backlog"], each["limit"] or None, each["drops"])
        for service in services
        for each in service["listeners"]
    ]
    workers = [(service["name"], worker) for service in services for worker in service["workers"]]
    parts = [
        head(report),
        columns(_SERVICE, map(_service, services), is_terminal),
        columns(_LISTENER, listeners, is_terminal),
        columns(*worker_cells(workers), is_terminal),
    ]
    return "\n\n".join(parts)


def levels(told: dict[str, dict[str, Any]], is_terminal: bool) -> str:
    """The levels of loggers as they are, and as the settings have them. A dash: what the code says."""
    return columns(_LEVEL, ((name, each["level"], each["settings"]) for name, each in told.items()), is_terminal)


def head(report: dict[str, Any]) -> str:
    """Who it is, how it is, and what it is about."""
    return (
        "{name}: preforkd {version} on CPython {python}, pid {pid}, {state}".format(**report)
        + f", up {span(report['age'])}"
        + _now(report["now"])
        + (f"\nlast: {report['last']}" if report["last"] else "")
    )


def _now(renewal: dict[str, Any] | None) -> str:
    """The line for a reload or upgrade that is under way."""
    if renewal is None:
        return ""
    line = f"\nnow: {renewal['what']}, {renewal['phase'].replace('_', ' ')}"
    if "seconds" in renewal:
        line += f" for {span(renewal['seconds'])}, generation {renewal['generation']}"
    return line


def _service(service: dict[str, Any]) -> Sequence[object]:
    states = [worker["state"] for worker in service["workers"]]
    ready = sum(state in ("idle", "busy") for state in states)
    return service["name"], service["target"], service["generation"], size(service), ready, busy(service)


def busy(service: dict[str, Any]) -> str:
    """How many of its workers that serve are busy; where they have many lanes, how many of those: ``5/64``."""
    serving = [worker for worker in service["workers"] if worker["state"] in ("idle", "busy")]
    lanes, busy_lanes = (sum(worker[key] for worker in serving) for key in ("lanes", "busy_lanes"))
    return str(busy_lanes) if lanes == len(serving) else f"{busy_lanes}/{lanes}"


def size(service: dict[str, Any]) -> str:
    """How many workers are wanted, and at most if that is more: ``3``, ``3/20``."""
    size, most = service["size"], service["limits"]["max_children"]
    return f"{size}/{most}" if service["limits"]["max_spare"] else str(size)


Worker = tuple[str, Mapping[str, Any]]  # the name of its service, and what is known of it

# What is shown of a worker. LANES and MARK only where some worker has more than one, or some.
_WORKER: Mapping[str, Callable[[str, Mapping[str, Any]], object]] = {
    "WORKER": lambda service, worker: f"{service}#{worker['slot']}",
    "GEN": lambda _, worker: worker["generation"],
    "PID": lambda _, worker: worker["pid"],
    "STATE": lambda _, worker: worker["state"],
    "LANES": lambda _, worker: f"{worker['busy_lanes']}/{worker['lanes']}",
    "SINCE": lambda _, worker: span(worker["seconds"]),
    "PEER": lambda _, worker: worker["peer"],
    "MARK": lambda _, worker: worker["mark"],
    "REQUESTS": lambda _, worker: worker["requests"],
    "MEMORY": lambda _, worker: None if worker.get("memory") is None else f"{worker['memory'] / (1 << 20):.1f}M",
}


def worker_cells(workers: Sequence[Worker]) -> tuple[list[str], list[list[object]]]:
    """The titles, and a row for each worker."""
    unwanted = set()
    if all(worker["lanes"] == 1 for _, worker in workers):
        unwanted.add("LANES")
    if not any(worker["mark"] for _, worker in workers):
        unwanted.add("MARK")
    titles = [title for title in _WORKER if title not in unwanted]
    return titles, [[_WORKER[title](*worker) for title in titles] for worker in workers]


def columns(titles: Sequence[str], rows: Iterable[Sequence[object]], is_terminal: bool) -> str:
    """Rows below their titles, each column as wide as it must be. What is not known is a dash."""
    cells = [titles, *(["-" if cell is None else printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    if is_terminal:
        lines[0] = f"\x1b[1m{lines[0]}\x1b[0m"
    return "\n".join(lines)


def span(seconds: float) -> str:
    """``1.2s``, ``3m12s``, ``2d4h``: the two greatest units."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    at = next(index for index, (size, _) in enumerate(_UNITS) if seconds >= size)
    size, unit = _UNITS[at]
    smaller, smaller_unit = _UNITS[at + 1] if at + 1 < len(_UNITS) else (1, "s")
    return f"{seconds // size:.0f}{unit}{seconds % size // smaller:.0f}{smaller_unit}"
