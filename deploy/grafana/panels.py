"""What the dashboard shows: rows of panels, and what each asks for. Of Grafana it knows units and colours, no more.

In an expression a metric of ours stands by its name: of which daemons and services it is wanted is added, and a name
that is in no table of metrics is an error (``dashboard.py``). ``WINDOW`` is as long as a rate needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW = "$__rate_interval"

# Colours of Grafana's palette, for lines that are called so. All others have its classic ones.
GOOD, FAIR, BAD, WORST, CALM, GREY = "green", "yellow", "red", "dark-red", "blue", "#808080"
_OF_WORKERS = {"idle": GOOD, "busy": CALM, "starting": FAIR, "draining": GREY}
_OF_PROGRAMS = {"RUNNING": GOOD, "STARTING": CALM, "STOPPED": GREY, "BACKOFF": FAIR, "EXITED": FAIR, "FATAL": BAD}
COLOURS: Mapping[str, Mapping[str, str]] = {
    "{{outcome}}": {"ok": GOOD, "refused": FAIR, "error": BAD, "killed": WORST},
    "{{state}}": _OF_WORKERS | _OF_PROGRAMS,
    "{{result}}": {"done": GOOD, "rolled_back": BAD, "refused": FAIR},
    "{{reason}}": {"drained": GOOD, "crash": BAD, "boot": BAD, "oom": WORST, "deadline": FAIR},
    **{name: {name: colour} for name, colour in {"p50": GOOD, "p95": FAIR, "p99": BAD}.items()},
    **{name: {name: colour} for name, colour in {"ready": GOOD, "wanted": CALM, "at most": GREY}.items()},
}

# What a line is called: of a service, of a listener, of a daemon, of a program of supervisord.
SERVICE = "{{service}} {{instance}}"
LISTENER = "{{listener}} {{instance}}"
DAEMON = "{{instance}}"
PROGRAM = "{{group}}:{{name}}"


@dataclass(frozen=True)
class Panel:
    """Lines over time. ``queries``: by what their lines are called. ``limits``: where it is fair, and where bad."""

    title: str
    unit: str
    queries: Mapping[str, str]
    about: str = ""  # beyond what the metrics say of themselves
    width: int = 8  # of 24
    limits: tuple[float, ...] = ()
    most: float | None = None
    is_stacked: bool = False
    is_in_steps: bool = False


@dataclass(frozen=True)
class Figure(Panel):
    """One number, as it is now, or a word in its place; or what it is called."""

    width: int = 3
    words: Mapping[float, tuple[str, str]] = field(default_factory=dict)  # with a colour
    is_name: bool = False


@dataclass(frozen=True)
class Heatmap(Panel):
    """Buckets of a histogram over time."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]
    is_folded: bool = False


def quantile(of: float, by: str = "le") -> str:
    return f"histogram_quantile({of}, sum by ({by}) (rate(preforkd_request_duration_seconds_bucket[{WINDOW}])))"


def failing(by: str = "") -> str:
    """Requests that raised or died with their worker, of all that there were."""
    failed, every = (
        f"sum{by} (rate(preforkd_requests_total{outcome}[{WINDOW}]))" for outcome in ('{outcome=~"error|killed"}', "")
    )
    return f"{failed} / ({every} > 0)"


UP = {0.0: ("down", BAD), 1.0: ("up", GOOD)}

