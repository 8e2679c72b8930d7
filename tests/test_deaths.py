"""Every death of a worker has its cause, and one event says all that is known of it: as values, and by real deaths."""

import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from preforkd import memory
from preforkd.deaths import Held, Obituary, cause_of, held_by
from preforkd.plan import State
from preforkd_workers.scoreboard import CAUSES, LISTENER, MARK, PEER, SINCE, Rows, write_text
from tests.conftest import Serve
from tests.daemon import Daemon, eventually
from tests.site import Talk

MORTAL = f"{Path(__file__).parent / 'mortal.py'}:Mortal"
TCP = "tcp://127.0.0.1:0"


@dataclass
class Record:
    """A child as far as its cause of death goes."""

    state: State = State.READY
    cause: str | None = None
    reason: str = "drained"
    is_leaving: bool = False
    was_cut: bool = False


DRAINING = Record(State.DRAINING)


@pytest.mark.parametrize(
    ("child", "status", "cause"),
    [
        (Record(), 0, "crash"),
        (Record(), 3, "crash"),
        (Record(), -signal.SIGKILL, "crash"),
        (Record(), None, "crash"),
        (Record(is_leaving=True), 0, "drained"),
        (Record(is_leaving=True), -signal.SIGSEGV, "crash"),
        (Record(State.BOOTING), 0, "boot"),
        (Record(State.BOOTING), -signal.SIGKILL, "boot"),
        (DRAINING, 0, "drained"),
        (DRAINING, -signal.SIGTERM, "drained"),
        (DRAINING, -signal.SIGKILL, "crash"),
        (DRAINING, 1, "crash"),
        (Record(State.DRAINING, reason="max_lifetime"), 0, "max_lifetime"),
        (Record(State.DRAINING, reason="max_lifetime"), -signal.SIGSEGV, "crash"),
        (Record(State.HALF_CLOSED, was_cut=True), 0, "eof"),
        (Record(State.HALF_CLOSED, was_cut=True, reason="max_rss"), 0, "max_rss"),
        (Record(State.HALF_CLOSED), 0, "drained"),
        (Record(State.KILLED, cause="deadline"), -signal.SIGABRT, "deadline"),
        (Record(State.KILLED, cause="operator"), -signal.SIGKILL, "operator"),
        (Record(State.KILLED, cause="max_rss"), 0, "max_rss"),
    ],
)
def test_the_cause_follows_from_what_we_did_and_how_it_ended(child: Record, status: int | None, cause: str) -> None:
    assert cause_of(child, status) == cause
    assert cause in CAUSES


@pytest.mark.parametrize("state", [State.READY, State.BOOTING, State.DRAINING])
def test_who_was_killed_for_its_memory_is_said_so_whatever_it_did(state: State) -> None:
    assert cause_of(Record(state), -signal.SIGKILL, is_oom=True) == "oom"
    assert cause_of(Record(state, cause="deadline"), -signal.SIGKILL, is_oom=True) == "deadline"


def holding(rows: Rows, lane: int, since: int, peer: str, listener: int = 0, mark: str = "") -> None:
    row = rows[lane]
    row[SINCE], row[LISTENER] = since, listener
    write_text(row, PEER, peer)
    write_text(row, MARK, mark)


def test_of_several_requests_the_oldest_is_shown() -> None:
    rows = Rows.blank(3)
    assert held_by(rows, ["tcp://a:1"], 10) is None
    holding(rows, 1, 3_000_000_000, "b:2", listener=1, mark="parsing")
    holding(rows, 2, 4_000_000_000, "c:3")
    assert held_by(rows, ["tcp://a:1", "unix:/b"], 5_500_000_000) == Held("b:2", "unix:/b", 2.5, "parsing")
    assert held_by(rows, ["tcp://a:1"], 5_500_000_000) == Held("b:2", "", 2.5, "parsing")


def test_the_event_says_what_is_known_and_nothing_else() -> None:
    usage = resource.struct_rusage([1.25, 0.5, 20480, *[0] * 13])
    held = Held("10.0.0.1:5", "tcp://0.0.0.0:80", 2.5, "parsing")
    death = Obituary("crash", -signal.SIGSEGV, usage, age=12.34, requests=7, lost=2, held=held)
    assert {key: value for key, value in death.fields().items() if value is not None} == {
        "cause": "crash",
        "signal": "SIGSEGV",
        "requests": 7,
        "lost": 2,
        "peer": "10.0.0.1:5",
        "listener": "tcp://0.0.0.0:80",
        "held": "2.500s",
        "mark": "parsing",
        "age": "12.3s",
        "user": "1.250s",
        "system": "0.500s",
        "max_rss": "20.0M",
    }
    assert {k: v for k, v in Obituary("orphaned", None, None).fields().items() if v is not None} == {
        "cause": "orphaned"
    }


