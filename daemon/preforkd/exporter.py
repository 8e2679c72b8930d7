"""The exporter: Prometheus metrics and health, read from the scoreboard. A service like any other, in a worker."""

import os
import platform
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import HTTPServer
from socketserver import ThreadingMixIn
from time import time_ns
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from preforkd import __version__
from preforkd.door import REASONS
from preforkd.merging import UserMetrics
from preforkd.metrics import METRICS
from preforkd.processes import Processes, descriptors_ratio
from preforkd_workers.scoreboard import (
    BACKLOG,
    BACKLOG_LIMIT,
    BOUNDS_NS,
    BUCKETS,
    BUSY_NS,
    CAUSES,
    DRAINING,
    DROPS,
    EMPTY,
    ERRORS,
    EXITS,
    GENERATION,
    HEARTBEAT,
    HELD_BACK,
    IDLED,
    KILLED,
    LIMIT,
    LOG_DROPPED,
    OK,
    PID,
    REAPED_CPU_NS,
    REFUSED,
    RELOAD_FAILED,
    RELOAD_NS,
    RELOADED_AT,
    RELOADS,
    RESULTS,
    SERVING,
    SIZE,
    SPAWNS,
    STARTED_AT,
    STARTING,
    STATE,
    TRUNCATED,
    UNLOGGED,
    UNWRITTEN,
    Rows,
    Scoreboard,
    Service,
)

# A heartbeat older than this is a master that does not turn its loop, in seconds.
STALE = 5.0

# How long a client may take to say what it wants, in seconds, and how many may be about it.
CLIENT_TIMEOUT = 5.0
MOST_CLIENTS = 128

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
_BUCKET_NAMES = [*(f"{bound / 1e9:g}" for bound in BOUNDS_NS), "+Inf"]


class Exporter(ThreadingMixIn, HTTPServer):
    """Answers scrapes, each client in a thread: any number of them may be silent."""

    daemon_threads = True
    threads_are_meant = True
    scoreboard: Scoreboard  # set by the worker

    def __init__(self, address: Any) -> None:
        super().__init__(address, Handler)
        self._clients: dict[Any, None] = {}
        self._registry: CollectorRegistry | None = None
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make room, if need be, by hanging up on who has been connected for longest."""
        with self._lock:
            self._clients[request] = None
            if len(self._clients) > MOST_CLIENTS:
                oldest = next(iter(self._clients))
                del self._clients[oldest]
                with suppress(OSError):  # it has left already
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread reads end-of-file, and closes; we must not
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with self._lock:
            self._clients.pop(request, None)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news; anything else is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def registry(self) -> CollectorRegistry:
        with self._lock:
            if self._registry is None:
                self._registry = CollectorRegistry()
                self._registry.register(ScoreboardCollector(self.scoreboard))
            return self._registry


class Handler(MetricsHandler):
    """``/metrics``, with prometheus_client's content negotiation and compression; ``/healthz`` and ``/readyz``."""

    timeout = CLIENT_TIMEOUT
    server: Exporter

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        board = self.server.scoreboard
        match self.path.partition("?")[0]:
            case "/metrics":
                self.registry = self.server.registry()
                super().do_GET()
            case "/healthz":
                self._answer(health(board))
            case "/readyz":
                self._answer(readiness(board))
            case "/":
                self._answer(None, "preforkd: /metrics /healthz /readyz\n")
            case _:
                self.send_error(404)

    def _answer(self, complaint: str | None, fine: str = "ok\n") -> None:
        body = (fine if complaint is None else f"{complaint}\n").encode()
        self.send_response(200 if complaint is None else 503)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def health(board: Scoreboard) -> str | None:
    """What is wrong with the master; None when its heartbeat is fresh."""
    age = (time_ns() - board.daemon[HEARTBEAT]) / 1e9
    return None if age < STALE else f"the master's last heartbeat was {age:.0f} s ago"


def readiness(board: Scoreboard) -> str | None:
    """Which services have no worker that is ready; None when all have one."""
    board.refresh()
    lacking = [
        name
        for name, service in board.services.items()
        if not any(rows[0][STATE] == SERVING for _, rows in service.slots())
    ]
    return f"no worker is ready: {', '.join(lacking)}" if lacking else None


