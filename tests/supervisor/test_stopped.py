"""A supervisord that is stopped reads nothing: no worker may wait for it, nor the master."""

import os
import re
import signal
import socket

import pytest

from tests.daemon import DEADLINE, eventually, preforkctl
from tests.supervisor.conftest import Supervise
from tests.supervisor.daemon import Supervisor, needs
from tests.unheard import TALK

SETTINGS = f"""
[services.Talk]
target = "{TALK}"
listen = ["tcp://127.0.0.1:0"]
probation = "0s"
max_children = 1
"""

MANY = 40_000  # lines: more than a pipe holds


def say(address: tuple[str, int], what: str) -> bytes:
    with socket.create_connection(address, DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(f"{what}\n".encode())
        client.shutdown(socket.SHUT_WR)
        return answers.readline()


def stopped_pid(supervisor: Supervisor) -> int:
    """The pid of supervisord, as it says itself."""
    with supervisor.rpc as rpc:
        return int(rpc.supervisor.getPID())


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_supervisord_that_is_stopped_stops_nobody(user: str, deploy: Supervise) -> None:
    """The pipe is supervisord's, and so another user's where it starts the program as nobody."""
    options = {} if user == "root" else {"user": user}
    if options:
        needs(user)
    supervisor = deploy(SETTINGS, options=options)
    address, pid = supervisor.address("x"), stopped_pid(supervisor)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert say(address, f"stderr {MANY} {'x' * 50}") == b"said\n"
        done = preforkctl("x", "reload", environment=supervisor.environment)
        assert done.returncode == 0, done.stderr
        for how in ("print", "stderr", "library", "log"):
            assert say(address, f"{how} {MANY} {'x' * 50}") == b"said\n"
    finally:
        os.kill(pid, signal.SIGCONT)
    log = supervisor.log("x")
    eventually(lambda: say(address, "print 1 again") and log.matches("^log_dropped service=Talk "), "it is told")
    known = re.compile(r"(x{50}|again) \d+$|x{50} \d+ x{200}$|[a-z_]+ \w+=")
    assert [line for line in log.lines if not known.match(line)] == []
