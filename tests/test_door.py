"""Who is turned away at the door: one client's connections beyond its share, and those for whom there is no lane."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from preforkd_workers import scoreboard
from preforkd_workers.door import Neighbours, before, client_of
from preforkd_workers.scoreboard import CAPACITY, CLIENT, DRAINING, OK, SINCE, STATE, Rows, Scoreboard
from preforkd_workers.spec import Limits
from preforkd_workers.tally import Tally
from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually
from tests.test_limits import KINDS, LIMITED, METRICS, TCP, Client, of_kind
from tests.test_limits import client_of as connected
from tests.test_limits import settings as words


@pytest.fixture(autouse=True)
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have limited.py import its neighbours."""
    roots = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, roots)))


def caller(daemon: Daemon, host: str = "127.0.0.1") -> socket.socket:
    """Somebody who connects from this address."""
    return socket.create_connection(daemon.address(), DEADLINE, (host, 0))


def is_turned_away(connection: socket.socket) -> bool:
    """Whether it is closed without a word."""
    with connection:
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True


def refused(daemon: Daemon, reason: str, service: str = "Limited") -> float:
    return daemon.metrics()[f'preforkd_turned_away_total{{reason="{reason}",service="{service}"}}']


def busy(daemon: Daemon, service: str = "Limited") -> float:
    return daemon.metrics()[f'preforkd_lanes{{service="{service}",state="busy"}}']


# One client's share.


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_has_so_many_connections_across_all_workers_and_others_have_theirs(serve: Serve, kind: str) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *of_kind(kind, workers=2, max_per_client=2))
    with Client(caller(daemon)) as first, Client(caller(daemon)) as second:
        assert is_turned_away(caller(daemon))
        assert is_turned_away(caller(daemon))
        with Client(caller(daemon, "127.0.0.2")) as other:
            assert other.ask("say hello") == b"hello\n"
        assert first.ask("say one") == b"one\n"
        second.socket.shutdown(socket.SHUT_WR)
        assert second.rest() == b""
        eventually(lambda: busy(daemon) == 1, "the lane is free again")
        with Client(caller(daemon)) as third:
            assert third.ask("say two") == b"two\n"
    assert refused(daemon, "max_per_client") == 2
    assert refused(daemon, "full") == 0
    daemon.log.wait_for("^turned_away service=Limited reason=max_per_client connections=[12]")
    assert daemon.metrics()['preforkd_requests_total{outcome="error",service="Limited"}'] == 0


def test_a_network_may_be_wider_than_an_address(serve: Serve) -> None:
    limits = words(max_per_client=1, max_per_client_ipv4_prefix=30)
    daemon = serve(f"{LIMITED}Limited", *TCP, *limits)
    with Client(caller(daemon, "127.0.0.1")):
        assert is_turned_away(caller(daemon, "127.0.0.2"))
        with Client(caller(daemon, "127.0.0.4")) as other:
            assert other.ask("say hello") == b"hello\n"


CALL = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(20)
    client.connect(sys.argv[1].replace("@", chr(0)))
    sys.stdout.write("served" if client.recv(1) else "turned away")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be somebody else")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_unix_socket_a_client_is_a_user(serve: Serve, kind: str) -> None:
    def call(uid: int) -> str:
        command = [sys.executable, "-I", "-c", CALL, name, str(uid)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout

    name = f"@preforkd-test-{os.getpid()}"
    daemon = serve(f"{LIMITED}Limited", "--listen", f"unix:{name}", *of_kind(kind, max_per_client=1))
    with socket.socket(socket.AF_UNIX) as mine:
        mine.settimeout(DEADLINE)
        mine.connect(name.replace("@", "\0"))
        with Client(mine) as client:
            assert call(0) == "turned away"
            assert call(61234) == "served"
            assert client.ask("say still here") == b"still here\n"
    assert daemon.stop() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_of_who_is_turned_away_no_hook_hears_and_who_does_not_get_past_the_hooks_holds_nothing(
    serve: Serve, kind: str, tmp_path: Path
) -> None:
    daemon = serve(f"{LIMITED}Picky", *TCP, *METRICS, *of_kind(kind, max_per_client=1))
    for question in (b"?", b".!"):  # fails in get_request, and in verify_request
        for _ in range(3):
            with caller(daemon) as client:
                client.sendall(question)
                assert client.recv(1) == b""
            eventually(lambda: busy(daemon, "Picky") == 0)
    with caller(daemon) as held:
        held.sendall(b"..say hello\n")
        with held.makefile("rb") as answers:
            assert answers.readline() == b"hello\n"
            silent = caller(daemon)  # get_request would wait for its first byte, and the lane with it
            assert is_turned_away(silent)
            assert held.send(b"say again\n") == 10
            assert answers.readline() == b"again\n"
    assert refused(daemon, "max_per_client", "Picky") == 1
    assert daemon.metrics()['preforkd_requests_total{outcome="refused",service="Picky"}'] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_crowd_a_client_never_has_more_than_its_share_and_others_are_served_meanwhile(
    serve: Serve, kind: str
) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *of_kind(kind, workers=4, lanes=4, max_per_client=3))
    held: list[Client] = []
    for _ in range(3):
        crowd = [caller(daemon) for _ in range(24)]
        with Client(caller(daemon, "127.0.0.2")) as other:
            assert other.ask("say hello") == b"hello\n"
        held += served(crowd)
        assert 1 <= len(held) <= 3
    while len(held) < 3:  # what some may have lacked by coming at the same time, they have when they come again
        held += served([caller(daemon)])
    assert is_turned_away(caller(daemon))
    eventually(lambda: busy(daemon) == 3, "only they hold lanes")
    for client in held:
        assert client.ask("say still here") == b"still here\n"
        client.close()


