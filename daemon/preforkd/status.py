"""What the master knows of itself and its workers, as values for ``preforkctl status``. It asks nobody for it."""

from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING

from preforkd.deaths import held_by
from preforkd.plan import State
from preforkd_workers.scoreboard import BACKLOG, BACKLOG_LIMIT, DROPS, ERRORS

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
    words, bounds, blocks = service.board.listeners(), service.breathing.bounds, [*service.board.blocks()]
    children = [service.pool.children[slot] for slot in sorted(service.pool.children)]
    return {
        "name": service.name,
        "target": None if service.is_leaving else service.newest.spec.target,
        "generation": service.pool.wanted.generation,
        "draining": service.pool.draining(),
        "size": service.pool.size,
        "limits": {"max_children": bounds.most, "min_spare": bounds.min_spare, "max_spare": bounds.max_spare},
        "requests": sum(rows.ended for rows in blocks),
        "errors": sum(rows.total(ERRORS) for rows in blocks),
        "listeners": [_listener(url, words[url]) for url in words],
        "workers": [_worker(child) for child in children],
    }


def _listener(url: str, words: memoryview) -> dict[str, object]:
    return {"url": url, "backlog": words[BACKLOG], "limit": words[BACKLOG_LIMIT], "drops": words[DROPS]}


def _worker(child: "Child") -> dict[str, object]:
    state, since, held = child.state.value, child.since, None
    if child.state is not State.BOOTING:
        held = held_by(child.rows, child.urls, monotonic_ns())
    if child.state is State.READY:
        state = "busy" if held else "idle"
    return {
        "slot": child.slot,
        "generation": child.generation,
        "pid": child.pid,
        "state": state,
        "busy": held is not None,
        "lanes": child.lanes,
        "busy_lanes": child.rows.busy,
        "seconds": round(held.seconds if held and state == "busy" else max(0.0, monotonic() - since), 3),
        "peer": (held.peer or None) if held else None,
        "mark": (held.mark or None) if held else None,
        "requests": child.requests,
        "errors": child.errors,
    }
