"""What handlers, clients and the system do to a daemon: each costs what it must, is counted, and nothing more."""

import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Self

import pytest

from preforkd.holdback import pause
from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually, opened, unprivileged
from tests.test_stop import Client, exit_of

TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")
ONE = ("--max-children", "1")


def outcomes(daemon: Daemon, service: str) -> dict[str, float]:
    """Requests of the service by outcome, without those that are zero."""
    pattern = rf'preforkd_requests_total\{{outcome="(\w+)",service="{service}"\}}'
    found = {m[1]: value for name, value in daemon.metrics().items() if (m := re.fullmatch(pattern, name))}
    return {outcome: count for outcome, count in found.items() if count}


def exits(daemon: Daemon, service: str) -> dict[str, float]:
    """Workers of the service that have left, by reason, without those that are zero."""
    pattern = rf'preforkd_worker_exits_total\{{reason="(\w+)",service="{service}"\}}'
    found = {m[1]: value for name, value in daemon.metrics().items() if (m := re.fullmatch(pattern, name))}
    return {reason: count for reason, count in found.items() if count}


def answer(daemon: Daemon, question: bytes) -> bytes:
    """What comes back before the connection ends, in whatever way it ends; being refused or kept waiting is none."""
    try:
        return daemon.ask(question)
    except (ConnectionRefusedError, TimeoutError):
        raise
    except OSError:
        return b""


