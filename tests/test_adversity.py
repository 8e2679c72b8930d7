"""What a reviewer broke by hand, once: each of these ended the master, or left somebody behind."""

import os
import signal
import socket

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, eventually

TCP = ("--listen", "tcp://127.0.0.1:0")
ONE = ("--max-children", "1")


@pytest.mark.parametrize("spawned", [1, 7, 20])
def test_nobody_survives_a_master_killed_while_it_spawns(serve: Serve, spawned: int) -> None:
    daemon = serve(":Upper", *TCP, "--max-children", "100", ready=False)
    daemon.log.wait_for("^worker_ready", spawned)
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    eventually(lambda: not daemon.family(), "everybody has left")


def test_a_mold_killed_while_it_forks_is_no_failure_of_the_target(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, "--max-children", "100", ready=False)
    daemon.log.wait_for("^worker_ready", 5)
    mold = daemon.log.wait_for(r"^mold_ready .*\bpid=(\d+)")[1]  # not by title: the process in the middle has it too
    os.kill(int(mold), signal.SIGKILL)
    daemon.ready()
    assert daemon.ask(b"a\n") == b"A\n"
    assert not daemon.log.matches("^boot_failed")


@pytest.mark.parametrize("number", [40, signal.SIGRTMIN + 1, signal.SIGRTMAX])
def test_a_worker_killed_by_a_signal_without_a_name_is_replaced(serve: Serve, number: int) -> None:
    daemon = serve(":Upper", *TCP, *ONE)
    os.kill(daemon.workers()[0], number)
    daemon.log.wait_for("^worker_exit .*signal=")
    daemon.log.wait_for("^worker_ready", 2)
    assert daemon.ask(b"a\n") == b"A\n"


def test_a_handler_may_fork_and_let_the_child_return(serve: Serve) -> None:
    daemon = serve(":ForkAndReturn", *TCP, *ONE, "--metrics", "tcp://127.0.0.1:0")
    for _ in range(3):
        assert daemon.ask(b"")
    ok = 'preforkd_requests_total{outcome="ok",service="ForkAndReturn"}'
    eventually(lambda: daemon.metrics()[ok] == 3, "three requests, not six")
    assert daemon.stop() == 0


def test_a_server_of_the_handlers_own_is_left_alone(serve: Serve) -> None:
    daemon = serve(":SecondServer", *TCP, *ONE)
    assert [int(daemon.ask(b"")) for _ in range(2)] == 2 * daemon.workers()


def test_a_listener_made_blocking_by_its_class_does_not_keep_an_idle_worker(serve: Serve) -> None:
    daemon = serve(":BlockingServer", "--handler", "tests.targets:Upper", *TCP, environment=FROM_HERE)
    assert daemon.ask(b"a\n") == b"A\n"
    assert daemon.stop() == 0
    assert not daemon.log.matches("^(kill|end_of_file)")


FROM_HERE = {"PYTHONPATH": os.getcwd()}


def test_children_of_forkingmixin_do_not_outlive_their_killed_worker(serve: Serve) -> None:
    daemon = serve(":ForkingObeyServer", "--handler", "tests.targets:Obey", *TCP, *ONE, environment=FROM_HERE)
    with daemon.connect() as client:
        client.sendall(b"until_eof\n")
        assert client.recv(100) == b"waiting\n"
        os.kill(daemon.workers()[0], signal.SIGKILL)
        assert client.recv(100) == b""
    daemon.log.wait_for("^worker_ready", 2)
    assert daemon.stop() == 0


def test_a_master_short_of_descriptors_serves_with_the_workers_that_it_has(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, "--max-children", "40", ready=False, prefix=("prlimit", "--nofile=40:40"))
    daemon.log.wait_for("^spawn_refused .*RLIMIT_NOFILE")
    assert daemon.ask(b"a\n") == b"A\n"
    assert daemon.stop() == 0


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_standard_streams_may_be_closed(serve: Serve, closed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    close = " ".join(f"{number}>&-" for number in closed.split())
    shell = ("sh", "-c", f'exec "$@" {close}', "sh")
    daemon = serve(":Upper", "--listen", f"tcp://127.0.0.1:{port}", ready=False, prefix=shell)

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
                client.sendall(b"a\n")
                return client.recv(10) == b"A\n"
        except ConnectionRefusedError:
            return False

    eventually(answers, "an answer")
    assert daemon.stop() == 0


@pytest.mark.parametrize("words", [("--ready-fd", "8"), ("--listen", "fd:8")])
def test_a_descriptor_that_nobody_passed_is_refused(serve: Serve, words: tuple[str, str]) -> None:
    daemon = serve(":Upper", *TCP, *words, ready=False)
    assert daemon.wait() == 1
    assert daemon.log.wait_for("^cannot_start .*8: no such descriptor is open; have whoever starts this pass it")
    assert "Traceback" not in daemon.log.text
