"""Workers are replaced when they are worn: first the replacement, then the retirement, and nobody's request is lost."""

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.conftest import Serve
from tests.daemon import Conversation, Daemon, eventually
from tests.site import Site, Talk
from tests.test_deaths import MORTAL, TCP, Cgroup, obituary

PID = (":Pid", "--listen", TCP)
THREADS = "--set", "kind=thread", "--set", "threads=4"


def asked(daemon: Daemon, number: int, question: bytes = b"pid\n", clients: int = 4) -> list[int]:
    """The pids of those who answered so many requests, by a few clients at a time; each was answered."""
    with ThreadPoolExecutor(clients) as pool:
        return [int(answer) for answer in pool.map(lambda _: daemon.ask(question), range(number))]


def fewest_ready(daemon: Daemon) -> int:
    """How many workers were ready at the worst moment between "ready" and "stopping", by the order of the events."""
    ready: set[str] = set()
    fewest = 1 << 30
    is_up = False
    for line in daemon.log.lines:
        event, *fields = line.split()
        pid = next((field for field in fields if field.startswith("pid=")), "")
        match event:
            case "worker_ready":
                ready.add(pid)
            case "worker_exit":
                ready.discard(pid)  # one that was not needed any more may have left before
            case "ready":
                is_up = True
            case "stopping":
                is_up = False
        fewest = min(fewest, len(ready)) if is_up else fewest
    return fewest


@pytest.fixture
def site(tmp_path: Path, serve: Serve) -> Site:
    return Site(tmp_path, serve)


# max_requests.


@pytest.mark.parametrize("kind", [(), THREADS])
def test_under_load_no_request_is_lost_and_never_too_few_are_ready(serve: Serve, kind: tuple[str, ...]) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 3, "--set", "max_requests=10", *kind)
    recycled = "^worker_exit .*cause=max_requests status=0 requests=(\\d+) age="
    asked(daemon, 50)
    while len(daemon.log.matches(recycled)) < 10:
        asked(daemon, 50)
    daemon.stop()
    assert all(int(each[1]) >= 10 for each in daemon.log.matches(recycled))
    assert fewest_ready(daemon) == 3
    assert not daemon.log.matches("lost=|cause=(?!max_requests|drained)")


def test_it_serves_on_until_it_is_replaced_and_the_event_says_why(serve: Serve) -> None:
    daemon = serve(*PID, "--max-children", 1, "--metrics", "tcp://127.0.0.1:0", "--set", "max_requests=2")
    first = int(daemon.ask(b""))
    assert int(daemon.ask(b"")) == first
    assert " cause=max_requests requests=2" in daemon.log.wait_for(rf"^worker_worn .*pid={first} .*")[0]
    assert "cause=max_requests status=0 requests=2 age=" in obituary(daemon, first)
    assert daemon.metrics()['preforkd_worker_exits_total{reason="max_requests",service="Pid"}'] == 1
    events = [line.split()[0] for line in daemon.log.lines if re.match("worker_.* service=Pid", line)]
    assert events == ["worker_ready", "worker_worn", "worker_ready", "worker_exit"]


def test_the_limit_is_drawn_for_each_worker(serve: Serve) -> None:
    limits = "--set", "max_requests=2", "--set", "max_requests_jitter=1000000"
    daemon = serve(*PID, "--max-children", 4, *limits)
    assert len(set(asked(daemon, 200, b""))) <= 4
    assert not daemon.log.matches("^worker_worn ")


def test_what_a_fork_of_the_handlers_own_ends_does_not_count(serve: Serve) -> None:
    """Parent and child both return from the handler, and each lane has ended a request."""
    daemon = serve(":ForkAndReturn", "--listen", TCP, "--max-children", 1, "--set", "max_requests=3")
    for times in (1, 2, 3):
        for _ in range(3):
            daemon.ask(b"")
        assert " requests=3" in daemon.log.wait_for("^worker_worn .*", times)[0]
        daemon.log.wait_for("^worker_exit ", times)


# max_requests = 1.

ONE = "--set", "max_requests=1"


def fresh(keeper: int) -> int:
    """The process that takes the next request of this keeper, or has it."""
    (child,) = psutil.Process(keeper).children()
    return child.pid


@pytest.mark.parametrize("target", [":Pid", ":RecordingServer", ":OwnLoop"])
def test_a_fresh_process_for_each_request(serve: Serve, target: str, tmp_path: Path) -> None:
    if target == ":RecordingServer":
        arguments = [target, "--handler", f"{Path(__file__).parent / 'targets.py'}:Pid"]
    elif target == ":OwnLoop":
        (tmp_path / "own.py").write_text(OWN_LOOP)
        arguments = [f"{tmp_path / 'own.py'}:OwnLoop"]
    else:
        arguments = [target]
    daemon = serve(*arguments, "--listen", TCP, "--max-children", 3, *ONE, environment={"HOOKS": os.devnull})
    answers = asked(daemon, 60, b"")
    assert len(set(answers)) == 60
    keepers = daemon.workers()
    assert not {*answers} & {*keepers}
    daemon.stop()
    told = [int(each[1]) for each in daemon.log.matches("^worker_exit .*cause=drained status=0 requests=(\\d+) age=")]
    assert len(told) == len(keepers) == 3
    assert sum(told) == 60
    assert not daemon.log.matches("retry_in=|lost=|^stranger_reaped")


