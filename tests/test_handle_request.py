"""Classes whose own loop calls ``handle_request()``: they are served, counted, and drained like any other."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually
from tests.test_stop import Client, exit_of

LOOPS = Path(__file__).parent / "loops.py"
TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")
ONE = ("--max-children", "1")

Notes = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    """What the servers have noted since the test began."""
    path = tmp_path / "notes"
    path.touch()
    roots = [str(LOOPS.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("HOOKS", str(path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, roots)))
    return lambda: path.read_text().splitlines()


def requests(daemon: Daemon, name: str) -> float:
    return daemon.metrics()[f'preforkd_requests_total{{outcome="ok",service="{name}"}}']


def cpu_ticks(pid: int) -> int:
    """The CPU time that a process has used (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# Serving.


def test_each_call_handles_one_request_which_is_counted(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:ForEver", *TCP, *METRICS, *ONE)
    for number in range(10):
        assert daemon.ask(b"returned\n") == b"%d\n" % number
    eventually(lambda: requests(daemon, "ForEver") == 10, "ten requests counted")


def test_a_call_returns_only_with_a_request_although_others_are_quicker(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:ForEver", *TCP, *METRICS, "--max-children", "8")
    clients = []
    for _ in range(8):  # until everybody has one
        clients += [Client(daemon) for _ in range(8)]
        assert len({client.pid for client in clients}) == 8
        returned = [int(client.ask(b"returned")) for client in clients]
        for client in clients:
            client.close()
        clients.clear()
        eventually(lambda: requests(daemon, "ForEver") % 8 == 0, "all have ended")
    assert returned == [7] * 8


def test_the_requests_of_every_listener_are_served(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:ForEver", *TCP, *TCP, *ONE)
    for index in (1, 0, 1, 1, 0):
        with socket.create_connection(daemon.address(index=index), DEADLINE) as client:
            client.sendall(b"say hello\n")
            assert client.recv(100) == b"hello\n"


def test_datagrams_are_served_and_counted(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:Datagrams", "--listen", "udp://127.0.0.1:0", *METRICS, "--max-children", "3")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE)
        for number in range(20):
            client.sendto(b"datagram %d" % number, daemon.address())
            assert client.recv(100) == b"DATAGRAM %d" % number
    eventually(lambda: requests(daemon, "Datagrams") == 20, "twenty requests counted")
    assert daemon.stop() == 0
    assert len(daemon.log.matches("^worker_exit service=Datagrams .*cause=drained ")) == 3


def test_a_loop_may_go_on_in_socketservers_own(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:Both", *TCP, *METRICS, *ONE)
    for _ in range(6):
        assert daemon.ask(b"say hello\n") == b"hello\n"
    eventually(lambda: requests(daemon, "Both") == 6, "each counted once")


@pytest.mark.parametrize("name", ["Threads", "Children"])
def test_requests_may_be_handed_to_threads_and_children(serve: Serve, name: str) -> None:
    daemon = serve(f"{LOOPS}:{name}", *TCP, *METRICS, *ONE)
    with Client(daemon), Client(daemon) as second:
        assert second.ask(b"say hello") == b"hello\n"
    eventually(lambda: requests(daemon, name) == 2, "both counted")
    assert daemon.stop() == 0
    assert daemon.log.matches(f"^worker_exit service={name} .*cause=drained ")


def test_a_server_of_the_targets_own_is_left_alone(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:Second", *TCP, *ONE)
    assert int(daemon.ask(b"x\n")) == daemon.workers()[0]


# Waiting.


def test_without_a_time_out_it_waits_and_uses_no_cpu(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{LOOPS}:ForEver", *TCP, *METRICS, *ONE)
    (worker,) = daemon.workers("ForEver")
    assert daemon.ask(b"returned\n") == b"0\n"
    before = cpu_ticks(worker)
    for _ in range(20):  # of which each takes some milliseconds
        daemon.metrics()
    assert cpu_ticks(worker) - before <= 1
    assert notes() == []
    assert daemon.ask(b"returned\n") == b"1\n"


@pytest.mark.parametrize("timeouts", ["0.02,", ",0.02", "0.02,60", "60,0.02", "0,"])
def test_a_time_out_calls_handle_timeout_and_the_worker_serves_on(serve: Serve, notes: Notes, timeouts: str) -> None:
    daemon = serve(f"{LOOPS}:Patient", *TCP, "--max-children", "2", environment={"TIMEOUTS": timeouts})
    eventually(lambda: notes().count("handle_timeout") > 5, "it has been called")
    for _ in range(5):
        assert daemon.ask(b"say hello\n") == b"hello\n"
    assert daemon.stop() == 0
    assert len(daemon.log.matches("^worker_exit .*cause=drained ")) == 2


def test_a_long_time_out_of_the_socket_delays_nobody(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{LOOPS}:Patient", *TCP, "--max-children", "4", environment={"TIMEOUTS": ",600"})
    for _ in range(50):
        assert daemon.ask(b"say hello\n") == b"hello\n"
    assert daemon.stop() == 0
    assert len(daemon.log.matches("^worker_exit .*cause=drained ")) == 4
    assert set(notes()) == {"server_close"}


# Stopping.


@pytest.mark.parametrize("name", ["ForEver", "Careful"])
def test_an_idle_worker_leaves_at_once_and_a_busy_one_when_it_has_finished(
    serve: Serve, notes: Notes, name: str
) -> None:
    daemon = serve(f"{LOOPS}:{name}", *TCP, "--max-children", "2", "--set", "on_worker_stop=on_worker_stop")
    with Client(daemon) as client:
        idle = next(pid for pid in daemon.workers() if pid != client.pid)
        daemon.signal(signal.SIGTERM)
        assert "cause=drained status=0 requests=0 " in exit_of(daemon, idle)
        assert client.ask(b"draining") == b"True\n"
        assert notes() == ["on_worker_stop", "server_close"]
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
        assert daemon.wait() == 0
        assert "cause=drained status=0 requests=1 " in exit_of(daemon, client.pid)
    assert notes() == ["on_worker_stop", "server_close"] * 2
    assert not daemon.log.matches("^(end_of_file|kill) ")
    assert "Traceback" not in daemon.log.text


def test_a_loop_that_looks_for_itself_ends_in_its_own_way(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{LOOPS}:Considerate", *TCP, *ONE)
    assert daemon.ask(b"say hello\n") == b"hello\n"
    assert daemon.stop() == 0
    assert notes() == ["tidied up", "server_close"]
    daemon.log.wait_for("^worker_exit .*cause=drained ")


def test_shutdown_by_a_handler_ends_the_loop(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:ForEver", *TCP, *ONE)
    with Client(daemon) as client:
        assert client.ask(b"shutdown") == b"shut down\n"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    assert "cause=drained " in exit_of(daemon, client.pid)


def test_a_worker_without_a_master_leaves(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{LOOPS}:ForEver", *TCP, "--max-children", "3")
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: notes() == ["server_close"] * 3, "all have left")


def test_a_worker_hears_its_lifeline_alone(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import signal\nfrom tests.loops import *\n"
        "def block(server, slot):\n    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
    )
    daemon = serve("app:ForEver", *TCP, *ONE, "--set", "on_worker_start=block")
    assert daemon.ask(b"say hello\n") == b"hello\n"
    assert daemon.stop() == 0
    assert daemon.log.matches("^worker_exit .*cause=drained status=0 ")


def test_a_loop_over_a_socket_that_it_has_closed_fails_as_it_does_in_socketserver(serve: Serve) -> None:
    daemon = serve(f"{LOOPS}:Closing", *TCP, *ONE)
    assert daemon.ask(b"say hello\n") == b"hello\n"
    daemon.log.wait_for("^worker_exit .*cause=crash status=1 ")
    daemon.log.wait_for("^ValueError: Invalid file descriptor: -1")
    daemon.log.wait_for("^worker_ready ", 2)
