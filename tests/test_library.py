"""The library classes, in programs of their own, and under CPython's tests for the classes that they replace."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import preforkd
from tests.daemon import DEADLINE
from tests.library import PROGRAMS

HERE = Path(__file__).parent


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program, with warnings as errors. It has left nobody behind when this returns: they would hold the pipe."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done


KILLED = {"orphaned": -signal.SIGKILL, "orphaned_with_a_client": -signal.SIGKILL}
PRINTS = {"interrupted": "interrupted once\n", "buffered_output": "once\n"}
STACKS = {"stuck_handler_at_shutdown"}  # whatever is killed is killed with its stack on standard error


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str) -> None:
    done = run(str(HERE / "library.py"), name, status=KILLED.get(name, 0))
    assert done.stdout == PRINTS.get(name, "")
    assert ("in handle" in done.stderr) if name in STACKS else done.stderr == ""


def test_cpythons_own_tests_pass_over_the_classes() -> None:
    try:
        import test.test_socketserver
    except ImportError:
        pytest.skip("this interpreter ships no test package")
    assert test.test_socketserver
    done = run("-W", "ignore::DeprecationWarning", str(HERE / "cpython.py"))
    kinds = ["TCP", "UDP"] + (["UnixStream", "UnixDatagram"] if sys.version_info >= (3, 12) else [])
    for kind in kinds:
        assert f"PreForking{kind}Server'>" in done.stdout + done.stderr
    for kind in ("TCP", "UDP", "UnixStream", "UnixDatagram"):
        assert f"ThreadPool{kind}Server'>" in done.stdout + done.stderr


def test_everything_public_of_socketserver_is_here_too() -> None:
    import socketserver

    assert set(socketserver.__all__) <= set(preforkd.__all__)
    assert all(getattr(preforkd, name) is getattr(socketserver, name) for name in socketserver.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        getattr(preforkd, "nothing")  # noqa: B009