class ScoreboardCollector(Collector):
    """One scrape: every metric of the table, read anew. Counters come from words that outlive any worker."""

    def __init__(self, board: Scoreboard) -> None:
        self.board = board
        self.processes = Processes()
        self.user_metrics = UserMetrics(board)

    def describe(self) -> Iterator[Metric]:
        """What would be collected; prometheus_client asks when the collector is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        families = {name: _FAMILIES[m.kind](name, m.help, labels=m.labels) for name, m in METRICS.items()}
        add = {name: family.add_metric for name, family in families.items()}
        daemon = self.board.daemon
        self.board.refresh()
        bad, of_users = self.user_metrics.merge()
        add["preforkd_build_info"]([__version__, platform.python_version()], 1)
        add["preforkd_start_time_seconds"]([], daemon[STARTED_AT] / 1e9)
        add["preforkd_master_heartbeat_timestamp_seconds"]([], daemon[HEARTBEAT] / 1e9)
        for index, result in enumerate(RESULTS):
            add["preforkd_reloads_total"]([result], daemon[RELOADS + index])
        add["preforkd_last_reload_success_timestamp_seconds"]([], daemon[RELOADED_AT] / 1e9)
        add["preforkd_last_reload_successful"]([], 1 - daemon[RELOAD_FAILED])
        add["preforkd_reload_duration_seconds"]([], daemon[RELOAD_NS] / 1e9)
        for name, service in self.board.services.items():
            self._collect_service(add, name, service)
        add["preforkd_master_open_fds_ratio"]([], descriptors_ratio(os.getppid()))
        add["preforkd_log_dropped_lines_total"]([""], daemon[LOG_DROPPED])
        add["preforkd_metrics_bad_files"]([], bad)
        yield from families.values()
        yield from of_users

    def _collect_service(self, add: dict[str, Any], name: str, service: Service) -> None:
        words, blocks = service.words, [*service.blocks()]
        live = [rows for _, rows in service.slots() if rows[0][STATE] != EMPTY]
        add["preforkd_generation"]([name], words[GENERATION])
        add["preforkd_workers_max"]([name], words[LIMIT])
        add["preforkd_workers_wanted"]([name], words[SIZE])
        for state, number in _states(live).items():
            add["preforkd_workers"]([name, state], number)
        busy, lanes = sum(rows.busy for rows in live), sum(map(len, live))
        add["preforkd_lanes"]([name, "busy"], busy)
        add["preforkd_lanes"]([name, "idle"], lanes - busy)
        add["preforkd_pool_utilization_ratio"]([name], busy / lanes if lanes else 0.0)
        add["preforkd_worker_spawns_total"]([name], words[SPAWNS])
        add["preforkd_slots_held_back"]([name], words[HELD_BACK])
        for index, cause in enumerate(CAUSES):
            add["preforkd_worker_exits_total"]([name, cause], words[EXITS + index])
        for outcome, word in (("ok", OK), ("error", ERRORS), ("refused", REFUSED)):
            add["preforkd_requests_total"]([name, outcome], _total(blocks, word))
        add["preforkd_requests_total"]([name, "killed"], words[KILLED])
        add["preforkd_datagrams_truncated_total"]([name], _total(blocks, TRUNCATED))
        for reason, word in REASONS.items():
            add["preforkd_turned_away_total"]([name, reason], _total(blocks, word))
        add["preforkd_idle_timeouts_total"]([name], _total(blocks, IDLED))
        add["preforkd_access_log_dropped_lines_total"]([name], _total(blocks, UNWRITTEN))
        add["preforkd_log_dropped_lines_total"]([name], _total(blocks, UNLOGGED))
        busy_seconds = _total(blocks, BUSY_NS) / 1e9
        add["preforkd_busy_seconds_total"]([name], busy_seconds)
        add["preforkd_request_duration_seconds"]([name], _buckets(blocks), busy_seconds)
        for url, listener in service.listeners().items():
            add["preforkd_listen_backlog"]([name, url], listener[BACKLOG])
            add["preforkd_listen_backlog_limit"]([name, url], listener[BACKLOG_LIMIT])
            add["preforkd_listen_drops_total"]([name, url], listener[DROPS])
        usage = self.processes.usage(name, [rows[0][PID] for rows in live], words[REAPED_CPU_NS] / 1e9)
        add["preforkd_worker_resident_memory_bytes"]([name], usage.rss)
        add["preforkd_worker_proportional_memory_bytes"]([name], usage.pss)
        add["preforkd_worker_cpu_seconds_total"]([name], usage.cpu_seconds)
        add["preforkd_worker_open_fds"]([name], usage.descriptors)
        add["preforkd_worker_open_fds_ratio"]([name], usage.descriptors_ratio)


def _total(blocks: list[Rows], word: int) -> int:
    return sum(rows.total(word) for rows in blocks)


def _states(live: list[Rows]) -> dict[str, int]:
    counts = {"starting": 0, "idle": 0, "busy": 0, "draining": 0}
    for rows in live:
        match rows[0][STATE]:
            case state if state == STARTING:
                counts["starting"] += 1
            case state if state == DRAINING:
                counts["draining"] += 1
            case _:
                counts["busy" if rows.busy else "idle"] += 1
    return counts


def _buckets(blocks: list[Rows]) -> list[tuple[str, float]]:
    """Cumulative counts, as Prometheus wants them."""
    total, buckets = 0, []
    for index, bound in enumerate(_BUCKET_NAMES):
        total += _total(blocks, BUCKETS + index)
        buckets.append((bound, float(total)))
    return buckets