def served(crowd: list[socket.socket]) -> Iterator[Client]:
    """Those of them who are not turned away."""
    for connection in crowd:
        try:
            yield Client(connection)
        except (ValueError, ConnectionResetError):
            connection.close()


def test_whoever_is_killed_takes_no_share_with_him(serve: Serve) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *words(max_per_client=1))
    for _ in range(3):
        with Client(caller(daemon)) as client:
            client.socket.sendall(b"kill\n")
            assert client.rest() == b""
            daemon.log.wait_for(rf"^worker_exit .* pid={client.pid} ")


@pytest.mark.parametrize("target", ["ForkingObeyServer", "ThreadingObeyServer"])
def test_what_a_server_hands_to_others_cannot_be_counted_and_that_is_said(serve: Serve, target: str) -> None:
    handler = str(Path(__file__).parent / "targets.py:Obey")
    daemon = serve(f":{target}", "--handler", handler, *TCP, *words(max_per_client=1), ready=False)
    assert daemon.wait() == 70
    assert "max_per_client and when_full count lanes; use kind = thread" in daemon.log.text


# No lane is free.


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_lane_busy_a_connection_waits(serve: Serve, kind: str) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *of_kind(kind, lanes=2))
    with connected(daemon) as first, connected(daemon) as second, caller(daemon) as third:
        assert second.ask("say two") == b"two\n"
        eventually(lambda: daemon.metrics()[backlog(daemon)] == 1)
        first.socket.shutdown(socket.SHUT_WR)
        assert Client(third).ask("say three") == b"three\n"
    assert refused(daemon, "full") == 0


def backlog(daemon: Daemon) -> str:
    return f'preforkd_listen_backlog{{listener="{daemon.url()}",service="Limited"}}'


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_lane_busy_a_connection_is_closed_at_once_if_that_is_wanted(serve: Serve, kind: str) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *METRICS, *of_kind(kind, lanes=2, when_full="close"))
    with connected(daemon) as first, connected(daemon) as second:
        for _ in range(3):
            assert is_turned_away(caller(daemon))
        assert second.ask("say two") == b"two\n"
        first.socket.shutdown(socket.SHUT_WR)
        assert first.rest() == b""
        eventually(lambda: busy(daemon) == 1, "a lane is free")
        with connected(daemon) as third:
            assert third.ask("say three") == b"three\n"
            assert is_turned_away(caller(daemon))
    assert refused(daemon, "full") == 4
    daemon.log.wait_for("^turned_away service=Limited reason=full connections=[1-4]")
    size = 2 if kind == "process" else 1
    assert daemon.metrics()['preforkd_workers_max{service="Limited"}'] == size


@pytest.mark.parametrize("kind", KINDS)
def test_while_old_workers_drain_new_ones_are_not_full(serve: Serve, kind: str) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *of_kind(kind, lanes=2, when_full="close", probation=0))
    with connected(daemon) as first, connected(daemon) as second:
        assert daemon.ctl("reload").returncode == 0
        with connected(daemon) as third, connected(daemon) as fourth:
            assert is_turned_away(caller(daemon))
            for client in (first, second, third, fourth):
                assert client.ask("say still here") == b"still here\n"


def test_full_is_what_the_operator_says(serve: Serve) -> None:
    daemon = serve(f"{LIMITED}Limited", *TCP, *words(max_children=1, when_full="close"))
    with connected(daemon):
        assert is_turned_away(caller(daemon))
        assert daemon.ctl("scale", "Limited", 2).returncode == 0
        with connected(daemon) as second:
            assert second.ask("say two") == b"two\n"
            assert is_turned_away(caller(daemon))


@pytest.mark.parametrize("url", ["udp://127.0.0.1:0", "unix-dgram:s"])
def test_a_datagram_is_not_turned_away(serve: Serve, url: str) -> None:
    daemon = serve(f"{LIMITED}Hang", "--listen", url, *words(when_full="close"), ready=False)
    assert daemon.wait() == 78
    assert "--set when_full: close is for connections" in daemon.log.text


