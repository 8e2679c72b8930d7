"""Alerts that fire: a real Prometheus with the rules as shipped, in a hurry, scrapes a real daemon in trouble."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import METRICS, needs
from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon, eventually
from tests.prometheus import Prometheus, scraping, scraping_supervisor
from tests.supervisor.conftest import Supervise, supervise
from tests.supervisor.daemon import listening

__all__ = ["supervise"]  # a fixture

pytestmark = needs("prometheus", "prometheus")

TCP = ("--listen", "tcp://127.0.0.1:0")

LEAKED = 50  # descriptors, in a request to Leak
APP = f"""
import os, time
from socketserver import BaseRequestHandler


class Quiet(BaseRequestHandler):
    pass


class Leak(BaseRequestHandler):
    def handle(self):
        kept = [os.dup(0) for _ in range({LEAKED})]
        while not os.path.exists("enough"):
            time.sleep(0.01)
        [*map(os.close, kept)]


def start(server, slot):
    if os.path.exists("broken"):
        raise ValueError("as told")
"""

Watch = Callable[[Daemon], Prometheus]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Have a Prometheus watch a daemon. At first nothing fires."""
    with ExitStack() as tidy:

        def begin(daemon: Daemon) -> Prometheus:
            prometheus = tidy.enter_context(Prometheus(tmp_path / "prometheus", scraping(daemon, "mail")))
            prometheus.wait_until_scraped()
            assert prometheus.firing() == {}
            return prometheus

        yield begin


def told(alert: dict[str, Any]) -> str:
    """What somebody is told who is woken up by this alert, every template in it filled in."""
    text = f"{alert['annotations']['summary']}\n{alert['annotations']['description']}"
    assert "no value" not in text
    assert "error" not in text.lower().replace("errors", "")
    assert "{{" not in text
    return text


def hold(daemon: Daemon, connections: int) -> list[Conversation]:
    """Connections that wait for a second line."""
    held = [Conversation(daemon.connect()) for _ in range(connections)]
    for each in held:
        each.socket.sendall(b"say hello\n")
    return held


def test_down_when_the_master_was_killed(serve: Serve, watch: Watch) -> None:
    daemon = serve(":Obey", *TCP, *METRICS)
    prometheus = watch(daemon)
    daemon.signal(signal.SIGKILL)
    alert = prometheus.wait_until_fires("PreforkdDown")
    assert alert["labels"]["severity"] == "critical"
    assert "preforkd mail on 127.0.0.1:" in told(alert)
    assert "`preforkctl mail status`" in told(alert)


def test_stuck_when_the_master_is_stopped_and_calm_when_it_goes_on(serve: Serve, watch: Watch) -> None:
    daemon = serve(":Obey", *TCP, *METRICS)
    prometheus = watch(daemon)
    daemon.signal(signal.SIGSTOP)
    try:
        told(prometheus.wait_until_fires("PreforkdMasterStuck"))
        assert "PreforkdDown" not in prometheus.firing()
    finally:
        daemon.signal(signal.SIGCONT)
    prometheus.wait_until_calm("PreforkdMasterStuck")


def test_reload_failed_until_one_is_done(serve: Serve, watch: Watch, tmp_path: Path) -> None:
    target = tmp_path / "app.py"
    target.write_text(APP)
    daemon = serve("app:Quiet", *TCP, *METRICS, "--set", "probation=0")
    prometheus = watch(daemon)
    target.write_text("broken = (\n")
    assert daemon.ctl("reload").returncode == 1
    assert "the last reload failed" in told(prometheus.wait_until_fires("PreforkdReloadFailed"))
    assert prometheus.query("preforkd_last_reload_successful")[0]["value"][1] == "0"
    target.write_text(APP)
    assert daemon.ctl("reload").returncode == 0
    prometheus.wait_until_calm("PreforkdReloadFailed")


def test_saturated_and_a_backlog_when_all_lanes_are_held(serve: Serve, watch: Watch) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, "--max-children", "2")
    prometheus = watch(daemon)
    held = hold(daemon, 5)
    try:
        text = told(prometheus.wait_until_fires("PreforkdSaturated"))
        assert "Obey of preforkd mail" in text
        assert "100% busy" in text
        assert "`preforkctl mail scale Obey N`" in text
        assert "tcp://127.0.0.1:" in told(prometheus.wait_until_fires("PreforkdBacklog"))
    finally:
        for each in held:
            each.close()
    prometheus.wait_until_calm("PreforkdSaturated")
    prometheus.wait_until_calm("PreforkdBacklog")


