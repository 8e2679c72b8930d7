"""A new master and those whom an earlier one has left behind."""

import fcntl
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest

from preforkd.takeover import Lock
from tests.conftest import Serve
from tests.daemon import Daemon, eventually
from tests.test_hardship import limit_threads
from tests.test_stop import Client

TCP = ("--listen", "tcp://127.0.0.1:0")


Held = tuple[socket.socket, BinaryIO]


@pytest.fixture
def runtime() -> Iterator[str]:
    """The daemons of a test share their runtime directory, unlike those of other tests."""
    with tempfile.TemporaryDirectory(prefix="preforkd-") as directory:
        yield directory


@pytest.fixture
def serve(serve: Serve, runtime: str) -> Serve:
    return partial(serve, runtime=runtime)


def lock_of(runtime: str, name: str = "Obey") -> Path:
    return Path(runtime, "preforkd", name, "control.sock.lock")


def leave_a_busy_worker(daemon: Daemon) -> tuple[int, Held]:
    """Kill the master while one of its workers waits for a client; the worker's pid, and the client's end."""
    client = daemon.connect()
    answers = client.makefile("rb")
    client.sendall(b"pid\n")
    worker = int(answers.readline())
    client.sendall(b"until_eof\n")
    assert answers.readline() == b"waiting\n"
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    eventually(lambda: daemon.alive() == [worker], "only the busy worker stays")
    return worker, (client, answers)


@pytest.mark.parametrize("chosen", [False, True])
def test_the_next_master_waits_for_whom_the_killed_one_has_left(serve: Serve, tmp_path: Path, chosen: bool) -> None:
    options = [*TCP, *(("--control", f"{tmp_path}/chosen") if chosen else ())]
    first = serve(":Obey", *options)
    worker, (client, answers) = leave_a_busy_worker(first)
    second = serve(":Obey", *options, "--set", "takeover_timeout=1h", ready=False)
    second.log.wait_for(rf"^takeover_waits pids={worker} timeout=3600s ")
    client.sendall(b"more\n")
    client.shutdown(1)
    assert answers.readline() == b"eof after 5\n"  # it finishes what it holds
    second.log.wait_for("^takeover seconds=")
    assert second.ready().ask(b"say hello\n") == b"hello\n"
    answers.close()
    client.close()


def test_a_worker_that_stays_for_too_long_is_named_and_ends_the_start(serve: Serve, runtime: str) -> None:
    worker, (client, answers) = leave_a_busy_worker(serve(":Obey", *TCP))
    second = serve(":Obey", *TCP, "--set", "takeover_timeout=0.2", ready=False)
    assert second.wait() == 1
    said = second.log.matches("^cannot_start ")[0].string
    assert f"pids {worker} hold {lock_of(runtime)}" in said
    assert "kill -TERM" in said
    answers.close()
    client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_the_wait_at_once(serve: Serve, number: signal.Signals) -> None:
    _, (client, answers) = leave_a_busy_worker(serve(":Obey", *TCP))
    second = serve(":Obey", *TCP, "--set", "takeover_timeout=1h", ready=False)
    second.log.wait_for("^takeover_waits ")
    assert second.stop(number) == 0
    assert second.log.matches("^stopped status=0")
    answers.close()
    client.close()


def test_the_lock_is_removed_when_nobody_is_left_and_there_while_it_serves(serve: Serve, runtime: str) -> None:
    daemon = serve(":Obey", *TCP)
    assert lock_of(runtime).read_text() == f"{daemon.pid}\n"
    assert daemon.stop() == 0
    assert not lock_of(runtime).exists()


def test_workers_that_the_master_does_not_wait_for_keep_the_lock(serve: Serve, runtime: str) -> None:
    first = serve(":Obey", *TCP, "--set", "block_on_close=false")
    with first.connect() as client, client.makefile("rb") as answers:
        client.sendall(b"until_eof\n")
        assert answers.readline() == b"waiting\n"
        assert first.stop() == 0
        assert lock_of(runtime).exists()
        second = serve(":Obey", *TCP, ready=False)
        second.log.wait_for("^takeover_waits ")
        client.shutdown(1)
        second.ready()


def test_two_daemons_of_one_default_name_both_serve_and_the_second_is_warned(serve: Serve) -> None:
    first = serve(":Obey", *TCP)
    second = serve(":Obey", *TCP)
    assert second.log.matches(rf"^no_control reason=\"pid {first.pid} is a daemon of the same name\"")
    assert second.stop() == 0
    assert first.ask(b"say hello\n") == b"hello\n"


