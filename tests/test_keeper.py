"""A fresh process for each request, and its keeper: to the master, and to whoever signals them, they are one worker."""

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from preforkd.pool import HEARING
from tests.conftest import Serve
from tests.daemon import Daemon, eventually
from tests.site import Site, Talk, udp
from tests.test_deaths import TCP, obituary
from tests.test_door import is_turned_away

HERE = Path(__file__).parent
OBEY = (":Obey", "--listen", TCP)
ONE = ("--max-children", "1", "--set", "max_requests=1")
# Made ahead by the keeper; and, where more than the handler has a part in it, by each fresh process for itself.
WAYS = pytest.mark.parametrize("way", [(), ("--set", "access_log=-")], ids=["ahead", "afresh"])
Way = Sequence[str]


def fresh(keeper: int) -> int:
    """The process that a keeper has: it may be ready and fork only then."""
    eventually(psutil.Process(keeper).children)
    (child,) = psutil.Process(keeper).children()
    return child.pid


def keeper_of(daemon: Daemon) -> int:
    (keeper,) = daemon.workers()
    return keeper


def has_gone(pid: int) -> None:
    eventually(lambda: not psutil.pid_exists(pid), f"{pid} has left")


@WAYS
def test_many_requests_are_one_workers_and_cost_the_master_nothing(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way, "--metrics", "tcp://127.0.0.1:0")
    keeper = keeper_of(daemon)
    pids = {daemon.ask(b"pid\n") for _ in range(20)}
    assert len(pids) == 20
    assert keeper_of(daemon) == keeper
    eventually(lambda: daemon.metrics()['preforkd_requests_total{outcome="ok",service="Obey"}'] == 20)
    assert not daemon.log.matches("^worker_exit ")