@pytest.mark.parametrize(
    ("death", "is_failed_start", "failure"),
    [
        (Obituary("crash", 1, None, age=1.0, requests=0), True, None),
        (Obituary("crash", 1, None, age=1.0, requests=1), False, None),
        (Obituary("crash", 1, None, age=99.0, requests=0), False, None),
        (Obituary("oom", -9, None, age=1.0, requests=0), True, None),
        (Obituary("max_rss", -9, None, age=1.0, requests=0), True, None),
        (Obituary("max_requests", 0, None, age=0.0, requests=1), False, None),
        (Obituary("max_lifetime", 0, None, age=1.0, requests=0), False, None),
        (Obituary("boot", 3, None, has_booted=False), True, "a worker exited with status 3 before it was ready"),
        (Obituary("boot", None, None, has_booted=False), False, None),
        (
            Obituary("oom", -9, None, has_booted=False),
            True,
            "a worker was killed by SIGKILL, for the kernel was out of memory, before it was ready",
        ),
    ],
)
def test_a_death_hints_at_a_crash_loop_when_it_was_early_fruitless_and_not_asked_for(
    death: Obituary, is_failed_start: bool, failure: str | None
) -> None:
    assert death.is_failed_start == is_failed_start
    assert death.failure(None) == failure


# Real deaths.


def obituary(daemon: Daemon, pid: int) -> str:
    return daemon.log.wait_for(rf"^worker_exit .*\bpid={pid} .*")[0]


def ask(daemon: Daemon, order: str) -> int:
    """Have a worker do something that it may not survive; its pid."""
    with daemon.connect() as client, client.makefile("rb") as answers:
        client.sendall(b"pid\n" + order.encode() + b"\n")
        pid = int(answers.readline())
        answers.read()
    return pid


FATAL = signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT, signal.SIGILL


def test_every_fatal_signal_leaves_a_stack_and_an_event_that_says_whom_it_served(serve: Serve) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1)
    for number in FATAL:
        with daemon.connect() as client, client.makefile("rb") as answers:
            client.sendall(b"pid\n")
            pid = int(answers.readline())
            client.sendall(f"die {number.value}\n".encode())
            assert answers.read() == b""
            host, port = client.getsockname()
        said = obituary(daemon, pid)
        assert re.search(
            rf"cause=crash signal={number.name} requests=0 lost=1 peer={host}:{port} listener={daemon.url()} "
            r"held=\d+\.\d{3}s age=\d+\.\ds user=\d+\.\d{3}s system=\d+\.\d{3}s max_rss=\d+\.\dM",
            said,
        ), said
        lines = daemon.log.lines
        stack = [line for line in lines[: lines.index(said)] if line.startswith("Mortal#0| ")]
        assert any(" in obey" in line for line in stack), stack
        daemon.log.wait_for("^worker_ready ", FATAL.index(number) + 2)


def test_a_kill_from_outside_is_a_crash_and_a_term_from_outside_a_drain(serve: Serve) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 2)
    first, second = daemon.workers()
    os.kill(first, signal.SIGKILL)
    assert "cause=crash signal=SIGKILL requests=0 age=" in obituary(daemon, first)
    os.kill(second, signal.SIGTERM)
    assert "cause=drained status=0 requests=0 age=" in obituary(daemon, second)


def test_an_exit_that_nobody_asked_for_is_a_crash_with_its_status(serve: Serve) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1)
    assert "cause=crash status=7 requests=0 lost=1 peer=127.0.0.1:" in obituary(daemon, ask(daemon, "os_exit 7"))


def test_who_is_killed_at_its_deadline_or_by_the_operator_is_said_to_be_with_what_it_held(serve: Serve) -> None:
    daemon = serve(
        MORTAL, "--listen", TCP, "--max-children", 1, "--set", "graceful_timeout=0.1", "--set", "eof_timeout=0.1"
    )
    with ExitStack() as clients:
        pids = []
        for number in (1, 2):
            client = clients.enter_context(daemon.connect())
            answers = clients.enter_context(client.makefile("rb"))
            client.sendall(b"pid\nspin\n")
            pids.append(int(answers.readline()))
            answers.readline()
            if number == 1:
                os.kill(daemon.pid, signal.SIGHUP)  # the old generation has to go
                said = obituary(daemon, pids[0])
                assert "cause=deadline signal=SIGABRT requests=0 lost=1 peer=127.0.0.1:" in said
                daemon.log.wait_for("^reload_done ")
        daemon.signal(signal.SIGINT)
        assert "cause=operator signal=SIGABRT requests=0 lost=1 peer=127.0.0.1:" in obituary(daemon, pids[1])


