"""What a request may take, and for how long a client may say nothing, in every kind of worker."""

import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from preforkd.watch import Glance, glance
from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon, eventually

TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")
LIMITED = f"{Path(__file__).parent / 'limited.py'}:"
ROOT = Path(__file__).parents[1]
KINDS = ("process", "thread", "gevent")
MANY = ("thread", "gevent")


def settings(**values: object) -> Sequence[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def of_kind(kind: str, workers: int = 1, lanes: int = 4, **values: object) -> Sequence[str]:
    """As many workers of this kind; of a kind that has one lane, so many that there are as many lanes."""
    workers = workers * lanes if kind == "process" else workers
    more = {} if kind == "process" else {"threads" if kind == "thread" else "greenlets": lanes}
    return settings(kind=kind, max_children=workers, **more, **values)


@pytest.fixture(autouse=True)
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have limited.py import its neighbours."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))


class Client(Conversation):
    """A client of ``Limited``, which has told it the pid of its worker."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.pid = int(self.answers.readline())

    def ask(self, line: str) -> bytes:
        self.socket.sendall(line.encode() + b"\n")
        return self.answers.readline()

    @property
    def peer(self) -> str:
        host, port = self.socket.getsockname()
        return f"{host}:{port}"

    def rest(self) -> bytes:
        try:
            return self.answers.read()
        except ConnectionResetError:
            return b""


def client_of(daemon: Daemon) -> Client:
    return Client(daemon.connect())


def overdue(daemon: Daemon, client: Client) -> list[str]:
    return [match.string for match in daemon.log.matches(rf"^request_overdue .* peer={re.escape(client.peer)} ")]


# The deadline of a request.


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_past_its_time_is_told_of_once_with_peer_listener_age_mark_and_stack(serve: Serve, kind: str) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *of_kind(kind, request_timeout=0.3, request_timeout_grace=60))
    with client_of(daemon) as client, client_of(daemon) as other:
        assert client.ask("mark parsing the header") == b"marked\n"
        assert client.ask("hang" if kind == "process" else "until_eof") in (b"hanging\n", b"waiting\n")
        line = daemon.log.wait_for(rf"^request_overdue .* peer={client.peer} .*")[0]
        assert f" pid={client.pid} lane=" in line
        assert (age := re.search(rf" listener={re.escape(daemon.url())} age=(\d\.\d)s ", line))
        assert float(age[1]) >= 0.3
        assert 'mark="parsing the header"' in line
        daemon.log.wait_for(r'^Limited#\d\| .*File ".*targets.py", line \d+ in (handle|obey)')
        if kind == "thread":
            thread = re.search(r"lane=(\d) thread=(0x\w{16}) ", line)
            assert thread is not None
            daemon.log.wait_for(rf"^Limited#0\| (Current t|T)hread {thread[2]}\b")
        assert other.ask("extend 0.7") == b"extended\n"
        assert other.ask("say x") == b"x\n"
        daemon.log.wait_for(rf"^request_overdue .* peer={other.peer} ")
        assert len(overdue(daemon, client)) == len(overdue(daemon, other)) == 1
        other.socket.shutdown(socket.SHUT_WR)
        assert other.rest() == b""
        daemon.stop(signal.SIGINT)


def test_at_the_hard_deadline_a_worker_with_one_lane_is_killed_and_replaced(serve: Serve) -> None:
    limits = settings(request_timeout=0.3, request_timeout_grace=0.2, max_children=2)
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *limits)
    with client_of(daemon) as client, client_of(daemon) as other:
        assert other.ask("extend 60") == b"extended\n"
        assert client.ask("hang") == b"hanging\n"
        assert client.rest() == b""
        assert " cause=deadline signal=SIGABRT requests=0 lost=1 " in exit_of(daemon, client.pid)
        assert daemon.log.matches(rf"^kill .* pid={client.pid} cause=deadline signal=SIGABRT")
        eventually(lambda: len(daemon.workers("Limited")) == 2)
        assert other.ask("say still here") == b"still here\n"
    assert daemon.metrics()['preforkd_worker_exits_total{reason="deadline",service="Limited"}'] == 1


@pytest.mark.parametrize("kind", MANY)
def test_at_the_hard_deadline_a_worker_with_many_lanes_leaves_without_the_one_that_hangs(
    serve: Serve, kind: str
) -> None:
    limits = of_kind(kind, request_timeout=0.5, request_timeout_grace=0.2)
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *limits)
    with client_of(daemon) as client, client_of(daemon) as other:
        assert client.pid == other.pid
        assert other.ask("extend 60") == b"extended\n"
        assert client.ask("hang") == b"hanging\n"
        daemon.log.wait_for(rf"^request_given_up .* pid={client.pid} .* peer={client.peer} ")
        daemon.log.wait_for("^worker_ready service=Limited ", 2)
        with client_of(daemon) as late:
            assert late.pid != client.pid
        assert other.ask("draining") == b"True\n"
        other.socket.shutdown(socket.SHUT_WR)
        assert other.rest() == b""
        assert client.rest() == b""
        assert " cause=deadline status=0 requests=1 lost=1 " in exit_of(daemon, client.pid)
    assert not daemon.log.matches("^(kill|end_of_file) ")
    eventually(lambda: daemon.metrics()['preforkd_requests_total{outcome="killed",service="Limited"}'] == 1)


@pytest.mark.parametrize("kind", MANY)
def test_a_worker_that_drains_does_not_wait_for_a_lane_past_its_hard_deadline(serve: Serve, kind: str) -> None:
    limits = of_kind(kind, request_timeout=0.5, request_timeout_grace=0.2, graceful_timeout=60)
    daemon = serve(f"{LIMITED}Limited", *TCP, *limits)
    with client_of(daemon) as client:
        assert client.ask("hang") == b"hanging\n"
        assert daemon.stop() == 0
        assert " cause=deadline status=0 requests=0 lost=1 " in exit_of(daemon, client.pid)


@pytest.mark.parametrize("kind", KINDS)
def test_who_asks_for_more_time_has_it(serve: Serve, kind: str) -> None:
    limits = of_kind(kind, request_timeout=0.4, request_timeout_grace=0.1)
    daemon = serve(f"{LIMITED}Limited", *TCP, *limits)
    with client_of(daemon) as patient, client_of(daemon) as client:
        assert patient.ask("extend 60") == b"extended\n"
        client.ask("hang")
        daemon.log.wait_for(rf"^(kill|request_given_up) .* pid={client.pid} ")
        assert patient.ask("say still here") == b"still here\n"
        assert overdue(daemon, client)
        assert not overdue(daemon, patient)


def test_a_mark_is_of_one_request(serve: Serve) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *settings(max_children=1, request_timeout=0.3))
    with client_of(daemon) as first:
        assert first.ask("mark first") == b"marked\n"
    with client_of(daemon) as second:
        line = daemon.log.wait_for(rf"^request_overdue .* peer={second.peer} .*")[0]
        assert "mark=" not in line


def test_an_upgrade_costs_a_request_no_time_and_gives_it_none(serve: Serve) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *settings(request_timeout=5, request_timeout_grace=0.1))
    with client_of(daemon) as client:
        assert client.ask("sleep 3") == b"slept\n"
        daemon.signal(signal.SIGUSR2)
        client.ask("hang")
        daemon.log.wait_for("^upgraded ")
        line = daemon.log.wait_for("^request_overdue .*")[0]
        age = re.search(r" age=([\d.]+)s", line)
        assert age is not None
        assert 5 <= float(age[1]) < 3 + 5
        assert client.rest() == b""
        assert " cause=deadline " in exit_of(daemon, client.pid)


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_server_with_threads_of_its_own_has_a_deadline_for_each(serve: Serve, kind: str) -> None:
    daemon = serve(f"{LIMITED}Threading", *TCP, *settings(kind=kind, max_children=1, request_timeout=0.4))
    with client_of(daemon) as patient, client_of(daemon) as client:
        assert patient.ask("extend 60") == b"extended\n"
        daemon.log.wait_for("^request_overdue ")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
        assert patient.ask("say still here") == b"still here\n"
        assert len(daemon.log.matches("^request_overdue ")) == 1


def test_a_datagram_has_a_deadline(serve: Serve) -> None:
    limits = settings(request_timeout=0.2, request_timeout_grace=0.1, max_children=1)
    daemon = serve(f"{LIMITED}Hang", "--listen", "udp://127.0.0.1:0", *limits)
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.connect(daemon.address())
        client.send(b"hello")
        host, port = client.getsockname()
        daemon.log.wait_for(rf"^request_overdue .* peer={host}:{port} ")
        daemon.log.wait_for("^worker_exit .* cause=deadline ")


def test_what_a_class_calls_so_itself_is_left_alone(serve: Serve) -> None:
    daemon = serve(f"{LIMITED}OwnMark", *TCP, *settings(max_children=1, request_timeout=0.3))
    with client_of(daemon) as client:
        assert client.ask("mark x") == b"marked\n"
        assert "mark=" not in daemon.log.wait_for("^request_overdue .*")[0]


def test_without_a_limit_there_is_nothing_to_ask_for_and_asking_does_no_harm(serve: Serve) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP)
    with client_of(daemon) as client:
        assert client.ask("extend 1") == b"extended\n"
        assert client.ask("mark x") == b"marked\n"


def exit_of(daemon: Daemon, pid: int) -> str:
    return daemon.log.wait_for(rf"^worker_exit .*\bpid={pid} .*")[0]


# A client that says nothing.


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A certificate of its own, with its key."""
    path = tmp_path / "pem"
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {path} -out {path}.crt"
    subprocess.run(words.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def connect(daemon: Daemon) -> Client:
    """By whatever it listens on."""
    url = daemon.url()
    if url.startswith("unix:"):
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(DEADLINE)
        plain.connect(url.removeprefix("unix:"))
    else:
        plain = daemon.connect()
    if "Secret" not in daemon.log.text:
        return Client(plain)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return Client(context.wrap_socket(plain, suppress_ragged_eofs=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["tcp", "unix", "tls"])
def test_a_silent_client_is_taken_for_one_that_has_left_and_one_that_sends_now_and_then_is_not(
    serve: Serve, kind: str, how: str, tmp_path: Path, pem: Path
) -> None:
    listen = f"unix:{tmp_path}/s" if how == "unix" else "tcp://127.0.0.1:0"
    target = f"{LIMITED}{'Secret' if how == 'tls' else 'Limited'}"
    limits = of_kind(kind, lanes=2, idle_timeout=2)
    daemon = serve(target, "--listen", listen, *METRICS, *limits, environment={"PEM": str(pem)})
    with connect(daemon) as lively, connect(daemon) as silent:
        assert silent.ask("until_eof") == b"waiting\n"
        silent.socket.settimeout(0.05)
        for _ in range(400):  # as long as it takes, twenty bytes a second
            assert lively.ask("say still here") == b"still here\n"
            try:
                assert silent.answers.readline() == b"eof after 0\n"
                break
            except TimeoutError:
                silent.answers = silent.socket.makefile("rb")
        else:
            pytest.fail("nobody has ended it")
        silent.socket.settimeout(DEADLINE)
        assert lively.ask("say and here") == b"and here\n"
        service = target.rpartition(":")[2]
        assert daemon.metrics()[f'preforkd_idle_timeouts_total{{service="{service}"}}'] == 1
    assert not daemon.log.matches("^(kill|end_of_file) ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_is_not_looked_after_yet_is_not_silent_and_what_it_has_sent_is_read(
    serve: Serve, kind: str
) -> None:
    """It has sent before, and the handler has not come to read it: then it reads that, and end-of-file behind it."""
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *of_kind(kind, lanes=1, idle_timeout=0.3))
    with client_of(daemon) as client:
        client.socket.sendall(b"sleep 1\nsay one\nsay two\n")
        assert client.rest() == b"slept\none\ntwo\n"
        assert daemon.metrics()['preforkd_idle_timeouts_total{service="Limited"}'] == 1


def test_a_client_that_falls_silent_is_noticed_within_a_quarter_of_the_time(serve: Serve) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *settings(idle_timeout=3))
    with client_of(daemon) as client:
        client.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.socket.recv(1)
        client.socket.settimeout(DEADLINE)
        client.socket.sendall(b"until_eof\n")
        began = time.monotonic()
        assert client.rest() == b"waiting\neof after 0\n"
        assert 2.9 < time.monotonic() - began < 5.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_may_go_on_behind_its_client_and_is_left_in_peace(serve: Serve, kind: str) -> None:
    """It is looked at again meanwhile, and not counted again."""
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *of_kind(kind, idle_timeout=0.3))
    with client_of(daemon) as client:
        client.socket.sendall(b"linger 1\n")
        assert client.rest() == b"lingering\nlingered\n"
    assert daemon.metrics()['preforkd_idle_timeouts_total{service="Limited"}'] == 1


@pytest.mark.parametrize("key", ["idle_timeout", "max_per_client"])
def test_what_is_for_connections_is_a_fault_where_there_are_none(serve: Serve, key: str) -> None:
    words = ("--listen", "udp://127.0.0.1:0", "--set", f"{key}=1")
    daemon = serve(f"{LIMITED}Hang", *words, ready=False)
    assert daemon.wait() == 78
    assert f"--set {key}: is for connections, and the service has none" in daemon.log.text


# The rules, as values.


@pytest.mark.parametrize(
    ("deadlines", "told", "seen"),
    [
        ([0, 0], (), Glance()),
        ([0, 150], (), Glance(again=150)),
        ([95, 150], (), Glance(overdue=(0,), again=105)),
        ([95, 150], (0,), Glance(again=105)),
        ([150, 80], (1,), Glance(hanging=(1,), again=150)),
        ([100, 90, 89], (), Glance(overdue=(0, 1, 2), hanging=(1, 2), again=110)),
    ],
)
def test_a_glance_at_the_deadlines(deadlines: list[int], told: tuple[int, ...], seen: Glance) -> None:
    assert glance(100, deadlines, 10, told) == seen