OWN_LOOP = """
import os
from socketserver import BaseRequestHandler, TCPServer

class Pid(BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"%d" % os.getpid())

class OwnLoop(TCPServer):
    def __init__(self, address):
        super().__init__(address, Pid)

    def serve_forever(self, poll_interval=0.5):
        while True:
            self.handle_request()
"""


def test_a_fresh_process_for_each_request_of_all_listeners_and_threads(serve: Serve) -> None:
    """Two listeners, each with a connection that waits already: one process takes one of them."""
    listen = "--listen", TCP, "--listen", "tcp://127.0.0.2:0"
    daemon = serve(":ThreadingObeyServer", "--handler", MORTAL, *listen, "--max-children", 1, *ONE)
    (keeper,) = daemon.workers()
    first = fresh(keeper)
    os.kill(first, signal.SIGSTOP)
    with ExitStack() as clients:
        talks = []
        for index in (0, 1, 0, 1):
            talk = clients.enter_context(Conversation(socket_to(daemon, index)))
            talk.socket.sendall(b"pid\n")
            talk.socket.shutdown(1)
            talks.append(talk)
        os.kill(first, signal.SIGCONT)
        pids = {int(talk.answers.read()) for talk in talks}
    assert len(pids) == 4


def socket_to(daemon: Daemon, index: int) -> socket.socket:
    return socket.create_connection(daemon.address(index=index), 20)


def test_a_refused_request_uses_a_process_up_as_well(serve: Serve) -> None:
    daemon = serve(
        ":RecordingServer",
        "--handler",
        MORTAL,
        "--listen",
        TCP,
        "--max-children",
        1,
        *ONE,
        environment={"HOOKS": os.devnull},
    )
    (keeper,) = daemon.workers()
    first = fresh(keeper)
    assert daemon.ask(b"!") == b""
    eventually(lambda: not psutil.pid_exists(first), "it has left")
    assert int(daemon.ask(b"pid\n")) != first


def test_a_worker_for_one_request_that_dies_of_it_has_crashed(serve: Serve) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1, *ONE)
    (worker,) = daemon.workers()
    daemon.ask(b"die 9\n")
    assert "cause=crash signal=SIGKILL requests=0 lost=1" in obituary(daemon, worker)


def test_a_pool_of_short_lived_workers_is_reloaded_under_load(site: Site) -> None:
    site.start('probation = "0s"\nmax_requests = 1\nmax_children = 24')
    is_over = threading.Event()
    answers: list[str] = []

    def ask() -> None:
        while not is_over.is_set():
            answers.append(site.ask())

    clients = [threading.Thread(target=ask) for _ in range(24)]
    for client in clients:
        client.start()
    try:
        site.write("two")
        site.reload()
    finally:
        is_over.set()
        for client in clients:
            client.join()
    assert site.versions() == {"two"}
    assert set(answers) <= {"one", "two"}
    assert not site.daemon.log.matches("lost=")


def test_workers_for_one_request_are_on_probation_together(site: Site) -> None:
    """Whatever those of the old code, which take their slots in turn, do meanwhile."""
    site.start('probation = "60s"\nmax_requests = 1\nmax_children = 2')
    site.write("two", "Handler.handle = lambda self: self.rfile.readline().error")
    site.hup()
    site.daemon.log.wait_for("^worker_ready .*gen=2")
    while not site.daemon.log.matches("^reload_rolled_back "):
        site.ask()
        assert len(site.daemon.log.matches("^worker_exit ")) < 500
    assert re.search(r"on probation (\d+) of \1 requests have raised", site.ended("rolled_back"))


# max_lifetime.


def test_a_worker_that_has_lived_long_enough_is_replaced(serve: Serve) -> None:
    daemon = serve(*PID, "--max-children", 2, "--set", "max_lifetime=300ms", "--set", "max_lifetime_jitter=200ms")
    first = daemon.workers()
    for pid in first:
        assert "cause=max_lifetime status=0 requests=0 age=0." in obituary(daemon, pid)
    daemon.stop()
    assert fewest_ready(daemon) == 2


def test_who_holds_a_request_finishes_it_before_it_leaves(serve: Serve) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1, "--set", "max_lifetime=300ms")
    with Talk(daemon) as talk:
        daemon.log.wait_for(rf"^worker_worn .*pid={talk.pid} cause=max_lifetime")
        daemon.log.wait_for("^worker_ready .*slot=1")
        assert int(talk.ask("pid")) == talk.pid
    assert "cause=max_lifetime status=0 requests=1 age=" in obituary(daemon, talk.pid)