def test_a_second_daemon_with_the_same_chosen_path_waits_and_gives_up(serve: Serve, tmp_path: Path) -> None:
    options = (*TCP, "--control", f"{tmp_path}/chosen", "--set", "takeover_timeout=0.2")
    first = serve(":Obey", *options)
    second = serve(":Obey", *options, ready=False)
    assert second.wait() == 1
    assert f"{first.pid}," in second.log.matches("^cannot_start ")[0].string
    assert first.ask(b"say hello\n") == b"hello\n"


def test_a_path_that_cannot_be_made_is_an_error_if_chosen_and_else_a_warning(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chosen = serve(":Obey", *TCP, "--control", f"{tmp_path}/file/x", ready=False)
    assert chosen.wait() == 1
    assert f"control: unix:{tmp_path}/file/x: {tmp_path}/file/x.lock: Not a directory" in chosen.log.text
    default = serve(":Obey", *TCP, environment={"XDG_RUNTIME_DIR": f"{tmp_path}/file"})
    assert len(default.log.matches("^no_control ")) == 1


def test_a_program_that_a_handler_runs_does_not_hold_up_the_next_master(serve: Serve, tmp_path: Path) -> None:
    first = serve(":Program", *TCP)
    program = int(first.ask(b""))
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    try:
        assert serve(":Program", *TCP, "--set", "takeover_timeout=1h").stop() == 0
        assert Path(f"/proc/{program}").exists()
    finally:
        os.kill(program, signal.SIGKILL)


def test_many_who_start_at_once_come_to_serve_one_after_the_other(serve: Serve, tmp_path: Path) -> None:
    """Each that ends removes the file, so that the next one must not be content with a lock on a removed file."""
    options = (*TCP, "--control", f"{tmp_path}/chosen", "--set", "takeover_timeout=1h")
    daemons = [serve(":Obey", *options, ready=False) for _ in range(4)]
    left = list(daemons)
    while left:
        eventually(lambda: any(each.log.matches("^ready") for each in left), "one of them serves")
        (serving,) = [each for each in left if each.log.matches("^ready")]
        assert (tmp_path / "chosen.lock").read_text() == f"{serving.pid}\n"
        assert serving.stop() == 0
        left.remove(serving)
    assert not (tmp_path / "chosen.lock").exists()


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last owner removes it after we have opened it and before we have the lock."""
    lock = Lock(f"{tmp_path}/lock")
    really_lock = fcntl.flock
    removals = iter([lambda: os.unlink(lock.path)])

    def flock(descriptor: int, operation: int) -> None:
        next(removals, lambda: None)()
        really_lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert lock.acquire()
    assert not Lock(lock.path).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


# How those leave who are left.


def test_an_orphan_reads_end_of_file_before_it_is_ended_within_graceful_timeout(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, "--set", "graceful_timeout=4", "--set", "eof_timeout=3.5")
    _, (client, answers) = leave_a_busy_worker(daemon)
    assert answers.readline() == b"eof after 0\n"
    assert answers.read() == b""
    eventually(lambda: not daemon.alive(), "it has left")
    assert "Timeout" not in daemon.log.text
    answers.close()
    client.close()


def test_an_orphan_that_gets_no_thread_to_limit_itself_finishes_what_it_holds(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP)
    with Client(daemon) as client:
        limit_threads(client.pid)
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        eventually(lambda: client.ask(b"draining") == b"True\n")
        assert client.ask(b"say x") == b"x\n"
    eventually(lambda: not daemon.alive(), "it has left")


@pytest.mark.parametrize("timeout", ["0", "0.3"])
def test_an_orphan_that_does_not_heed_end_of_file_is_ended_all_the_same(serve: Serve, timeout: str) -> None:
    daemon = serve(":Obey", *TCP, "--set", f"graceful_timeout={timeout}", "--set", "eof_timeout=1h")
    with daemon.connect() as client, client.makefile("rb") as answers:
        client.sendall(b"spin\n")
        assert answers.readline() == b"spinning\n"
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        eventually(lambda: not daemon.alive(), "it has left")
        assert "Error" not in daemon.log.text


def test_molds_and_the_exporter_leave_with_the_master(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, "--metrics", "tcp://127.0.0.1:0")
    worker, (client, answers) = leave_a_busy_worker(daemon)
    assert daemon.alive() == [worker]
    answers.close()
    client.close()
