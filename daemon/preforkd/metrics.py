"""The table of metrics, declared once: the exporter collects by it and docs/reference.md prints it."""

from collections.abc import Mapping

from msgspec import Struct


class Declared(Struct, frozen=True):
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
    "preforkd_last_reload_successful": Declared(
        "gauge", (), "1 when the last reload was done, or none was yet; else 0."
    ),
    "preforkd_last_reload_success_timestamp_seconds": Declared("gauge", (), "When a reload was done; 0: none was yet."),
    "preforkd_reload_duration_seconds": Declared("gauge", (), "How long the last reload took, however it ended."),
    "preforkd_generation": Declared("gauge", ("service",), "Generation of code and settings that is serving."),
    "preforkd_workers": Declared("gauge", ("service", "state"), "Workers: starting, idle, busy or draining."),
    "preforkd_workers_max": Declared("gauge", ("service",), "Workers wanted at most."),
    "preforkd_lanes": Declared("gauge", ("service", "state"), "Lanes of all workers: idle or busy."),
    "preforkd_workers_wanted": Declared("gauge", ("service",), "Workers wanted now: fewer where a pool is elastic."),
    "preforkd_pool_utilization_ratio": Declared("gauge", ("service",), "Busy lanes of all lanes, from 0 to 1."),
    "preforkd_worker_spawns_total": Declared("counter", ("service",), "Workers asked for."),
    "preforkd_worker_exits_total": Declared("counter", ("service", "reason"), "Workers that have left, by cause."),
    "preforkd_slots_held_back": Declared(
        "gauge", ("service",), "Slots left empty for a while: their workers died young again and again."
    ),
    "preforkd_requests_total": Declared(
        "counter", ("service", "outcome"), "Requests: ok, error, refused by verify_request, killed with their worker."
    ),
    "preforkd_turned_away_total": Declared(
        "counter", ("service", "reason"), "Connections closed at the door: max_per_client, or full (when_full = close)."
    ),
    "preforkd_idle_timeouts_total": Declared(
        "counter", ("service",), "Connections whose reading side was ended after idle_timeout."
    ),
    "preforkd_access_log_dropped_lines_total": Declared(
        "counter", ("service",), "Lines of the access log that nobody was ready to take."
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
    "preforkd_datagrams_truncated_total": Declared(
        "counter", ("service",), "Datagrams longer than max_packet_size: the handler saw their beginning."
    ),
    "preforkd_worker_resident_memory_bytes": Declared("gauge", ("service",), "Resident memory of all workers, summed."),
    "preforkd_worker_proportional_memory_bytes": Declared(
        "gauge", ("service",), "The same with shared pages divided among their users; at most 30 s old."
    ),
    "preforkd_worker_cpu_seconds_total": Declared(
        "counter", ("service",), "User and system time of workers, dead ones included."
    ),
    "preforkd_worker_open_fds": Declared("gauge", ("service",), "Open descriptors of all workers, summed."),
    "preforkd_worker_open_fds_ratio": Declared(
        "gauge", ("service",), "Open descriptors of the worker nearest to its limit, as a part of that."
    ),
    "preforkd_master_open_fds_ratio": Declared("gauge", (), "Open descriptors of the master, as a part of its limit."),
    "preforkd_log_dropped_lines_total": Declared(
        "counter", ("service",), "Lines of the log that nobody was ready to take; without a service, the daemon's own."
    ),
    "preforkd_metrics_bad_files": Declared(
        "gauge", (), "Files of the targets' own metrics that are damaged and were left out of this scrape."
    ),
}


def reference(table: Mapping[str, Declared] = METRICS) -> str:
    """The table as the reference shows it."""
    rows = [
        f"| `{name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |" for name, metric in table.items()
    ]
    return "\n".join(["| metric | type | labels | meaning |", "| --- | --- | --- | --- |", *rows])
