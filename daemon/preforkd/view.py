"""What ``preforkctl status`` shows. What the daemon cannot know of its workers is asked from the machine here."""

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import psutil

_SERVICE = ("SERVICE", "TARGET", "GEN", "WORKERS", "READY", "BUSY")
_LISTENER = ("LISTENER", "SERVICE", "BACKLOG", "LIMIT", "DROPS")
_WORKER = ("WORKER", "GEN", "PID", "STATE", "SINCE", "PEER", "REQUESTS", "MEMORY")

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def add_what_the_machine_knows(report: dict[str, Any]) -> None:
    """Add each worker's ``peer`` (whom it serves) and ``memory`` (resident bytes); None where it cannot be told."""
    peers = _peers()
    for service in report["services"]:
        ports = {urlsplit(listener["url"]).port for listener in service["listeners"] if "://" in listener["url"]}
        for worker in service["workers"]:
            found = [peer for port, peer in peers.get(worker["pid"], ()) if port in ports]
            worker["peer"] = ", ".join(found) or None
            worker["memory"] = _memory(worker["pid"])


def _peers() -> dict[int, list[tuple[int, str]]]:
    """By pid, the connections that it holds: the port at our end, and the address at the other."""
    found: dict[int, list[tuple[int, str]]] = {}
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return found
    for each in connections:
        if each.pid is not None and each.raddr and each.laddr:
            host = f"[{each.raddr.ip}]" if ":" in each.raddr.ip else each.raddr.ip
            found.setdefault(each.pid, []).append((each.laddr.port, f"{host}:{each.raddr.port}"))
    return found


def _memory(pid: int | None) -> int | None:
    try:
        return None if pid is None else int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def table(report: dict[str, Any], is_terminal: bool) -> str:
    """The report, for people. On a terminal the headings are bold."""
    services = report["services"]
    parts = [
        "{name}: preforkd {version} on CPython {python}, pid {pid}, {state}".format(**report)
        + f", up {_span(report['age'])}"
        + _now(report["now"])
        + (f"\nlast: {report['last']}" if report["last"] else ""),
        _columns(_SERVICE, map(_service, services), is_terminal),
        _columns(
            _LISTENER,
            (
                (each["url"], service["name"], each["backlog"], each["limit"] or None, each["drops"])
                for service in services
                for each in service["listeners"]
            ),
            is_terminal,
        ),
        _columns(
            _WORKER,
            (_worker(service["name"], worker) for service in services for worker in service["workers"]),
            is_terminal,
        ),
    ]
    return "\n\n".join(parts)


def _now(renewal: dict[str, Any] | None) -> str:
    """The line for a reload or upgrade that is under way."""
    if renewal is None:
        return ""
    line = f"\nnow: {renewal['what']}, {renewal['phase'].replace('_', ' ')}"
    if "seconds" in renewal:
        line += f" for {_span(renewal['seconds'])}, generation {renewal['generation']}"
    return line


def _service(service: dict[str, Any]) -> Sequence[object]:
    states = [worker["state"] for worker in service["workers"]]
    ready, busy = sum(state in ("idle", "busy") for state in states), states.count("busy")
    return service["name"], service["target"], service["generation"], service["size"], ready, busy


def _worker(service: str, worker: dict[str, Any]) -> Sequence[object]:
    return (
        f"{service}#{worker['slot']}",
        worker["generation"],
        worker["pid"],
        worker["state"],
        _span(worker["seconds"]),
        worker["peer"],
        worker["requests"],
        None if worker["memory"] is None else f"{worker['memory'] / (1 << 20):.1f}M",
    )


def _columns(titles: Sequence[str], rows: Iterable[Sequence[object]], is_terminal: bool) -> str:
    """Rows below their titles, each column as wide as it must be. What is not known is a dash."""
    cells = [titles, *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    if is_terminal:
        lines[0] = f"\x1b[1m{lines[0]}\x1b[0m"
    return "\n".join(lines)


def _span(seconds: float) -> str:
    """``1.2s``, ``3m12s``, ``2d4h``: the two greatest units."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    at = next(index for index, (size, _) in enumerate(_UNITS) if seconds >= size)
    size, unit = _UNITS[at]
    smaller, smaller_unit = _UNITS[at + 1] if at + 1 < len(_UNITS) else (1, "s")
    return f"{seconds // size:.0f}{unit}{seconds % size // smaller:.0f}{smaller_unit}"