# The rules, as values.


@pytest.mark.parametrize(
    ("one", "other", "limits", "is_same"),
    [
        ("192.0.2.1", "192.0.2.1", Limits(), True),
        ("192.0.2.1", "192.0.2.2", Limits(), False),
        ("192.0.2.1", "::ffff:192.0.2.1", Limits(), True),
        ("192.0.2.1", "192.0.2.200", Limits(ipv4_prefix=24), True),
        ("192.0.2.1", "203.0.113.1", Limits(ipv4_prefix=0), True),
        ("2001:db8::1", "2001:db8::ffff:2", Limits(), True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", Limits(), False),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", Limits(ipv6_prefix=48), True),
        ("2001:db8::1", "2001:db8::2", Limits(ipv6_prefix=128), False),
        ("fe80::1%lo", "fe80::2%lo", Limits(), True),
        ("::1", "0.0.0.1", Limits(), False),
    ],
)
def test_who_is_the_same_client(one: str, other: str, limits: Limits, is_same: bool) -> None:
    def word(host: str) -> int:
        return client_of(-1, socket.AF_INET6 if ":" in host else socket.AF_INET, (host, 1), limits)

    assert 0 < word(one) < 1 << 64
    assert (word(one) == word(other)) is is_same


def test_what_was_noted_at_the_door_stays_since_others_go_by_it() -> None:
    (row,) = Rows.blank()
    tally = Tally(row, timeout=1.0)
    row[SINCE] = 5
    tally.begin("request", ("192.0.2.1", 1), 0)
    assert (row[SINCE], row[scoreboard.DEADLINE]) == (5, 5 + 10**9)
    tally.end(OK)
    assert (row[SINCE], row[scoreboard.DEADLINE]) == (0, 0)


def test_neighbours_that_come_later_are_seen_and_those_that_drain_are_not_in_the_way() -> None:
    board = Scoreboard.create("x")
    service = board.add("s")
    service.use(0)
    neighbours = Neighbours(Scoreboard.attach(board.fd), "s")
    assert neighbours.capacity == 0
    service.words[CAPACITY] = 7
    assert neighbours.capacity == 7
    service.rows(0)[0][SINCE] = 3
    assert sum(before(9, block.sinces_of_servers()) for block in neighbours.blocks()) == 1
    service.use(100)
    service.use(2, lanes=3)
    service.rows(100)[0][SINCE], service.rows(100)[0][CLIENT] = 4, 44
    for row in service.rows(2, lanes=3):
        row[SINCE], row[CLIENT] = 5, 44
    assert sum(before(9, block.sinces_of_servers()) for block in neighbours.blocks()) == 5
    service.rows(2, lanes=3)[0][STATE] = DRAINING
    assert sum(before(9, block.sinces_of_servers()) for block in neighbours.blocks()) == 2
    assert sum(before(9, block.sinces_of(44)) for block in neighbours.blocks()) == 4
    assert sum(before(4, block.sinces_of(44)) for block in neighbours.blocks()) == 1
    os.close(board.fd)


class Row:
    """A lane at the door, one step of it after the other, as ``Door`` takes them."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.since = 0
        self.holds = False

    def steps(self) -> Iterator[None]:
        for _ in range(2):
            now = self.world.now()
            yield
            self.since = now
            yield
        seen = []
        for row in self.world.rows:
            seen.append(row.since)
            yield
        if before(now, seen) > self.world.limit:
            self.since = 0
        else:
            self.holds = True
            self.world.check()


class World:
    """Lanes, and a clock that no two look at in the same instant."""

    def __init__(self, lanes: int, limit: int) -> None:
        self.time = 0
        self.limit = limit
        self.rows = [Row(self) for _ in range(lanes)]

    def now(self) -> int:
        self.time += 1
        return self.time

    @property
    def held(self) -> int:
        return sum(row.holds for row in self.rows)

    def check(self) -> None:
        assert self.held <= self.limit


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    strategies.integers(2, 6),
    strategies.integers(1, 4),
    strategies.lists(strategies.integers(0, 5), max_size=150),
)
def test_however_they_interleave_never_too_many_come_in_and_afterwards_never_too_few(
    lanes: int, limit: int, order: list[int]
) -> None:
    world = World(lanes, limit)
    running: dict[int, Iterator[None]] = {}
    for number in order:
        number %= lanes
        row = world.rows[number]
        if row.holds:
            row.holds, row.since = False, 0
        elif next(running.setdefault(number, row.steps()), "done") == "done":
            del running[number]
    for number in running:  # die at any step, and be settled by the master
        world.rows[number].since = 0
    for row in world.rows:
        if not row.holds:
            [*row.steps()]
    assert world.held == min(lanes, limit)