def test_the_oldest_request_of_many_lanes_is_shown_and_all_are_counted(serve: Serve) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1, "--set", "kind=thread", "--set", "threads=4")
    with ExitStack() as clients:
        talks = []
        for _ in range(3):
            client = clients.enter_context(daemon.connect())
            answers = clients.enter_context(client.makefile("rb"))
            client.sendall(b"pid\n")
            pid = int(answers.readline())
            talks.append(client)
        talks[-1].sendall(b"die 9\n")
        host, port = talks[0].getsockname()
        assert f"cause=crash signal=SIGKILL requests=0 lost=3 peer={host}:{port} " in obituary(daemon, pid)


def test_who_was_left_by_a_master_that_died_is_reported_by_the_next_one(serve: Serve) -> None:
    first = serve(MORTAL, "--listen", TCP, "--listen", "tcp://127.0.0.2:0", "--max-children", 2)
    with Talk(first) as talk:
        fds = Path(f"/proc/{first.pid}/fd")
        path = next(each for each in fds.iterdir() if "preforkd-scoreboard" in os.readlink(each))
        board = os.open(path, os.O_RDWR)
        workers = first.workers()
        os.kill(first.pid, signal.SIGSTOP)  # lest it reaps
        for pid in [*workers, first.pid]:
            os.kill(pid, signal.SIGKILL)
        first.wait()
        host, port = talk.socket.getsockname()
    eventually(lambda: not first.family(), "its molds have left")
    passed = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "preforkd-scoreboard"}
    command = "sh", "-c", f'exec 3<>/proc/self/fd/{board} && export LISTEN_PID=$$ && exec "$@"', "sh"
    second = serve(MORTAL, "--listen", TCP, environment=passed, pass_fds=[board], prefix=command)
    os.close(board)
    said = second.log.wait_for(rf"^worker_exit .*\bpid={talk.pid} .*")[0]
    pattern = (
        rf"gen=1 pid={talk.pid} cause=orphaned lost=1 peer={host}:{port} listener={first.url()} held=\d+\.\d+s at="
    )
    assert re.search(pattern, said), said
    assert len(second.log.matches("^worker_exit .*cause=orphaned")) == 2


# The kernel's own kills.


@pytest.fixture
def cgroup() -> Iterator["Cgroup"]:
    found = Cgroup()
    yield found
    found.remove()


class Cgroup:
    """A memory cgroup below our own. Skips the test where none can be made."""

    def __init__(self) -> None:
        ours = memory.find(Path("/proc"))
        if not ours._levels:
            pytest.skip("there is no memory cgroup")
        self.version = ours._version
        self.path = Path(ours._levels[0]) / f"preforkd-test-{os.getpid()}"
        try:
            self.path.mkdir()
            self.limit(1 << 40)
        except OSError as error:
            self.remove()
            pytest.skip(f"no memory cgroup can be made: {error}")

    def limit(self, size: int) -> None:
        (self.path / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")).write_text(str(size))
        swap = self.path / ("memory.swap.max" if self.version == 2 else "memory.memsw.limit_in_bytes")
        if swap.exists() and size < 1 << 40:
            swap.write_text(str(0 if self.version == 2 else size))

    @property
    def used(self) -> int:
        return int((self.path / ("memory.current" if self.version == 2 else "memory.usage_in_bytes")).read_text())

    def enter(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    @property
    def command(self) -> list[str]:
        """What to put before a command so that it runs in here."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh"]

    def remove(self) -> None:
        if self.path.exists():
            eventually(lambda: not (self.path / "cgroup.procs").read_text(), "nobody is left in the cgroup")
            self.path.rmdir()


def test_a_kill_by_the_kernel_is_told_from_one_by_a_stranger(cgroup: Cgroup, serve: Serve) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1, prefix=cgroup.command)
    stranger = daemon.workers()[0]
    os.kill(stranger, signal.SIGKILL)
    assert "cause=crash signal=SIGKILL" in obituary(daemon, stranger)
    daemon.log.wait_for("^worker_ready ", 2)
    cgroup.limit(cgroup.used + (32 << 20))
    victim = ask(daemon, "grow 200")
    assert "cause=oom signal=SIGKILL requests=0 lost=1 peer=127.0.0.1:" in obituary(daemon, victim)
    daemon.log.wait_for("^worker_ready ", 3)
    next_one = daemon.workers()[0]
    os.kill(next_one, signal.SIGKILL)
    assert "cause=crash signal=SIGKILL" in obituary(daemon, next_one)