@WAYS
def test_a_drain_lets_it_finish_and_takes_nothing_more(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    keeper = keeper_of(daemon)
    with Talk(daemon) as talk:
        daemon.signal(signal.SIGTERM)
        while talk.ask("draining") != "True":
            pass
        assert int(talk.ask("pid")) == talk.pid
    assert daemon.wait() == 0
    assert "cause=drained status=0 requests=1" in obituary(daemon, keeper)


@WAYS
def test_an_idle_one_leaves_at_once(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    keeper = keeper_of(daemon)
    assert daemon.stop(deadline=5) == 0
    assert "cause=drained status=0 requests=0" in obituary(daemon, keeper)


@WAYS
def test_end_of_file_and_stacks_are_for_who_holds_the_request(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way, "--set", "graceful_timeout=0.5", "--set", "eof_timeout=1h")
    with Talk(daemon) as talk:
        assert talk.ask("until_eof") == "waiting"
        daemon.signal(signal.SIGUSR1)
        daemon.log.wait_for(r"^Obey#0\| .* in obey")
        daemon.signal(signal.SIGTERM)
        assert talk.answers.readline() == b"eof after 0\n"
    assert daemon.wait() == 0


@WAYS
@pytest.mark.parametrize("whom", ["keeper", "fresh"])
def test_a_term_from_outside_is_a_drain_of_both(serve: Serve, way: Way, whom: str) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    keeper = keeper_of(daemon)
    with Talk(daemon) as talk:
        os.kill(keeper if whom == "keeper" else talk.pid, signal.SIGTERM)
        while talk.ask("draining") != "True":
            pass
    assert "cause=drained status=0 requests=1" in obituary(daemon, keeper)
    daemon.log.wait_for("^worker_ready ", 2)


@WAYS
def test_terms_at_any_moment_are_drains(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    for times in range(1, 11):
        keeper = keeper_of(daemon)
        daemon.ask(b"pid\n")
        os.kill(keeper, signal.SIGTERM)  # while the next one is forked, or boots
        assert "cause=drained status=0" in obituary(daemon, keeper)
        daemon.log.wait_for("^worker_ready ", times + 1)


LATE = """
import os, sys
from preforkd_workers.samples import Upper

def start(server, slot):
    print("starts", file=sys.stderr)
    if os.path.exists("gate"):
        with open("gate") as gate:
            gate.read()
"""


def test_a_term_for_who_is_only_just_made_is_a_drain(serve: Serve, tmp_path: Path) -> None:
    """A fresh process does not hear signals yet; it dies of this one."""
    (tmp_path / "late.py").write_text(LATE)
    daemon = serve("late.py:Upper", "--listen", TCP, *ONE, "--set", "on_worker_start=late:start")
    keeper = keeper_of(daemon)
    os.mkfifo(tmp_path / "gate")
    assert daemon.ask(b"one\n") == b"ONE\n"
    daemon.log.wait_for("starts", 2)
    os.kill(keeper, signal.SIGTERM)
    assert "cause=drained status=0 requests=1" in obituary(daemon, keeper)
    with open(tmp_path / "gate", "w"):  # for the next one
        assert daemon.stop() == 0


@WAYS
def test_a_killed_keeper_leaves_nobody(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    keeper = keeper_of(daemon)
    with Talk(daemon) as talk:
        assert fresh(keeper) == talk.pid
        os.kill(keeper, signal.SIGKILL)
        assert talk.answers.read() == b""
        has_gone(talk.pid)
    assert "cause=crash signal=SIGKILL requests=0 lost=1" in obituary(daemon, keeper)


@WAYS
@pytest.mark.parametrize(
    ("order", "how"),
    [("kill", "signal=SIGKILL"), ("segfault", "signal=SIGSEGV"), ("os_exit 7", "status=7"), ("os_exit 0", "status=0")],
)
def test_what_a_fresh_process_dies_of_its_keeper_dies_of(serve: Serve, way: Way, order: str, how: str) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    keeper = keeper_of(daemon)
    daemon.ask(b"pid\n")
    daemon.ask(f"{order}\n".encode())
    assert f"cause=crash {how} requests=1 lost=1" in obituary(daemon, keeper)
    assert bool(daemon.log.matches(r"^Obey#0\| .* in obey")) == (order == "segfault")
    assert daemon.ask(b"say again\n") == b"again\n"


@WAYS
def test_an_exit_of_status_0_is_the_end_of_a_request_and_another_one_of_the_keeper(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    keeper = keeper_of(daemon)
    for order in (b"exit 0\n", b"raise\n"):
        daemon.ask(order)
    assert daemon.ask(b"say again\n") == b"again\n"
    assert keeper_of(daemon) == keeper
    daemon.ask(b"exit 3\n")
    assert "cause=crash status=3 requests=4 age=" in obituary(daemon, keeper)


@WAYS
def test_a_request_that_takes_too_long_is_killed_with_its_stack_in_the_log(serve: Serve, way: Way) -> None:
    limits = "--set", "request_timeout=0.3", "--set", "request_timeout_grace=0.3"
    daemon = serve(*OBEY, *ONE, *way, *limits)
    keeper = keeper_of(daemon)
    with Talk(daemon) as talk:
        talk.ask("spin")
        assert talk.answers.read() == b""
    said = obituary(daemon, keeper)
    assert "cause=deadline signal=SIGABRT requests=0 lost=1" in said
    assert daemon.log.matches(r"^Obey#0\| .* in obey")
    assert daemon.ask(b"say again\n") == b"again\n"


@WAYS
def test_who_does_not_heed_an_abort_is_killed(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way)
    keeper = keeper_of(daemon)
    with Talk(daemon) as talk:
        os.kill(talk.pid, signal.SIGSTOP)
        daemon.signal(signal.SIGINT)
        assert "cause=operator signal=SIGKILL" in obituary(daemon, keeper)
        has_gone(talk.pid)


@WAYS
def test_orphans_read_end_of_file_and_leave_within_graceful_timeout(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way, "--set", "graceful_timeout=2", "--set", "eof_timeout=1.5")
    with Talk(daemon) as talk:
        assert talk.ask("until_eof") == "waiting"
        daemon.signal(signal.SIGKILL)
        assert talk.answers.readline() == b"eof after 0\n"
        assert talk.answers.read() == b""
    eventually(lambda: not daemon.alive(), "everybody has left")


@WAYS
def test_orphans_that_do_not_heed_it_are_ended_all_the_same(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, *way, "--set", "graceful_timeout=0.5", "--set", "eof_timeout=1h")
    with Talk(daemon) as talk:
        assert talk.ask("spin") == "spinning"
        daemon.signal(signal.SIGKILL)
        eventually(lambda: not daemon.alive(), "everybody has left")


def test_a_server_that_is_shut_down_by_its_handler_is_replaced(serve: Serve) -> None:
    daemon = serve(*OBEY, *ONE)
    keeper = keeper_of(daemon)
    assert daemon.ask(b"shutdown\n") == b"shut down\n"
    assert "cause=drained status=0 requests=1" in obituary(daemon, keeper)
    assert daemon.ask(b"say again\n") == b"again\n"


def test_hooks_are_for_each_fresh_process(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOKS", str(tmp_path / "hooks"))
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    named = "--set", "on_worker_start=on_worker_start", "--set", "on_worker_stop=Hooks.on_worker_stop"
    daemon = serve(f"{HERE / 'hooked.py'}:Server", "--listen", TCP, *ONE, *named)
    pids = [daemon.ask(b"pid\n").decode().strip() for _ in range(5)]
    daemon.stop()
    notes = [line.split()[:2] for line in (tmp_path / "hooks").read_text().splitlines()]
    for pid in pids:
        assert [hook for hook, whose in notes if whose == pid] == [
            "on_worker_start",
            "request",
            "on_worker_stop",
            "server_close",
        ]


def test_what_the_target_counts_never_goes_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    daemon = serve(f"{HERE / 'metered.py'}:Metered", "--listen", TCP, *ONE, "--metrics", "tcp://127.0.0.1:0")
    assert len({daemon.ask(b"size 1\nsize 2\n") for _ in range(5)}) == 5
    assert daemon.metrics()['app_lines_total{order="size"}'] == 10


def test_a_fresh_process_for_each_datagram(serve: Serve) -> None:
    daemon = serve(":PidDatagram", "--listen", "udp://127.0.0.1:0", *ONE)
    answers = set()
    with udp(daemon.address()) as client:
        for _ in range(10):
            client.send(b"who")
            answers.add(client.recv(100))
    assert len(answers) == 10


def test_a_child_of_the_handlers_own_takes_no_request_and_does_not_count(serve: Serve) -> None:
    daemon = serve(":ForkAndReturn", "--listen", TCP, *ONE, "--metrics", "tcp://127.0.0.1:0")
    keeper = keeper_of(daemon)
    for _ in range(5):
        daemon.ask(b"")
    assert keeper_of(daemon) == keeper
    eventually(lambda: daemon.metrics()['preforkd_requests_total{outcome="ok",service="ForkAndReturn"}'] == 5)


def test_memory_is_that_of_who_serves(serve: Serve) -> None:
    daemon = serve(f"{HERE / 'mortal.py'}:Mortal", "--listen", TCP, *ONE, "--set", "max_rss_hard=100M")
    keeper = keeper_of(daemon)
    daemon.ask(b"grow_and_spin 150\n")
    assert "cause=max_rss signal=SIGABRT" in obituary(daemon, keeper)
    assert daemon.log.matches(r"^Mortal#0\| .* in obey")


def test_who_comes_after_a_log_was_moved_away_writes_to_the_new_one(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(LOUD)
    log = tmp_path / "log"
    daemon = serve(f"{tmp_path / 'loud.py'}:Loud", "--listen", TCP, *ONE, "--set", f"log_file={log}")
    daemon.ask(b"")
    eventually(lambda: "loud" in log.read_text())
    log.rename(tmp_path / "old")
    daemon.signal(signal.SIGUSR1)
    eventually(log.exists, "the master has made another one")
    eventually(lambda: daemon.ask(b"") == b"" and "loud" in log.read_text())


LOUD = """
from socketserver import BaseRequestHandler

class Loud(BaseRequestHandler):
    def handle(self):
        print("loud")
"""


def test_cpu_time_of_fresh_processes_is_their_workers(serve: Serve) -> None:
    daemon = serve(*OBEY, *ONE, "--metrics", "tcp://127.0.0.1:0")
    name = 'preforkd_worker_cpu_seconds_total{service="Obey"}'
    before = daemon.metrics()[name]
    for _ in range(50):
        daemon.ask(b"pid\n")
    eventually(lambda: daemon.metrics()[name] > before)


def is_answered(daemon: Daemon) -> bool:
    try:
        return daemon.ask(b"say hello\n") == b"hello\n"
    except ConnectionResetError:  # turned away with words unread: who was there before has not left yet
        return False


@WAYS
def test_a_client_has_one_connection_at_a_time_whoever_serves_it(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, "--max-children", "3", "--set", "max_requests=1", "--set", "max_per_client=1", *way)
    with Talk(daemon):
        assert is_turned_away(daemon.connect())
    eventually(lambda: is_answered(daemon))


@WAYS
def test_with_all_busy_the_next_one_is_turned_away(serve: Serve, way: Way) -> None:
    daemon = serve(*OBEY, *ONE, "--set", "when_full=close", *way)
    with Talk(daemon):
        assert is_turned_away(daemon.connect())
    eventually(lambda: is_answered(daemon))


IN_SETTINGS = pytest.mark.parametrize("way", ["", 'access_log = "-"'], ids=["ahead", "afresh"])


@IN_SETTINGS
def test_whoever_comes_after_the_verdict_of_a_reload_meets_new_code(serve: Serve, tmp_path: Path, way: str) -> None:
    site = Site(tmp_path, serve).start(f'probation = "0s"\nmax_requests = 1\nmax_children = 4\n{way}')
    for number in range(10):
        assert site.versions(5)
        site.write(f"{number}")
        site.reload()
        assert site.ask() == f"{number}"


@IN_SETTINGS
def test_the_verdict_of_a_reload_waits_for_who_may_have_been_woken(serve: Serve, tmp_path: Path, way: str) -> None:
    site = Site(tmp_path, serve).start(f'probation = "0s"\nmax_requests = 1\nmax_children = 1\n{way}')
    keeper = keeper_of(site.daemon)
    waiting = fresh(keeper)
    os.kill(waiting, signal.SIGSTOP)
    try:
        line = site.reload()
    finally:
        os.kill(waiting, signal.SIGCONT)
    assert float(line.partition("seconds=")[2].split()[0]) > HEARING
    assert "cause=drained status=0 requests=0" in obituary(site.daemon, keeper)


def test_a_hook_that_fails_in_a_later_fresh_process_is_told_and_tried_again(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os\nfrom preforkd_workers.samples import Upper\n"
        "def start(server, slot):\n    assert not os.path.exists('broken'), 'it is broken'\n"
    )
    daemon = serve("app:Upper", "--listen", TCP, *ONE, "--set", "on_worker_start=start")
    assert daemon.ask(b"hello\n") == b"HELLO\n"
    (tmp_path / "broken").touch()
    with daemon.connect() as client, client.makefile("rb") as answers:
        client.sendall(b"hello\n")  # to one that has started already, perhaps; the next one does not
        client.shutdown(socket.SHUT_WR)
        daemon.log.wait_for(r"AssertionError: it is broken$")
        (tmp_path / "broken").unlink()
        assert answers.readline() == b"HELLO\n"
    assert daemon.ask(b"hello\n") == b"HELLO\n"


def test_with_a_jitter_some_workers_are_keepers_and_everybody_is_answered(serve: Serve) -> None:
    """Each draws for itself whether it is one. By chance all may be, or none; they draw again when they are rolled."""
    daemon = serve(*OBEY, "--max-children", "4", "--set", "max_requests=1", "--set", "max_requests_jitter=3")
    ordinary, keepers = of_four(daemon)
    while not (ordinary and keepers):
        assert daemon.ctl("roll").returncode == 0
        ordinary, keepers = of_four(daemon)
    while ordinary & {*daemon.workers()}:
        ask_four(daemon)
    for worker in ordinary:
        assert "cause=max_requests status=0 " in obituary(daemon, worker)
    assert keepers <= {*daemon.workers()}


def of_four(daemon: Daemon) -> tuple[set[int], set[int]]:
    """The workers that serve themselves, and the keepers, once those that were rolled have left."""
    eventually(lambda: len(daemon.workers()) == 4)
    workers = {*daemon.workers()}
    ordinary = ask_four(daemon) & workers
    return ordinary, workers - ordinary


def ask_four(daemon: Daemon) -> set[int]:
    """Of four processes, all at once. Those that have answered."""
    with ExitStack() as talks:
        return {talks.enter_context(Talk(daemon)).pid for _ in range(4)}
