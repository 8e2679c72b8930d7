"""The exporter under curl and Prometheus's own promtool, and under clients that say nothing."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from preforkd.exporter import MOST_CLIENTS
from preforkd.metrics import METRICS as TABLE
from tests.clients.conftest import METRICS, needs, outcomes, run
from tests.conftest import Serve
from tests.daemon import Daemon, eventually

SAMPLE = ("preforkd_workers.samples:Upper", "--listen", "tcp://127.0.0.1:0", *METRICS)
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def page(daemon: Daemon, path: str, *options: object) -> str:
    host, port = daemon.address("metrics")
    return run("curl", "--silent", "--show-error", *options, f"http://{host}:{port}{path}")


def status(daemon: Daemon, path: str) -> tuple[int, str]:
    """Status and text of a page."""
    text, _, code = page(daemon, path, "--write-out", r"\n%{http_code}").rpartition("\n")
    return int(code), text.strip()


@contextmanager
def connected(daemon: Daemon, number: int, saying: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many clients of the exporter that have said this and no more."""
    with ExitStack() as clients:
        found = [clients.enter_context(daemon.connect("metrics")) for _ in range(number)]
        for client in found:
            client.sendall(saying)
        yield found


@needs("curl", "curl")
@needs("promtool", "prometheus")
def test_promtool_has_no_complaint(serve: Serve) -> None:
    daemon = serve(*SAMPLE)
    assert daemon.ask(b"a\n") == b"A\n"
    assert outcomes(daemon, "Upper", 1) == {"ok": 1}
    text = page(daemon, "/metrics")
    assert run("promtool", "check", "metrics", text=text) == ""
    assert re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE) == [(n, m.kind) for n, m in TABLE.items()]
    assert [name for name in TABLE if not re.search(rf"^{name}(_bucket)?(\{{.+\}})? \S+$", text, re.MULTILINE)] == []


@needs("curl", "curl")
def test_the_page_comes_as_text_or_open_metrics_and_compressed_if_asked(serve: Serve) -> None:
    daemon = serve(*SAMPLE)
    plain = page(daemon, "/metrics", "--include")
    assert "Content-Type: text/plain; version=0.0.4" in plain
    assert "Content-Encoding" not in plain
    head, _, text = page(daemon, "/metrics", "--include", "--header", f"Accept: {OPEN_METRICS}").partition("\n\n")
    assert f"Content-Type: {OPEN_METRICS}" in head
    parsed = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    families = {family.name: family.type for family in parsed}
    assert families == {name.removesuffix("_total"): metric.kind for name, metric in TABLE.items()}
    compressed = page(daemon, "/metrics", "--include", "--compressed")
    assert "Content-Encoding: gzip" in compressed
    assert 'preforkd_workers_max{service="Upper"} 4.0' in compressed


@needs("curl", "curl")
def test_clients_that_say_nothing_or_half_a_request_stop_no_scrape(serve: Serve) -> None:
    daemon = serve(*SAMPLE)
    with connected(daemon, 100) as silent, connected(daemon, 20, b"GET /metrics HT") as halting:
        assert 'preforkd_workers_max{service="Upper"} 4.0' in page(daemon, "/metrics")
        assert status(daemon, "/healthz") == (200, "ok")
        for client in [*silent, *halting]:  # they are not waited for for ever
            assert client.recv(1) == b""
    ok = 'preforkd_requests_total{outcome="ok",service="metrics"}'
    scrapes = count()
    eventually(lambda: daemon.metrics()[ok] == 120 + 2 + next(scrapes), "each of them, and of us, is counted once")
    assert daemon.metrics()['preforkd_requests_total{outcome="error",service="metrics"}'] == 0


@needs("curl", "curl")
def test_too_many_clients_make_room_for_each_other(serve: Serve) -> None:
    daemon = serve(*SAMPLE)
    (exporter,) = daemon.titled("worker metrics#")
    threads = Path(f"/proc/{exporter}/task")
    with connected(daemon, 2 * MOST_CLIENTS) as clients:

        def has_room() -> bool:
            for client in clients:
                with suppress(ConnectionError):
                    client.sendall(b"x")  # so that none of them is silent for too long
            return len(os.listdir(threads)) <= 1 + MOST_CLIENTS

        assert [client.recv(1) for client in clients[:MOST_CLIENTS]] == [b""] * MOST_CLIENTS
        eventually(has_room, "the threads of those who were hung up on have left")
        assert 'preforkd_workers_max{service="Upper"} 4.0' in page(daemon, "/metrics")


@needs("curl", "curl")
def test_health_is_that_of_the_master(serve: Serve) -> None:
    daemon = serve(*SAMPLE)
    assert status(daemon, "/healthz") == (200, "ok")
    daemon.signal(signal.SIGSTOP)
    try:
        eventually(lambda: status(daemon, "/healthz")[0] == 503, "the heartbeat is stale")
        assert re.fullmatch(r"the master's last heartbeat was \d+ s ago", status(daemon, "/healthz")[1])
        assert daemon.ask(b"a\n") == b"A\n"
    finally:
        daemon.signal(signal.SIGCONT)
    eventually(lambda: status(daemon, "/healthz") == (200, "ok"), "the heartbeat is fresh again")


@needs("curl", "curl")
def test_readiness_is_that_of_every_service(serve: Serve, tmp_path: Path) -> None:
    service = 'target = "preforkd_workers.samples:Upper"\nlisten = ["tcp://127.0.0.1:0"]\n'
    (tmp_path / "two.toml").write_text(f"[services.mail]\n{service}[services.news]\n{service}")
    daemon = serve("-c", "two.toml", *METRICS)
    assert status(daemon, "/readyz") == (200, "ok")
    (mold,) = daemon.titled("mold news")
    os.kill(mold, signal.SIGSTOP)
    *others, last = daemon.workers("news")
    for worker in others:
        os.kill(worker, signal.SIGKILL)
    daemon.log.wait_for("^worker_exit service=news", len(others))
    assert status(daemon, "/readyz") == (200, "ok")  # one worker is enough
    os.kill(last, signal.SIGKILL)
    daemon.log.wait_for("^worker_exit service=news", len(others) + 1)
    assert status(daemon, "/readyz") == (503, "no worker is ready: news")
    assert status(daemon, "/healthz") == (200, "ok")
    os.kill(mold, signal.SIGCONT)
    eventually(lambda: status(daemon, "/readyz") == (200, "ok"), "the workers are replaced")


@needs("curl", "curl")
def test_no_other_page_is_there(serve: Serve) -> None:
    daemon = serve(*SAMPLE)
    assert status(daemon, "/") == (200, "preforkd: /metrics /healthz /readyz")
    assert status(daemon, "/../secret")[0] == 404


@needs("curl", "curl")
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
def test_a_query_is_no_part_of_the_path(serve: Serve, path: str) -> None:
    assert status(serve(*SAMPLE), f"{path}?a=b")[0] == 200