def test_no_workers_and_a_crash_loop_when_none_boots_any_more(serve: Serve, watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    daemon = serve("app:Quiet", *TCP, *METRICS, "--max-children", "2", "--set", "on_worker_start=start")
    prometheus = watch(daemon)
    (tmp_path / "broken").touch()
    for pid in daemon.workers():
        os.kill(pid, signal.SIGKILL)
    assert "has no worker" in told(prometheus.wait_until_fires("PreforkdNoWorkers"))
    told(prometheus.wait_until_fires("PreforkdCrashLoop"))
    (tmp_path / "broken").unlink()
    assert daemon.ctl("reload").returncode == 0
    prometheus.wait_until_calm("PreforkdNoWorkers")
    prometheus.wait_until_calm("PreforkdCrashLoop")


def test_requests_that_raise_and_those_that_crash(serve: Serve, watch: Watch) -> None:
    daemon = serve(":Obey", *TCP, *METRICS)
    prometheus = watch(daemon)

    def fires(name: str, order: bytes) -> bool:
        daemon.ask(b"say fine\n")
        for _ in range(4):
            with suppress(ConnectionError):
                daemon.ask(order)
        return name in prometheus.firing()

    for name, order in {
        "PreforkdErrorRatio": b"raise\n",
        "PreforkdWorkersCrash": b"segfault\n",
        "PreforkdRequestsKilled": b"segfault\n",
    }.items():
        eventually(partial(fires, name, order), name)
        told(prometheus.firing()[name][0])


def test_descriptors_of_the_worst_worker_and_datagrams_that_find_no_room(
    serve: Serve, watch: Watch, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    daemon = serve(
        "app:Leak", "--listen", "udp://127.0.0.1:0", *METRICS,
        "--set", "rlimits=nofile=64", "--set", "receive_buffer=4K", "--max-children", "2",
    )  # fmt: skip
    prometheus = watch(daemon)
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.sendto(b"leak", daemon.address())
        text = told(prometheus.wait_until_fires("PreforkdDescriptors"))
        assert "a worker of Leak runs out of descriptors" in text
        client.sendto(b"leak", daemon.address())

        def flood() -> bool:
            for _ in range(20):
                client.sendto(bytes(1000), daemon.address())
            return "PreforkdDatagramsDropped" in prometheus.firing()

        eventually(flood, "drops")
    told(prometheus.firing()["PreforkdDatagramsDropped"][0])
    told(prometheus.wait_until_fires("PreforkdBacklogFull"))
    assert "PreforkdBacklog" not in prometheus.firing()
    (tmp_path / "enough").touch()


def test_nothing_fires_for_a_daemon_that_breathes_recycles_and_reloads_under_load(
    serve: Serve, watch: Watch, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    recycled = ("--set", "max_requests=20", "--set", "max_spare=2", "--set", "probation=0.5")
    daemon = serve("app:Quiet", *TCP, *METRICS, "--max-children", "6", *recycled)
    prometheus = watch(daemon)
    fired = f'count_over_time(ALERTS{{alertstate="firing"}}[{3 * DEADLINE:.0f}s])'
    for _ in range(3):
        assert daemon.ctl("reload").returncode == 0
        before = daemon.metrics()['preforkd_worker_exits_total{reason="max_requests",service="Quiet"}']
        for _ in range(200):
            daemon.ask(b"")
        assert daemon.metrics()['preforkd_worker_exits_total{reason="max_requests",service="Quiet"}'] > before
        assert prometheus.query(fired) == []


def test_what_supervisord_has_given_up_and_supervisord_itself(
    serve: Serve, supervise: Supervise, tmp_path: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        metrics = "{}:{}".format(*free.getsockname())
    failing = {"program:broken": {"command": "false", "startsecs": 1, "startretries": 1}}
    stopped = {"program:stopped": {"command": "sleep 600", "autostart": "false"}}
    supervisor = supervise({**listening(metrics, tmp_path), **failing, **stopped})
    with Prometheus(tmp_path / "prometheus", scraping_supervisor(metrics)) as prometheus:
        prometheus.wait_until_scraped()
        assert told(prometheus.wait_until_fires("SupervisorProgramFailed")).startswith("broken:broken on ")
        not_running = prometheus.wait_until_fires("SupervisorProgramNotRunning")
        assert told(not_running).startswith("stopped:stopped on ")
        supervisor.kill()
        told(prometheus.wait_until_fires("SupervisorListenerDown"))
