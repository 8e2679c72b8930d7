"""The main job: serve, announce, count, stop."""

import os
import signal

import pytest

from tests.conftest import Serve
from tests.daemon import eventually

TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")


def test_serves_lines_and_stops(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    assert daemon.ask(b"hello\nworld\n") == b"HELLO\nWORLD\n"
    assert len(daemon.titled("worker Upper#")) == 4
    assert daemon.stop() == 0
    assert daemon.log.matches("^stopped status=0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_every_stop_signal_stops_an_idle_daemon_without_a_stack(serve: Serve, number: signal.Signals) -> None:
    daemon = serve(":Upper", *TCP)
    assert daemon.stop(number) == 0
    assert "Traceback" not in daemon.log.text
    assert "most recent call first" not in daemon.log.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
@pytest.mark.parametrize("who", ["worker Upper#0", "mold Upper", "worker metrics#0", "mold metrics"])
def test_whoever_is_killed_is_replaced(serve: Serve, who: str, number: signal.Signals) -> None:
    daemon = serve(":Upper", *TCP, *METRICS)
    (before,) = daemon.titled(who)
    os.kill(before, number)
    eventually(lambda: daemon.titled(who) not in ([], [before]), f"another {who}")
    eventually(lambda: len(daemon.workers("Upper")) == 4, "four workers")
    assert daemon.ask(b"a\n") == b"A\n"
    eventually(lambda: len(daemon.workers("metrics")) == 1, "an exporter")
    # The client is told before the tally: it reads end-of-file a moment before the request is counted.
    eventually(lambda: daemon.metrics()['preforkd_requests_total{outcome="ok",service="Upper"}'] == 1, "one request")
    eventually(lambda: not daemon.zombies(), "no zombie")
