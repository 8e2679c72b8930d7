"""What the master knows of itself and its workers, as values for ``preforkctl status``. It asks nobody for it."""

from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING

from preforkd.plan import State
from preforkd_workers.scoreboard import BACKLOG, BACKLOG_LIMIT, DROPS, SINCE

if TYPE_CHECKING:
    from preforkd.children import Child
    from preforkd.master import Master
    from preforkd.service import Service


def report(master: "Master") -> dict[str, object]:
    """Everything. Ages and times in a state are in seconds."""
    return {
        **master.identity(),
        "state": _state(master),
        "age": round(monotonic() - master.started, 3),
        "now": master.renewals.report(),
        "last": str(master.renewals.last) if master.renewals.last else None,
        "services": [_service(service) for service in master.roster],
    }


def _state(master: "Master") -> str:
    if master.is_stopping:
        return "stopping"
    if master.renewals.reload is not None:
        return f"reloading: {master.renewals.reload.phase.value.replace('_', ' ')}"
    if master.renewals.preflight is not None:
        return "upgrading: preflight"
    if master.is_drained:
        return "drained"
    return "serving" if master.is_ready else "starting"


def _service(service: "Service") -> dict[str, object]:
    service.sample_listeners()
    words = service.board.listeners()
    children = [service.pool.children[slot] for slot in sorted(service.pool.children)]
    return {
        "name": service.name,
        "target": None if service.is_leaving else service.newest.spec.target,
        "generation": service.pool.wanted.generation,
        "draining": service.pool.draining(),
        "size": service.pool.size,
        "listeners": [_listener(url, words[url]) for url in words],
        "workers": [_worker(child) for child in children],
    }


def _listener(url: str, words: memoryview) -> dict[str, object]:
    return {"url": url, "backlog": words[BACKLOG], "limit": words[BACKLOG_LIMIT], "drops": words[DROPS]}


def _worker(child: "Child") -> dict[str, object]:
    state, seconds = child.state.value, monotonic() - child.since
    if child.state is State.READY:
        state = "busy" if child.busy else "idle"
        if child.busy:  # since the request began; a lane and the master share the clock
            seconds = max(0.0, (monotonic_ns() - child.row[SINCE]) / 1e9)
    return {
        "slot": child.slot,
        "generation": child.generation,
        "pid": child.pid,
        "state": state,
        "busy": child.busy,
        "seconds": round(seconds, 3),
        "requests": child.requests,
    }
