"""A request that has woken a worker woke no other: it is served by that worker though it was told to leave meanwhile.

A connection or datagram wakes one lane (EPOLLEXCLUSIVE). Between waking and running lies the scheduler; here it takes
long enough for the master to tell that very worker to leave, and nobody else ever comes who would wake the others.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from preforkd_workers.protocol import DRAIN
from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually
from tests.under_load import NO_BYTECODE, SERVICES, Code


@pytest.fixture
def crowded_cpu() -> Iterator[int]:
    """A processor on which somebody computes without end; this process, and whom it starts, keep away from it."""
    everywhere = os.sched_getaffinity(0)
    cpu = max(everywhere)
    program = f"import os; os.sched_setaffinity(0, [{cpu}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as spinner:
        assert spinner.stdout is not None
        spinner.stdout.readline()
        os.sched_setaffinity(0, everywhere - {cpu} or everywhere)
        try:
            yield cpu
        finally:
            os.sched_setaffinity(0, everywhere)
            spinner.kill()


def make_slow(pid: int, cpu: int) -> None:
    """Let the process run only when nobody else wants to, where always somebody wants to (sched(7), SCHED_IDLE)."""
    os.sched_setaffinity(pid, [cpu])
    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def make_fast(pid: int) -> None:
    """The contrary, where the rest of the daemon is."""
    os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
    os.sched_setaffinity(pid, os.sched_getaffinity(0))


def is_told(pid: int) -> bool:
    """Whether it was told to leave and has not heard it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # it has left
        return False
    pending = re.search(r"\nShdPnd:\s*(\w+)", status)
    return bool(pending and int(pending[1], 16) & 1 << (DRAIN - 1))  # proc(5): a bit for each signal


def is_waiting(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def replace_first(daemon: Daemon, service: str) -> None:
    """Have the first worker replaced, so that the second is the first to be woken."""
    (first,) = daemon.titled(f"worker {service}#0")
    os.kill(first, signal.SIGKILL)
    daemon.log.wait_for(rf"^worker_ready service={service} slot=0 ", 2)


# A class with a loop of its own.
OWN_LOOP = """
class Stream(TCPServer):
    def serve_forever(self, poll_interval=0.5):
        while True:
            self.handle_request()
"""


# How often the scene is set. The scheduler gives even SCHED_IDLE a share: when that comes too early, the worker takes
# the request before it is told to leave, the other one leaves, and nothing has been tried.
SCENES = 10


@pytest.mark.parametrize(("service", "more"), [(SERVICES[0], ""), (SERVICES[1], ""), (SERVICES[0], OWN_LOOP)])
def test_a_request_is_served_by_the_worker_that_it_woke_although_that_is_told_to_leave(
    crowded_cpu: int, serve: Serve, tmp_path: Path, service: str, more: str
) -> None:
    code = Code(tmp_path)
    code.deploy(more)
    for _ in range(SCENES):
        daemon = serve("-c", code.settings(streams=2, datagrams=2), environment=NO_BYTECODE)
        replace_first(daemon, service)
        (second,) = daemon.titled(f"worker {service}#1")
        eventually(lambda daemon=daemon: all(map(is_waiting, daemon.titled(f"worker {service}#"))))  # type: ignore[misc]
        make_slow(second, crowded_cpu)
        answer = ask_while_one_leaves(daemon, service, second)
        leaver, said = re.search(  # type: ignore[union-attr]
            r"pid=(\d+) (.*)", daemon.log.wait_for(rf"^worker_exit service={service} .* cause=(?!crash).*")[0]
        ).groups()
        assert answer.split()[:3] == [b"1", b"7", b"1"]
        assert said.startswith("cause=drained ")
        if int(leaver) == second:
            assert int(answer.split()[3]) == second
            return
    pytest.fail(f"in none of {SCENES} scenes the worker that was woken was the one told to leave")


def ask_while_one_leaves(daemon: Daemon, service: str, slow: int) -> bytes:
    """Wake a worker, the slow one if it is idle, then have one leave. The answer, which waits for no other client."""
    kind = socket.SOCK_STREAM if service == "stream" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as client:
        client.settimeout(DEADLINE)
        client.connect(daemon.address(service))
        if kind is socket.SOCK_DGRAM:
            client.send(b"datagram 7\n")
        daemon.signal(signal.SIGTTOU)
        if kind is socket.SOCK_STREAM:
            client.send(b"visit 7\n")
        eventually(lambda: daemon.log.matches(f"^worker_exit service={service} .* cause=drained") or is_told(slow))
        with suppress(ProcessLookupError):  # it has left
            make_fast(slow)
        return client.recv(100)