def reset(client: socket.socket) -> None:
    """Close with a reset (socket(7), SO_LINGER with no time to linger)."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# Handlers.


def test_a_handler_that_raises_is_an_error_and_its_worker_serves_on(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *ONE)
    (worker,) = daemon.workers()
    assert daemon.ask(b"raise\npid\n") == b""
    assert daemon.ask(b"pid\n") == b"%d\n" % worker
    eventually(lambda: outcomes(daemon, "Obey") == {"ok": 1, "error": 1})
    assert exits(daemon, "Obey") == {}
    assert daemon.log.lines.count("ValueError: as told") == 1
    assert daemon.log.matches("^Exception occurred during processing of request from")


@pytest.mark.parametrize(
    ("order", "outcome", "reason", "how"),
    [
        (b"exit 0", "error", "crash", "status=0"),
        (b"exit 3", "error", "crash", "status=3"),
        (b"interrupt", "error", "crash", "status=1"),
        (b"os_exit 0", "killed", "crash", "status=0"),
        (b"os_exit 3", "killed", "crash", "status=3"),
        (b"segfault", "killed", "crash", "signal=SIGSEGV"),
        (b"kill", "killed", "crash", "signal=SIGKILL"),
    ],
)
def test_a_handler_that_ends_its_worker_is_counted_and_the_worker_replaced(
    serve: Serve, order: bytes, outcome: str, reason: str, how: str
) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *ONE)
    (before,) = daemon.workers()
    assert daemon.ask(b"say hello\n") == b"hello\n"
    assert answer(daemon, b"%s\npid\n" % order) == b""
    said = daemon.log.wait_for("^worker_exit service=Obey .*")[0]
    assert f" pid={before} cause={reason} {how} requests={1 + (outcome == 'error')} " in said
    assert (" lost=1 " in said) == (outcome == "killed")
    after = int(daemon.ask(b"pid\n"))
    assert after != before
    eventually(lambda: daemon.workers("Obey") == [after])  # it may serve before the master has logged it
    eventually(lambda: outcomes(daemon, "Obey") == {"ok": 2, outcome: 1})
    assert exits(daemon, "Obey") == {reason: 1}
    if order == b"segfault":
        assert daemon.log.matches(r"^Obey#0\| Fatal Python error: Segmentation fault")
        assert daemon.log.matches(r'^Obey#0\|   File ".*targets.py", line \d+ in obey')
    eventually(lambda: not daemon.zombies(), "no zombie")


def stamp(match: re.Match[str]) -> float:
    found = re.search(r" at=(\S+)", match.string)
    assert found
    return datetime.fromisoformat(found[1]).timestamp()


def test_a_crash_loop_backs_off_and_ends_when_a_worker_does_its_work(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *ONE)
    for crashes in (1, 2):
        assert answer(daemon, b"os_exit 3\n") == b""
        died = stamp(daemon.log.wait_for("^worker_exit service=Obey ", crashes))
        replaced = stamp(daemon.log.wait_for("^worker_ready service=Obey ", crashes + 1))
        assert replaced - died >= pause(crashes) - 0.01
    assert daemon.ask(b"say hello\n") == b"hello\n"
    answer(daemon, b"os_exit 3\n")
    died = stamp(daemon.log.wait_for("^worker_exit service=Obey ", 3))
    replaced = stamp(daemon.log.wait_for("^worker_ready service=Obey ", 4))
    assert replaced - died < pause(2)
    assert exits(daemon, "Obey") == {"crash": 3}


# Clients.


def test_clients_that_half_close_reset_say_nothing_or_vanish_cost_nobody_anything(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *METRICS, "--max-children", "2")
    workers = daemon.workers("Upper")
    for _ in range(20):
        assert daemon.ask(b"a\nb") == b"A\nB"  # half-closed
        daemon.connect().close()  # nothing said
        reset(daemon.connect())  # nothing said, and gone
        silent = daemon.connect()
        silent.sendall(b"half a line")
        reset(silent)
        deaf = daemon.connect()
        deaf.sendall(b"a line\n" * 1000)
        deaf.close()  # its answers come back to nobody
    eventually(lambda: sum(outcomes(daemon, "Upper").values()) == 100)
    assert outcomes(daemon, "Upper")["ok"] >= 40
    assert daemon.workers("Upper") == workers
    assert exits(daemon, "Upper") == {}


def test_silent_clients_keep_nobody_but_their_own_worker(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *METRICS, "--max-children", "3")
    with daemon.connect(), daemon.connect():
        eventually(lambda: daemon.metrics()['preforkd_workers{service="Upper",state="busy"}'] == 2)
        assert [daemon.ask(b"a\n") for _ in range(10)] == [b"A\n"] * 10
    eventually(lambda: outcomes(daemon, "Upper") == {"ok": 12})


def test_ten_thousand_connections_opened_and_dropped_are_all_counted(serve: Serve) -> None:
    """``BaseRequestHandler`` itself does nothing, so nobody is told to be quiet about resets."""
    daemon = serve("socketserver:BaseRequestHandler", *TCP, *METRICS, "--max-children", "2")
    before, address = daemon.descriptors(), daemon.address()
    workers = daemon.in_their_lanes("BaseRequestHandler")
    open_before = [len(opened(pid)) for pid in workers]
    for number in range(10_000):
        client = socket.create_connection(address, DEADLINE)
        reset(client) if number % 2 else client.close()
    eventually(lambda: outcomes(daemon, "BaseRequestHandler") == {"ok": 10_000})
    assert daemon.workers("BaseRequestHandler") == workers
    assert [len(opened(pid)) for pid in workers] == open_before
    eventually(lambda: daemon.descriptors() == before)


# The system.


def limit(pid: int, which: int, soft: int, prefix: Sequence[str] = ()) -> None:
    """How much a process may have from now on, at most as much as before (prlimit(2)). ``prefix``: to be its user."""
    code = "import sys, resource as r; pid, which, soft = map(int, sys.argv[1:]); hard = r.prlimit(pid, which)[1]\n"
    code += "r.prlimit(pid, which, (soft if soft >= 0 else hard, hard))"
    words = [*prefix, sys.executable, "-c", code, str(pid), str(which), str(soft)]
    subprocess.run(words, check=True, timeout=DEADLINE, cwd="/")


def limit_threads(pid: int) -> None:
    """From now on, a process gets no thread more: no memory for a stack."""
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    limit(pid, resource.RLIMIT_AS, used + (1 << 20))


@contextmanager
def limited(pid: int, which: int, soft: int, prefix: Sequence[str] = ()) -> Iterator[None]:
    """For this time, a process may have only so much; afterwards, if it still lives, as much as it ever may."""
    limit(pid, which, soft, prefix)
    try:
        yield
    finally:
        if os.path.exists(f"/proc/{pid}"):
            limit(pid, which, -1, prefix)


def test_a_fork_that_fails_is_said_and_tried_again_until_it_succeeds(serve: Serve) -> None:
    target = "preforkd_workers.samples:Upper"
    user = unprivileged()
    daemon = serve(target, *TCP, *METRICS, "--max-children", "2", prefix=user)
    (mold,) = daemon.titled("mold Upper")
    with limited(mold, resource.RLIMIT_NPROC, 1, user):
        os.kill(daemon.workers("Upper")[0], signal.SIGKILL)
        assert float(daemon.log.wait_for(r"^spawn_refused .*retry_in=([0-9.]+)s")[1]) >= pause(1)
        assert "Resource temporarily unavailable" in daemon.log.text
        assert "check RLIMIT_NPROC" in daemon.log.text
        assert daemon.ask(b"a\n") == b"A\n"
    eventually(lambda: len(daemon.workers("Upper")) == 2)
    eventually(lambda: not daemon.zombies(), "no zombie")


def test_a_mold_that_cannot_be_forked_is_said_and_tried_again(serve: Serve) -> None:
    target = "preforkd_workers.samples:Upper"
    user = unprivileged()
    daemon = serve(target, *TCP, "--max-children", "2", prefix=user)
    before = daemon.descriptors()
    with limited(daemon.pid, resource.RLIMIT_NPROC, 1, user):
        os.kill(daemon.titled("mold Upper")[0], signal.SIGKILL)
        daemon.log.wait_for('^mold_refused service=Upper reason="Resource temporarily unavailable"', 2)
        assert daemon.ask(b"a\n") == b"A\n"
    daemon.log.wait_for("^mold_ready ", 2)
    assert daemon.descriptors() == before


def lowest_free_descriptor(pid: int) -> int:
    taken = set(map(int, os.listdir(f"/proc/{pid}/fd")))
    return next(number for number in range(len(taken) + 1) if number not in taken)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def naps(pid: int) -> int:
    """How often a process has gone to sleep of its own accord."""
    found = re.search(r"\nvoluntary_ctxt_switches:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


@pytest.mark.parametrize("words", [(":Upper",), (":ThreadingObeyServer", "--handler", ":Obey")])
def test_an_accept_that_fails_is_said_and_waited_out_without_burning_cpu(serve: Serve, words: tuple[str, ...]) -> None:
    daemon = serve(*words, *TCP, *ONE)
    (worker,) = daemon.in_their_lanes()
    with limited(worker, resource.RLIMIT_NOFILE, lowest_free_descriptor(worker)), daemon.connect() as client:
        client.sendall(b"say a\n")
        daemon.log.wait_for("^starved .*error=.Too many open files. advice=.*RLIMIT_NOFILE")
        cpu, slept, began = cpu_seconds(worker), naps(worker), time.monotonic()
        eventually(lambda: naps(worker) >= slept + 6)
        assert cpu_seconds(worker) - cpu <= 0.05
        assert time.monotonic() - began >= 0.3
        limit(worker, resource.RLIMIT_NOFILE, -1)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answered:
            assert answered.read() in (b"SAY A\n", b"a\n")
    assert daemon.workers() == [worker]
    assert len(daemon.log.matches("^starved ")) == 1


def test_a_starved_worker_leaves_when_it_is_told_to(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *ONE)
    (worker,) = daemon.in_their_lanes()
    with limited(worker, resource.RLIMIT_NOFILE, lowest_free_descriptor(worker)), daemon.connect():
        daemon.log.wait_for("^starved ")
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("^worker_exit .*cause=drained")
    assert daemon.wait() == 0


def test_a_worker_that_gets_no_thread_more_finishes_what_it_holds(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *ONE, "--kind", "thread", "--threads", "2")
    with Client(daemon) as client, Client(daemon) as other:
        limit_threads(client.pid)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: client.ask(b"draining") == b"True\n")
        assert other.ask(b"say x") == b"x\n"
    assert daemon.wait() == 0
    assert " cause=drained status=0 " in exit_of(daemon, client.pid)


# Everything at once.


class Load:
    """Clients that ask one question after the other, and keep count of what became of them."""

    def __init__(self, daemon: Daemon, clients: int) -> None:
        self.daemon = daemon
        self.fates: Counter[str] = Counter()
        self.wrong: list[bytes] = []
        self.changed = threading.Condition()
        self.ended = False
        self.threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        while not self.ended:
            answered = answer(self.daemon, b"say hello\n")
            with self.changed:
                self.fates["answered" if answered else "cut"] += 1
                self.wrong += [answered] if answered not in (b"hello\n", b"") else []
                self.changed.notify_all()

    def wait_for_more(self, requests: int) -> None:
        with self.changed:
            wanted = self.fates.total() + requests
            assert self.changed.wait_for(lambda: self.fates.total() >= wanted, DEADLINE)

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        for thread in self.threads:
            thread.join()


def test_random_deaths_under_load_cost_the_request_that_was_held_and_nothing_else(serve: Serve) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201 - shown when the test fails
    chance = random.Random(seed)
    daemon = serve(":Obey", *TCP, *METRICS, "--max-children", "4")
    before, kills = daemon.descriptors(), 0
    counters = daemon.metrics()
    with Load(daemon, 3) as load:
        for _ in range(40):
            load.wait_for_more(chance.randrange(30))
            kind = chance.choice(["worker Obey#", "worker Obey#", "worker Obey#", "mold Obey"])
            for victim in chance.sample(found := daemon.titled(kind), min(len(found), chance.randint(1, 2))):
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                kills += kind != "mold Obey"
            seen = daemon.metrics()
            for name, value in counters.items():
                if "_total" in name or "_bucket" in name or "_count" in name:
                    assert seen[name] >= value, f"{name} went backwards"
            counters = seen
    assert load.wrong == []
    assert load.fates["cut"] <= kills
    eventually(lambda: len(daemon.workers("Obey")) == 4 and len(daemon.titled("mold Obey")) == 1)
    counted = outcomes(daemon, "Obey")
    assert counted.keys() <= {"ok", "killed"}
    assert load.fates.total() - kills <= sum(counted.values()) <= load.fates.total()
    assert load.fates["answered"] - kills <= counted["ok"] <= load.fates.total()
    left = exits(daemon, "Obey")
    assert left.keys() <= {"crash", "boot"}  # boot: also those whom their mold could not tell of any more
    assert left["crash"] <= kills
    # One of the four may be a worker whose mold could not tell of it any more: it leaves, and another one is asked for.
    spawns = 'preforkd_worker_spawns_total{service="Obey"}'
    eventually(lambda: daemon.metrics()[spawns] >= 4 + sum(exits(daemon, "Obey").values()))
    eventually(lambda: not daemon.zombies())
    eventually(lambda: daemon.descriptors() == before)
    eventually(lambda: len(daemon.family()) == 4 + 1 + 2, "nobody but workers, exporter and molds")