# max_rss, max_pss.


def resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


@pytest.mark.parametrize(("limit", "what"), [("max_rss", "rss"), ("max_pss", "pss")])
def test_a_worker_that_has_grown_too_much_is_replaced(serve: Serve, limit: str, what: str) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1, "--set", f"{limit}=100M")
    with Talk(daemon) as talk:
        assert talk.ask("grow 150") == "grown"
        line = daemon.log.wait_for(rf"^worker_worn .*pid={talk.pid} cause=max_rss requests=0 {what}=(\d+)", deadline=40)
        assert int(line[1]) > 150 << 20
        daemon.log.wait_for("^worker_ready ", 2)
    assert "cause=max_rss status=0 requests=1" in obituary(daemon, talk.pid)


@pytest.mark.parametrize("limits", [[], ["--set", "max_rss=100M"]])
def test_a_worker_that_has_grown_far_too_much_is_killed_with_its_stack_in_the_log(
    serve: Serve, limits: list[str]
) -> None:
    daemon = serve(
        MORTAL,
        "--listen",
        TCP,
        "--max-children",
        1,
        "--metrics",
        "tcp://127.0.0.1:0",
        *limits,
        "--set",
        "max_rss_hard=120M",
    )
    with Talk(daemon) as talk:
        talk.socket.sendall(b"grow_and_spin 200\n")
        said = obituary(daemon, talk.pid)
    assert "cause=max_rss signal=SIGABRT requests=0 lost=1 peer=127.0.0.1:" in said
    assert daemon.log.matches(r"^Mortal#0\|   File .* in obey")
    assert "retry_in" not in said
    assert daemon.metrics()['preforkd_worker_exits_total{reason="max_rss",service="Mortal"}'] == 1


def test_workers_that_are_too_heavy_from_the_start_are_replaced_more_and_more_slowly(serve: Serve) -> None:
    daemon = serve(*PID, "--max-children", 1, "--set", "max_rss=1M")
    assert "cause=max_rss" in daemon.log.wait_for("^worker_exit .*retry_in=", deadline=40).string


# Where there is no room for two.


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    found = Cgroup()
    yield found
    found.remove()


def test_without_memory_for_two_it_is_retired_first_and_replaced_after(cgroup: Cgroup, serve: Serve) -> None:
    limits = "--set", "max_rss=100M"
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 2, *limits, prefix=cgroup.command)
    with Talk(daemon) as talk:
        cgroup.limit(cgroup.used + (250 << 20))
        assert talk.ask("grow 150") == "grown"
        worn = daemon.log.wait_for(rf"^worker_worn .*pid={talk.pid} cause=max_rss .*headroom=(\d+)")
        assert 0 < int(worn[1]) < 150 << 20
    obituary(daemon, talk.pid)
    daemon.log.wait_for("^worker_ready ", 3)
    events = [line.split()[0] for line in daemon.log.lines if line.startswith("worker_")]
    assert events == ["worker_ready", "worker_ready", "worker_worn", "worker_exit", "worker_ready"]


def test_with_memory_for_two_it_is_replaced_first(cgroup: Cgroup, serve: Serve) -> None:
    limits = "--set", "max_rss=100M"
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1, *limits, prefix=cgroup.command)
    with Talk(daemon) as talk:
        cgroup.limit(cgroup.used + (1 << 30))
        assert talk.ask("grow 150") == "grown"
        daemon.log.wait_for("^worker_ready ", 2)
    assert "headroom" not in daemon.log.wait_for(f"^worker_worn .*pid={talk.pid} .*").string
    obituary(daemon, talk.pid)


# Beside reloads and upgrades.


def test_wear_and_a_reload_at_a_time_leave_a_full_pool_of_the_new_generation(site: Site) -> None:
    site.start('probation = "0s"\nmax_children = 3\nmax_requests = 2')
    with Talk(site.daemon), Talk(site.daemon):
        for _ in range(5):
            site.ask()
        site.write("two")
        site.reload()
        assert site.versions(4) == {"two"}
    site.daemon.stop()
    assert fewest_ready(site.daemon) >= 3
    assert not site.daemon.log.matches("lost=")


def test_a_successor_knows_how_worn_the_workers_are(site: Site) -> None:
    site.start('probation = "60s"\nmax_children = 1\nmax_requests = 3', daemon='metrics = "tcp://127.0.0.1:0"')
    daemon = site.daemon
    old = int(site.ask("pid"))
    site.ask("pid")
    with Talk(daemon) as talk:
        assert talk.pid == old
        daemon.signal(signal.SIGUSR2)
        daemon.log.wait_for("^upgraded ")
    assert "cause=max_requests requests=3" in daemon.log.wait_for(rf"^worker_worn .*pid={old} .*").string
    assert "cause=max_requests status=0 requests=3" in obituary(daemon, old)
