"""The contract that every kind of worker keeps, and what each is for."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon, eventually
from tests.site import Site, Talk
from tests.test_stop import METRICS, TCP, Client, exit_of, timeouts


@dataclass(frozen=True)
class Kind:
    """A kind as it is asked for, with so many lanes in each of two workers."""

    name: str
    lanes: int

    @property
    def words(self) -> list[str]:
        several = {"thread": "--threads", "gevent": "--greenlets"}.get(self.name)
        return ["--kind", self.name, "--max-children", "2", *([several, str(self.lanes)] if several else [])]


KINDS = Kind("process", 1), Kind("thread", 3), Kind("gevent", 5)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def clients() -> Iterator[Callable[[Daemon, int], list[Client]]]:
    """So many conversations that are open at once."""
    with ExitStack() as stack:
        yield lambda daemon, number: [stack.enter_context(Client(daemon)) for _ in range(number)]


Clients = Callable[[Daemon, int], list[Client]]


def requests(daemon: Daemon, outcome: str, service: str = "Obey") -> float:
    return daemon.metrics()[f'preforkd_requests_total{{outcome="{outcome}",service="{service}"}}']


def busy(daemon: Daemon, service: str = "Obey") -> float:
    return daemon.metrics()[f'preforkd_lanes{{service="{service}",state="busy"}}']


# It serves.


@pytest.mark.parametrize("family", ["tcp", "unix", "udp", "unix-dgram"])
def test_it_answers_on_every_family(serve: Serve, tmp_path: Path, kind: Kind, family: str) -> None:
    path = tmp_path / "s"
    url = f"{family}:{path}" if family.startswith("unix") else f"{family}://127.0.0.1:0"
    is_stream = family in ("tcp", "unix")
    daemon = serve(":Upper" if is_stream else ":UpperDatagram", "--listen", url, *kind.words)
    inet = family in ("tcp", "udp")
    for number in range(20):
        with socket.socket(
            socket.AF_INET if inet else socket.AF_UNIX, socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM
        ) as client:
            client.settimeout(DEADLINE)
            if not (inet or is_stream):
                client.bind(str(tmp_path / f"client{number}"))
            client.connect(daemon.address() if inet else str(path))
            client.sendall(b"hello\n")
            assert client.recv(100) == b"HELLO\n"
    assert daemon.stop() == 0


def test_as_many_are_served_at_once_as_there_are_lanes_and_the_next_one_waits(
    serve: Serve, kind: Kind, clients: Clients
) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *kind.words)
    held = clients(daemon, 2 * kind.lanes)
    assert len({client.pid for client in held}) == 2
    assert busy(daemon) == 2 * kind.lanes
    with daemon.connect() as late, late.makefile("rb") as answers:
        late.sendall(b"pid\n")
        late.setblocking(False)
        assert [client.ask(b"say still") for client in held] == [b"still\n"] * len(held)
        with pytest.raises(BlockingIOError):
            late.recv(1)
        late.settimeout(DEADLINE)
        held[0].close()
        assert int(answers.readline()) == held[0].pid
    for client in held[1:]:
        client.close()
    eventually(lambda: (busy(daemon), requests(daemon, "ok")) == (0, len(held) + 1))


def test_a_worker_does_not_grow_beyond_its_lanes(serve: Serve, kind: Kind) -> None:
    daemon = serve(":Obey", *TCP, *kind.words)
    for _ in range(5 * kind.lanes):
        assert daemon.ask(b"say hello\n") == b"hello\n"
    threads = [len(os.listdir(f"/proc/{pid}/task")) for pid in daemon.workers()]
    assert max(threads) <= (kind.lanes + 1 if kind.name == "thread" else 1)


def test_outcomes_are_counted(serve: Serve, kind: Kind, tmp_path: Path) -> None:
    environment = {"HOOKS": str(tmp_path / "hooks")}
    daemon = serve(":recording", *TCP, *METRICS, *kind.words, environment=environment)
    for question, answer in ((b"say a\n", b"a\n"), (b"raise\n", b""), (b"!", b""), (b"say b\n", b"b\n")):
        assert daemon.ask(question) == answer
    eventually(lambda: [requests(daemon, each, "recording") for each in ("ok", "error", "refused")] == [2, 1, 1])
    noted = (tmp_path / "hooks").read_text().split()
    assert [noted.count(each) for each in ("verify_request", "process_request", "finish_request")] == [4, 3, 3]
    assert [noted.count(each) for each in ("shutdown_request", "close_request", "handle_error")] == [4, 4, 1]


def test_an_error_is_written_and_nobody_else_hears_of_it(serve: Serve, kind: Kind) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *kind.words)
    with Client(daemon) as other:
        assert daemon.ask(b"raise\n") == b""
        daemon.log.wait_for("ValueError: as told")
        assert other.ask(b"say fine") == b"fine\n"
    eventually(lambda: requests(daemon, "error") == 1)


def test_a_server_with_threads_of_its_own_keeps_to_the_lanes(serve: Serve, kind: Kind, clients: Clients) -> None:
    if kind.name == "process":
        pytest.skip("there its threads are its own")
    words = ["--handler", f"{Path(__file__).parent / 'targets.py'}:Obey"]
    daemon = serve(":ThreadingObeyServer", *TCP, *METRICS, *kind.words, *words)
    held = clients(daemon, 2 * kind.lanes)
    assert busy(daemon, "ThreadingObeyServer") == len(held)
    threads = [len(os.listdir(f"/proc/{pid}/task")) for pid in daemon.workers()]
    assert max(threads) <= (kind.lanes + 1 if kind.name == "thread" else 1)
    for client in held:
        client.close()
    eventually(lambda: requests(daemon, "ok", "ThreadingObeyServer") == len(held))


@pytest.mark.parametrize("order", ["exit 3", "exit 0"])
def test_a_handler_that_exits_ends_its_request_and_no_lane_is_lost(
    serve: Serve, kind: Kind, clients: Clients, order: str
) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *kind.words)
    for _ in range(2 * kind.lanes):
        assert daemon.ask(f"{order}\n".encode()) == b""
    eventually(lambda: requests(daemon, "error") == 2 * kind.lanes)
    eventually(lambda: len(daemon.workers("Obey")) == 2)
    held = clients(daemon, 2 * kind.lanes)
    assert [client.ask(b"say here") for client in held] == [b"here\n"] * len(held)


# It stops.


def test_what_is_held_is_finished_and_nothing_new_is_taken(serve: Serve, kind: Kind, clients: Clients) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *kind.words)
    held = clients(daemon, 2 * kind.lanes)
    daemon.signal(signal.SIGTERM)
    for client in held:
        eventually(lambda client=client: client.ask(b"draining") == b"True\n")  # type: ignore[misc]
    for client in held:
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    assert daemon.wait() == 0
    for pid in {client.pid for client in held}:
        assert f"cause=drained status=0 requests={kind.lanes} " in exit_of(daemon, pid)
    assert not daemon.log.matches("^(end_of_file|kill) ")


def test_idle_workers_leave_at_once(serve: Serve, kind: Kind) -> None:
    daemon = serve(":Obey", *TCP, *kind.words)
    assert daemon.stop() == 0
    assert len(daemon.log.matches(r"^worker_exit .*cause=drained status=0")) == 2


def test_who_waits_for_a_silent_client_reads_end_of_file(serve: Serve, kind: Kind, clients: Clients) -> None:
    daemon = serve(":Obey", *TCP, *kind.words, *timeouts(0.2, DEADLINE))
    held = clients(daemon, 2 * kind.lanes)
    assert [client.ask(b"until_eof") for client in held] == [b"waiting\n"] * len(held)
    daemon.signal(signal.SIGTERM)
    assert [client.rest() for client in held] == [b"eof after 0\n"] * len(held)
    assert daemon.wait() == 0
    assert all("cause=eof status=0 " in exit_of(daemon, client.pid) for client in held)


def test_who_hears_nothing_is_killed_with_its_stack(serve: Serve, kind: Kind) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *kind.words, *timeouts(0.2, 0.2))
    with Client(daemon) as client:
        assert client.ask(b"spin") == b"spinning\n"
        daemon.signal(signal.SIGTERM)
        assert client.rest() == b""
        assert daemon.wait() == 0
    assert " cause=deadline signal=SIGABRT " in exit_of(daemon, client.pid)
    assert " lost=1 " in exit_of(daemon, client.pid)
    daemon.log.wait_for(r"^Obey#\d\|   File .*targets.py.* in obey$")


def test_what_dies_with_a_worker_is_counted_and_the_worker_replaced(serve: Serve, kind: Kind, clients: Clients) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *kind.words)
    held = clients(daemon, 2 * kind.lanes)
    os.kill(held[0].pid, signal.SIGKILL)
    dead = [client for client in held if client.pid == held[0].pid]
    assert [client.rest() for client in dead] == [b""] * len(dead)
    assert "signal=SIGKILL" in exit_of(daemon, held[0].pid)
    assert f" lost={len(dead)} " in exit_of(daemon, held[0].pid)
    eventually(lambda: len(daemon.workers("Obey")) == 2)
    assert requests(daemon, "killed") == len(dead)
    assert busy(daemon) == len(held) - len(dead)


def test_every_lane_shows_what_it_is_at(serve: Serve, kind: Kind, clients: Clients) -> None:
    daemon = serve(":Obey", *TCP, *kind.words)
    held = clients(daemon, 2 * kind.lanes)
    assert [client.ask(b"until_eof") for client in held] == [b"waiting\n"] * len(held)
    daemon.signal(signal.SIGUSR1)
    daemon.log.wait_for(r"^Obey#\d\|   File .*targets.py.* in obey$", times=len(held))


def test_who_is_stuck_in_c_and_hears_no_signal_shows_its_stack(serve: Serve, kind: Kind) -> None:
    daemon = serve(":Deaf", *TCP, *kind.words, *timeouts(0.2, 0.2))
    with daemon.connect() as client, client.makefile("rb") as answers:
        assert answers.readline() == b"stuck\n"
        daemon.signal(signal.SIGUSR1)
        daemon.log.wait_for(r"^Deaf#\d\|   File .*targets.py.* in handle$")
    assert not daemon.log.matches("^worker_exit ")


@pytest.mark.parametrize(
    ("words", "target"),
    [*((kind.words, [":Obey"]) for kind in KINDS), ([], [":ThreadingObeyServer", "--handler", ":Obey"])],
)
def test_to_ask_for_stacks_harms_nobody_however_busy(serve: Serve, words: list[str], target: list[str]) -> None:
    daemon = serve(*target, *TCP, *words)
    workers = daemon.workers()

    def talk(_: int) -> set[bytes]:
        answers = set()
        for _ in range(100):
            for worker in workers:
                os.kill(worker, signal.SIGUSR1)
            answers.add(daemon.ask(b"say hi\n"))
        return answers

    with ThreadPoolExecutor(4) as talkers:
        assert set().union(*talkers.map(talk, range(4))) == {b"hi\n"}
    assert daemon.workers() == workers


def test_to_ask_for_stacks_while_they_are_told_harms_nobody(serve: Serve) -> None:
    """Those of greenlets are told by Python, which the next signal interrupts."""
    daemon = serve(":Besieged", *TCP, "--kind", "gevent")
    assert daemon.ask(b"") == b"asked once more\n"


def test_hooks_come_once_for_each_worker(serve: Serve, kind: Kind, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    hooked = Path(__file__).parent / "hooked.py"
    names = {
        "on_worker_start": "on_worker_start",
        "on_drain": "Hooks.on_drain",
        "on_worker_stop": "Hooks.on_worker_stop",
    }
    around = {
        "HOOKS": str(notes),
        "PYTHONPATH": os.pathsep.join([str(hooked.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    hooks = [word for hook, name in names.items() for word in ("--set", f"{hook}={name}")]
    daemon = serve(f"{hooked}:Server", *TCP, *kind.words, *hooks, environment=around)
    with Client(daemon) as client:
        daemon.signal(signal.SIGTERM)
        eventually(lambda: client.ask(b"draining") == b"True\n")
        eventually(lambda: notes.read_text().count("on_drain") == 2)
    assert daemon.wait() == 0
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert [line[0] for line in lines if int(line[1]) == client.pid] == [
        "on_worker_start", "on_drain", "request", "on_worker_stop", "server_close",
    ]  # fmt: skip
    assert {line[2] for line in lines if line[0] != "request"} == {"main"}
    for hook in names:
        assert len([line for line in lines if line[0] == hook]) == 2


@pytest.mark.parametrize("kind", KINDS[:2], indirect=True, ids=lambda kind: kind.name)
def test_a_signal_that_another_thread_takes_is_answered_at_once(serve: Serve, kind: Kind) -> None:
    """Python runs its handlers in the main thread, which sleeps in a wait that the signal has not interrupted."""
    daemon = serve(":Thief", *TCP, *kind.words)
    pid = int(daemon.ask(b""))
    assert " cause=drained status=0 " in exit_of(daemon, pid)


@pytest.mark.parametrize(
    "words",
    [(":LateThief",), (":LateThief", "--kind", "thread"), (":ThreadingObeyServer", "--handler", ":LateThief")],
    ids=["a handler", "lanes", "threads of its own"],
)
def test_a_signal_that_a_thread_takes_while_the_main_thread_waits_is_answered_at_once(
    serve: Serve, words: list[str]
) -> None:
    daemon = serve(*words, *TCP, *timeouts(2 * DEADLINE, 0))  # nobody but the thief says END_OF_FILE
    with Conversation(daemon.connect()) as client:
        assert client.answers.readline() == b"waiting\n"
        daemon.signal(signal.SIGTERM)
        assert client.answers.readline() == b"0 bytes\n"
    assert daemon.wait() == 0


# It is reloaded.


def test_a_reload_changes_the_kind_and_cuts_nobody(serve: Serve, tmp_path: Path, kind: Kind) -> None:
    site = Site(tmp_path, serve)
    site.start()
    with Talk(site.daemon) as old:
        before = old.ask("version")
        lanes = {"thread": "threads = 3", "gevent": "greenlets = 5"}.get(kind.name, "")
        site.settings(f'probation = "0s"\nkind = "{kind.name}"\n{lanes}')
        site.write("two")
        site.reload()
        with Talk(site.daemon) as new:
            assert (before, new.ask("version"), old.ask("version")) == ("one", "two", "one")
        site.settings('probation = "0s"')
        site.write("three")
        site.reload()
        assert version(site) == "three"
        assert old.ask("version") == "one"


MANY = {"process": "max_children = 8", "thread": "threads = 32", "gevent": "greenlets = 32"}


def test_whoever_comes_after_the_verdict_meets_new_code(serve: Serve, tmp_path: Path, kind: Kind) -> None:
    """However many lanes wait when they are told to leave, of which any may be woken once more."""
    site = Site(tmp_path, serve)
    site.start(f'probation = "0s"\nkind = "{kind.name}"\n{MANY[kind.name]}')
    for number in range(10):
        with ExitStack() as held:
            assert len([held.enter_context(Talk(site.daemon)).ask("version") for _ in range(8)]) == 8
        site.write(f"{number}")
        site.reload()
        assert version(site) == f"{number}"


def version(site: Site) -> str:
    with Talk(site.daemon) as new:
        return new.ask("version")


def test_a_kind_that_nobody_knows_is_refused(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, "--kind", "threads", ready=False)
    assert daemon.wait() == 78
    assert daemon.log.lines == ["preforkd: --kind: one of gevent, process, thread, not 'threads'"]
