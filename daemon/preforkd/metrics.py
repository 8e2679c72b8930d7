"""The table of metrics, declared once: the exporter collects by it and README prints it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Declared:
    """One metric family, as Prometheus sees it."""

    kind: str
    labels: tuple[str, ...]
    help: str


METRICS = {
    "preforkd_build_info": Declared("gauge", ("version", "python"), "Always 1; the labels tell what is running."),
    "preforkd_start_time_seconds": Declared("gauge", (), "When the master started, since the epoch."),
    "preforkd_master_heartbeat_timestamp_seconds": Declared(
        "gauge", (), "When the master's loop last showed that it turns."
    ),
    "preforkd_reloads_total": Declared("counter", ("result",), "Reloads: done, rolled_back, or refused at once."),
    "preforkd_last_reload_success_timestamp_seconds": Declared("gauge", (), "When a reload was done; 0: none was yet."),
    "preforkd_reload_duration_seconds": Declared("gauge", (), "How long the last reload took, however it ended."),
    "preforkd_generation": Declared("gauge", ("service",), "Generation of code and settings that is serving."),
    "preforkd_workers": Declared("gauge", ("service", "state"), "Workers: starting, idle, busy or draining."),
    "preforkd_workers_max": Declared("gauge", ("service",), "Workers wanted at most."),
    "preforkd_pool_utilization_ratio": Declared("gauge", ("service",), "Busy lanes of all lanes, from 0 to 1."),
    "preforkd_worker_spawns_total": Declared("counter", ("service",), "Workers asked for."),
    "preforkd_worker_exits_total": Declared("counter", ("service", "reason"), "Workers that have left, by cause."),
    "preforkd_requests_total": Declared(
        "counter", ("service", "outcome"), "Requests: ok, error, refused by verify_request, killed with their worker."
    ),
    "preforkd_request_duration_seconds": Declared("histogram", ("service",), "From accepting a request to its end."),
    "preforkd_busy_seconds_total": Declared(
        "counter", ("service",), "Time that lanes spent on requests that have ended."
    ),
    "preforkd_listen_backlog": Declared(
        "gauge", ("service", "listener"), "Connections, or bytes of datagrams, that wait to be taken."
    ),
    "preforkd_listen_backlog_limit": Declared("gauge", ("service", "listener"), "How much may wait; 0: not known."),
    "preforkd_listen_drops_total": Declared(
        "counter", ("service", "listener"), "Datagrams that the kernel dropped for want of room."
    ),
    "preforkd_worker_resident_memory_bytes": Declared("gauge", ("service",), "Resident memory of all workers, summed."),
    "preforkd_worker_proportional_memory_bytes": Declared(
        "gauge", ("service",), "The same with shared pages divided among their users; at most 30 s old."
    ),
    "preforkd_worker_cpu_seconds_total": Declared(
        "counter", ("service",), "User and system time of workers, dead ones included."
    ),
    "preforkd_worker_open_fds": Declared("gauge", ("service",), "Open descriptors of all workers, summed."),
}


def reference() -> str:
    """The table as README shows it."""
    rows = [
        f"| `{name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |" for name, metric in METRICS.items()
    ]
    return "\n".join(["| metric | type | labels | meaning |", "| --- | --- | --- | --- |", *rows])