ROWS = (
    Row(
        "Overview",
        (
            Figure("Daemons", "none", {"": "min(up)"}, "Of several the worst.", words=UP),
            Figure("Version", "none", {"{{version}}": "count by (version) (preforkd_build_info)"}, is_name=True),
            Figure("Running for", "s", {"": "time() - max(preforkd_start_time_seconds)"}, "Of several the youngest."),
            Figure("Workers ready", "none", {"": 'sum(preforkd_workers{state=~"idle|busy"})'}),
            Figure(
                "Utilization", "percentunit", {"": "max(preforkd_pool_utilization_ratio)"},
                "Of several services the busiest.", limits=(0.7, 0.9),
            ),
            Figure("Requests", "reqps", {"": f"sum(rate(preforkd_requests_total[{WINDOW}]))"}),
            Figure("Failing", "percentunit", {"": failing()}, "error and killed, of all.", limits=(0.01, 0.05)),
            Figure("99 % within", "s", {"": quantile(0.99)}),
            Panel(
                "Requests", "reqps",
                {"{{outcome}}": f"sum by (outcome) (rate(preforkd_requests_total[{WINDOW}]))"}, is_stacked=True,
            ),
            Panel(
                "Requests that fail", "percentunit", {SERVICE: failing(" by (instance, service)")},
                "error and killed, of all.", limits=(0.01, 0.05),
            ),
            Panel(
                "Utilization", "percentunit", {SERVICE: "preforkd_pool_utilization_ratio"},
                "As a scrape happens to see it.", limits=(0.7, 0.9), most=1,
            ),
            Panel("Duration of requests", "s", {f"p{of * 100:.0f}": quantile(of) for of in (0.5, 0.95, 0.99)}),
            Panel("99 % of requests within", "s", {SERVICE: quantile(0.99, "le, instance, service")}),
            Heatmap(
                "Durations", "s",
                {"{{le}}": f"sum by (le) (increase(preforkd_request_duration_seconds_bucket[{WINDOW}]))"},
            ),
        ),
    ),
    Row(
        "Pool",
        (
            Panel("Workers", "none", {"{{state}}": "sum by (state) (preforkd_workers)"}, is_stacked=True),
            Panel(
                "Workers ready and wanted", "none",
                {
                    "ready": 'sum(preforkd_workers{state=~"idle|busy"})',
                    "wanted": "sum(preforkd_workers_wanted)",
                    "at most": "sum(preforkd_workers_max)",
                },
                is_in_steps=True,
            ),
            Panel("Lanes", "none", {"{{state}}": "sum by (state) (preforkd_lanes)"}, is_stacked=True),
            Panel(
                "Lanes busy on average", "none", {SERVICE: f"rate(preforkd_busy_seconds_total[{WINDOW}])"},
                "What lies between scrapes counts as well.", width=6,
            ),
            Panel(
                "Workers that left", "none",
                {"{{reason}}": f"sum by (reason) (increase(preforkd_worker_exits_total[{WINDOW}]))"},
                width=6, is_stacked=True,
            ),
            Panel(
                "Workers asked for", "none", {SERVICE: f"increase(preforkd_worker_spawns_total[{WINDOW}])"}, width=6
            ),
            Panel(
                "Slots held back", "none", {SERVICE: "preforkd_slots_held_back"},
                width=6, limits=(1,), is_in_steps=True,
            ),
        ),
    ),
    Row(
        "Listeners",
        (
            Panel(
                "Connections that wait", "none", {LISTENER: 'preforkd_listen_backlog{listener=~"(tcp|unix):.*"}'}
            ),
            Panel(
                "Datagrams that wait", "bytes",
                {LISTENER: 'preforkd_listen_backlog{listener=~"(udp|unix-dgram):.*"}'},
            ),
            Panel(
                "Backlog of what may wait", "percentunit",
                {LISTENER: "preforkd_listen_backlog / (preforkd_listen_backlog_limit > 0)"}, limits=(0.5, 0.8), most=1,
            ),
            Panel(
                "Datagrams dropped", "cps",
                {LISTENER: f'rate(preforkd_listen_drops_total{{listener=~"(udp|unix-dgram):.*"}}[{WINDOW}])'},
                width=12,
            ),
            Panel(
                "Datagrams cut short", "cps", {SERVICE: f"rate(preforkd_datagrams_truncated_total[{WINDOW}])"}, width=12
            ),
        ),
    ),
    Row(
        "Resources of the workers",
        (
            Panel("Resident memory", "bytes", {SERVICE: "preforkd_worker_resident_memory_bytes"}),
            Panel("Proportional memory", "bytes", {SERVICE: "preforkd_worker_proportional_memory_bytes"}),
            Panel("Processor", "none", {SERVICE: f"rate(preforkd_worker_cpu_seconds_total[{WINDOW}])"}, "1: one core."),
            Panel("Open descriptors", "none", {SERVICE: "preforkd_worker_open_fds"}, width=12),
            Panel(
                "Descriptors of what may be open", "percentunit",
                {
                    SERVICE: "preforkd_worker_open_fds_ratio",
                    "master {{instance}}": "preforkd_master_open_fds_ratio",
                },
                width=12, limits=(0.5, 0.8), most=1,
            ),
        ),
    ),
    Row(
        "Master and reloads",
        (
            Figure(
                "Last reload", "none", {"": "min(preforkd_last_reload_successful)"}, "Of several daemons the worst.",
                width=8, words={0.0: ("failed", BAD), 1.0: ("fine", GOOD)},
            ),
            Figure(
                "Last one done", "dateTimeFromNow",
                {"": "1000 * max(preforkd_last_reload_success_timestamp_seconds > 0 or preforkd_start_time_seconds)"},
                "Where there was none yet: the start.", width=8,
            ),
            Figure("It took", "s", {"": "max(preforkd_reload_duration_seconds)"}, width=8),
            Panel(
                "Reloads", "none", {"{{result}}": f"sum by (result) (increase(preforkd_reloads_total[{WINDOW}]))"},
                is_stacked=True,
            ),
            Panel("Generation", "none", {SERVICE: "preforkd_generation"}, is_in_steps=True),
            Panel(
                "Age of the last heartbeat", "s", {DAEMON: "time() - preforkd_master_heartbeat_timestamp_seconds"},
                "By two clocks, if Prometheus runs elsewhere.", limits=(30, 60),
            ),
        ),
    ),
    Row(
        "Doors and the log",
        (
            Panel(
                "Turned away at the door", "cps",
                {"{{reason}} {{service}} {{instance}}": f"rate(preforkd_turned_away_total[{WINDOW}])"},
            ),
            Panel("Idle connections ended", "cps", {SERVICE: f"rate(preforkd_idle_timeouts_total[{WINDOW}])"}),
            Panel(
                "Damaged files of metrics", "none", {DAEMON: "preforkd_metrics_bad_files"},
                limits=(1,), is_in_steps=True,
            ),
            Panel(
                "Lines of the log dropped", "cps", {SERVICE: f"rate(preforkd_log_dropped_lines_total[{WINDOW}])"},
                "Without a service: the daemon's own.", width=12,
            ),
            Panel(
                "Lines of the access log dropped", "cps",
                {SERVICE: f"rate(preforkd_access_log_dropped_lines_total[{WINDOW}])"}, width=12,
            ),
        ),
    ),
    Row(
        "supervisord",
        (
            Figure("supervisord", "none", {"": "min(supervisor_up)"}, "Of several the worst.", width=8, words=UP),
            Figure("Programs", "none", {"": 'count(supervisor_process_state{state="RUNNING"})'}, width=8),
            Figure("Programs that run", "none", {"": 'sum(supervisor_process_state{state="RUNNING"})'}, width=8),
            Panel(
                "Programs by state", "none", {"{{state}}": "sum by (state) (supervisor_process_state)"},
                is_stacked=True, is_in_steps=True,
            ),
            Panel(
                "Changes of state", "none",
                {"{{to}}": f"sum by (to) (increase(supervisor_process_state_changes_total[{WINDOW}]))"},
                is_stacked=True,
            ),
            Panel(
                "Exits unasked", "none",
                {f"{PROGRAM} expected: {{{{expected}}}}": f"increase(supervisor_process_exits_total[{WINDOW}])"},
            ),
            Panel("Running for", "s", {PROGRAM: "time() - supervisor_process_start_time_seconds"}),
            Panel(
                "Answers missed", "percentunit",
                {
                    PROGRAM: f"rate(supervisor_healthcheck_failures_total[{WINDOW}])"
                    f" / (rate(supervisor_healthchecks_total[{WINDOW}]) > 0)"
                },
                limits=(0.1, 0.5), most=1,
            ),
            Panel(
                "Daemons restarted that did not answer", "none",
                {
                    PROGRAM: f"increase(supervisor_healthcheck_restarts_total[{WINDOW}])",
                    f"{PROGRAM} left alone": f"increase(supervisor_healthcheck_held_back_total[{WINDOW}])",
                },
            ),
        ),
        is_folded=True,
    ),
)  # fmt: skip
