"""What the listener of supervisord's events tells Prometheus: the table of its metrics, their values, and the page.

Counters begin anew with the listener, gauges are what supervisord said last; what it said too long ago is not shown.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from http.server import HTTPServer
from threading import Lock, Thread
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from preforkd import metrics
from preforkd.addresses import AddressError, parse
from preforkd.listeners import Rules, bind
from preforkd.metrics import Declared
from preforkd.supervisor.supervisord import STATES, Program
from preforkd.threadpool import ThreadPoolMixIn

# What supervisord said so long ago is not so any more: three ticks; seconds.
STALE = 15.0

# How long a client may take to say what it wants, in seconds.
CLIENT_TIMEOUT = 5.0

METRICS = {
    "supervisor_up": Declared("gauge", (), "Whether supervisord answers its listener: 1 or 0."),
    "supervisor_process_state": Declared(
        "gauge", ("group", "name", "state"), "1 for the state that a process is in, as supervisorctl calls it, else 0."
    ),
    "supervisor_process_state_changes_total": Declared(
        "counter", ("group", "name", "to"), "How often a process came into a state."
    ),
    "supervisor_process_exits_total": Declared(
        "counter", ("group", "name", "expected"), "How often a process that ran has exited unasked: true or false."
    ),
    "supervisor_process_start_time_seconds": Declared(
        "gauge", ("group", "name"), "When the process that runs was started, since the epoch."
    ),
    "supervisor_healthchecks_total": Declared("counter", ("group", "name"), "Times that a daemon was asked."),
    "supervisor_healthcheck_failures_total": Declared(
        "counter", ("group", "name"), "Answers missed at the control socket of a daemon."
    ),
    "supervisor_healthcheck_restarts_total": Declared(
        "counter", ("group", "name"), "Restarts of a daemon that missed too many in a row."
    ),
    "supervisor_healthcheck_held_back_total": Declared(
        "counter", ("group", "name"), "Times that it was not restarted, because it was too often already."
    ),
}

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
_CHANGES, _EXITS = "supervisor_process_state_changes_total", "supervisor_process_exits_total"
CHECKS = "supervisor_healthchecks_total"
FAILURES, RESTARTS, HELD_BACK = (
    f"supervisor_healthcheck_{what}_total" for what in ("failures", "restarts", "held_back")
)

# The values of a counter's label beyond group and name, so that every series is there from the first, as 0.
_VALUES: Mapping[str, tuple[str, ...]] = {"to": STATES, "expected": ("true", "false")}

_Key = tuple[str, str]  # group and name


class Ledger:
    """What is known of all processes. Any thread may write or read it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._processes: dict[_Key, Program] = {}
        self._states: dict[_Key, str] = {}
        self._counts: Counter[tuple[str, ...]] = Counter()  # name of the metric, group, name, and the label beyond
        self._seen_at = float("-inf")

    def changed(self, group: str, name: str, to: str, expected: str | None) -> None:
        """A process has come into a state; ``expected``: "1" or "0" when it has exited."""
        with self._lock:
            self._states[group, name] = to
            self._counts[_CHANGES, group, name, to] += 1
            if expected is not None:
                self._counts[_EXITS, group, name, "true" if expected == "1" else "false"] += 1

    def count(self, metric: str, program: Program) -> None:
        with self._lock:
            self._counts[metric, program.group, program.name] += 1

    def saw(self, programs: Iterable[Program]) -> None:
        """All that there is: whatever else we knew of is gone, though it counts on if it comes back."""
        with self._lock:
            self._processes = {(each.group, each.name): each for each in programs}
            self._states = {key: each.state for key, each in self._processes.items()}
            self._seen_at = monotonic()

    def lost(self) -> None:
        """supervisord does not answer."""
        with self._lock:
            self._seen_at = float("-inf")

    def samples(self) -> Iterator[tuple[str, list[str], float]]:
        """Every value: metric, labels, number."""
        with self._lock:
            is_up = monotonic() - self._seen_at < STALE
            processes, states, counts = dict(self._processes), dict(self._states), self._counts.copy()
        yield "supervisor_up", [], float(is_up)
        for (group, name), process in processes.items() if is_up else ():
            for state in STATES:
                yield "supervisor_process_state", [group, name, state], float(states[group, name] == state)
            if process.pid:
                yield "supervisor_process_start_time_seconds", [group, name], float(process.started)
        for group, name in dict.fromkeys([*processes, *states]):
            for metric, declared in METRICS.items():
                if declared.kind == "counter":
                    for value in _VALUES.get(declared.labels[-1], (None,)):
                        labels = [group, name, *([value] if value else [])]
                        yield metric, labels, float(counts[(metric, *labels)])


class _Collector(Collector):
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def describe(self) -> Iterator[Metric]:
        """prometheus_client asks when the collector is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        families = {name: _FAMILIES[each.kind](name, each.help, labels=each.labels) for name, each in METRICS.items()}
        for name, labels, value in self._ledger.samples():
            families[name].add_metric(labels, value)
        yield from families.values()


class _Page(ThreadPoolMixIn, HTTPServer):
    """Answers scrapes, a few at a time: others wait."""

    daemon_threads = True
    max_threads = 8
    registry: CollectorRegistry

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news; anything else is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(MetricsHandler):
    timeout = CLIENT_TIMEOUT
    server: _Page

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        if self.path.partition("?")[0] != "/metrics":
            return self.send_error(404)
        self.registry = self.server.registry
        return super().do_GET()


def serve(url: str, ledger: Ledger) -> str:
    """Serve ``/metrics`` there, in a thread; where that is. Raises AddressError or ListenError."""
    address = parse(url)
    if address.scheme != "tcp":
        raise AddressError(f"{url}: want tcp://127.0.0.1:9110")
    bound = bind(address, Rules())
    page = _Page(("", 0), _Handler, bind_and_activate=False)
    page.socket.close()
    page.socket = bound.listener.socket
    page.registry = CollectorRegistry()
    page.registry.register(_Collector(ledger))
    Thread(target=page.serve_forever, args=(None,), daemon=True).start()
    return bound.listener.url


def reference() -> str:
    """The table as the reference shows it."""
    return metrics.reference(METRICS)
