"""Which control socket belongs to a process: of real daemons, and of what only looks like one."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from preforkd.supervisor.supervised import Master, master_of
from tests.conftest import Serve
from tests.daemon import unprivileged

TCP = ("--listen", "tcp://127.0.0.1:0")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name, and a socket ``x`` in it."""
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{name}/x")
        yield Path(name)


def test_a_master_by_its_own_pid_and_a_worker_not(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP)
    assert master_of(daemon.pid) == Master(daemon.pid, daemon.control)
    assert {master_of(pid) for pid in daemon.family()} == {None}


def test_wherever_the_settings_have_it_and_after_an_upgrade(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / ("a" * 120) / "ctl"  # longer than a socket's address
    path.parent.mkdir()
    daemon = serve(":Pid", *TCP, "--listen", f"unix:{tmp_path}/control.sock", "--control", path)
    assert master_of(daemon.pid) == Master(daemon.pid, str(path))
    assert daemon.ctl("upgrade").returncode == 0
    assert master_of(daemon.pid) == Master(daemon.pid, str(path))


def test_one_that_another_program_has_started(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP, prefix=["sh", "-c", '"$@"; exit $?', "sh"])
    master = master_of(daemon.pid)
    assert master is not None
    assert master.pid != daemon.pid
    assert master.control == daemon.control
    os.kill(master.pid, signal.SIGTERM)  # which the shell does not pass on


def test_one_without_a_control_socket(serve: Serve, tmp_path: Path) -> None:
    """Its place has been taken by another, and is that one's."""
    first = serve(":Pid", *TCP, "--set", "name=same")
    second = serve(":Pid", *TCP, "--set", "name=same", runtime=first.runtime)
    second.log.wait_for("^no_control ")
    assert master_of(second.pid) is None
    assert master_of(first.pid) is not None


def test_nobody(place: Path) -> None:
    assert master_of(1 << 22) is None
    assert master_of(os.getpid()) is None


@pytest.mark.parametrize("content", [b"", b"junk", b"1\n", b"-1", b"9" * 100])
def test_a_lock_that_does_not_name_the_process_is_none(place: Path, content: bytes) -> None:
    (place / "x.lock").write_bytes(content)
    with open(place / "x.lock", "rb"):
        assert master_of(os.getpid()) is None


def test_a_lock_without_a_socket_beside_it_is_none(place: Path) -> None:
    for name in ("y.lock", ".lock"):
        (place / name).write_text(str(os.getpid()))
    (place / "y").write_text("")
    with open(place / "y.lock"), open(place / ".lock"):
        assert master_of(os.getpid()) is None
    (place / "x.lock").write_text(str(os.getpid()))
    with open(place / "x.lock"):
        assert master_of(os.getpid()) == Master(os.getpid(), str(place / "x"))


@pytest.mark.timeout(10)
def test_a_pipe_that_is_called_like_a_lock_is_not_waited_for(place: Path) -> None:
    """Whoever asks may be root, and the process somebody else's."""
    os.mkfifo(place / "x.lock")
    descriptor = os.open(place / "x.lock", os.O_RDWR)
    try:
        assert master_of(os.getpid()) is None
    finally:
        os.close(descriptor)


def test_where_we_may_not_look_there_is_none(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP)
    if not (prefix := unprivileged()):
        pytest.skip("only root has processes that others may not look into")
    script = f"from preforkd.supervisor.supervised import master_of; print(master_of({daemon.pid}))"
    assert subprocess.check_output([*prefix, sys.executable, "-c", script], text=True, cwd="/") == "None\n"
