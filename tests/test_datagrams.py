"""Datagrams: cut, dropped, answered from the address that was asked, sent to groups, and never forgotten in a queue."""

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually, unprivileged
from tests.namespace import namespace
from tests.site import free_port, udp
from tests.test_listeners import needs_ipv6, refusal

METRICS = ("--metrics", "tcp://127.0.0.1:0")
QUICK = ("--probation", "0")

APP = """
import os
import time
from socketserver import (
    BaseRequestHandler, DatagramRequestHandler, ThreadingUDPServer, UDPServer, UnixDatagramServer
)

VERSION = "VERSION-OF-THE-APP"


class Held(BaseRequestHandler):
    '''Answers with its version and the question; ``hold`` is held until somebody opens the gate.'''

    def handle(self):
        data, own_socket = self.request
        if data == b"hold":
            own_socket.sendto(b"held", self.client_address)
            while not os.path.exists("open"):
                time.sleep(0.01)  # a greenlet lets others run, which it would not at a pipe
        if data == b"again":
            time.sleep(0.02)  # longer than its client takes to ask again
        own_socket.sendto(VERSION.encode() + b" " + data, self.client_address)


class Upper(DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.read().upper())


class Short(UDPServer):
    max_packet_size = 4


class General(UDPServer):
    '''Has a hook of its own, and so the general turn.'''

    def verify_request(self, request, client_address):
        return request[0] != b"refuse"


class Looping(UDPServer):
    '''Has a loop of its own.'''

    def serve_forever(self, poll_interval=0.5):
        while True:
            self.handle_request()


class Threading(ThreadingUDPServer):
    pass


def told(server):
    os.write(2, b"told to drain\\n")
"""


class Site:
    """The application in a directory, and the daemon that serves it."""

    def __init__(self, directory: Path, serve: Serve) -> None:
        self.directory = directory
        self.serve = serve
        self.write("one")

    def write(self, version: str) -> None:
        (self.directory / "app.py").write_text(APP.replace("VERSION-OF-THE-APP", version) + "\n" * len(version))

    def settings(self, text: str, name: str = "app") -> None:
        (self.directory / "preforkd.toml").write_text(f'[services.{name}]\non_drain = "told"\nprobation = 0\n{text}\n')

    def start(self, *arguments: str) -> Daemon:
        return self.serve("-c", "preforkd.toml", *arguments)

    def open_gate(self) -> None:
        """Let go of all who are held."""
        (self.directory / "open").touch()


@pytest.fixture
def site(tmp_path: Path, serve: Serve) -> Site:
    return Site(tmp_path, serve)


def ask(client: socket.socket, question: bytes) -> bytes:
    client.send(question)
    return client.recv(9999)


def answers(client: socket.socket, number: int) -> list[str]:
    return [client.recv(999).decode() for _ in range(number)]


# Cut.


@pytest.mark.parametrize(
    ("target", "longest", "more"),
    [
        ("Upper", "4", ""),
        ("Short", "0", "handler = 'app.py:Upper'"),
        ("General", "4", "handler = 'app.py:Upper'"),
        ("Threading", "4", "handler = 'app.py:Upper'"),
        ("Upper", "4", "kind = 'thread'\nthreads = 2"),
        ("Upper", "4", "kind = 'gevent'"),
        ("General", "4", "handler = 'app.py:Upper'\nkind = 'gevent'"),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_datagram_that_is_too_long_is_cut_and_counted(
    site: Site, target: str, longest: str, more: str, host: str
) -> None:
    site.settings(f'target = "app.py:{target}"\nlisten = ["udp://{host}:0"]\nmax_packet_size = {longest}\n{more}')
    daemon = site.start(*METRICS)
    with udp(("127.0.0.1", daemon.address("app")[1])) as client:
        assert [ask(client, word) for word in (b"abc", b"abcd", b"abcde", b"abcdefgh")] == [
            b"ABC",
            b"ABCD",
            b"ABCD",
            b"ABCD",
        ]
    assert daemon.metrics()['preforkd_datagrams_truncated_total{service="app"}'] == 2


def test_a_unix_datagram_that_is_too_long_is_cut_and_counted(site: Site, tmp_path: Path) -> None:
    site.settings(f'target = "app.py:Upper"\nlisten = ["unix-dgram:{tmp_path}/x"]\nmax_packet_size = 4')
    daemon = site.start(*METRICS)
    with unix(tmp_path) as client:
        assert [ask(client, word) for word in (b"abcd", b"abcde")] == [b"ABCD", b"ABCD"]
    assert daemon.metrics()['preforkd_datagrams_truncated_total{service="app"}'] == 1


def unix(directory: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.settimeout(DEADLINE)
    client.bind(f"{directory}/client")
    client.connect(f"{directory}/x")
    return client


# Waiting, and dropped.


def limit(daemon: Daemon) -> float:
    url = daemon.url("app")
    return daemon.metrics()[f'preforkd_listen_backlog_limit{{listener="{url}",service="app"}}']


def test_a_receive_buffer_is_what_was_asked_for_and_a_reload_changes_it(site: Site) -> None:
    text = f'target = "app.py:Upper"\nlisten = ["udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"]\n'
    site.settings(f'{text}receive_buffer = "32K"')
    daemon = site.start(*METRICS)
    said = rf"^receive_buffer url={daemon.url('app')} "
    assert "advice" not in daemon.log.wait_for(rf"{said}asked=32768 granted=32768").string
    eventually(lambda: limit(daemon) == 65536, "the kernel counts twice of it")
    site.settings(f'{text}receive_buffer = "64K"')
    assert daemon.ctl("reload").returncode == 0
    daemon.log.wait_for(rf"{said}asked=65536 granted=65536")
    eventually(lambda: limit(daemon) == 131072)
    site.settings(text)
    assert daemon.ctl("reload").returncode == 0
    system = int(Path("/proc/sys/net/core/rmem_default").read_text())
    eventually(lambda: limit(daemon) == system, "as the system has it")
    assert len(daemon.log.matches("^receive_buffer ")) == 2


def test_less_than_was_asked_for_is_said_with_what_to_do(serve: Serve) -> None:
    most = int(Path("/proc/sys/net/core/rmem_max").read_text())
    words = ("socketserver:UDPServer", "--handler", "socketserver:BaseRequestHandler", "--listen", "udp://127.0.0.1:0")
    daemon = serve(*words, environment={"PREFORKD_RECEIVE_BUFFER": str(2 * most)}, prefix=unprivileged())
    line = daemon.log.wait_for("^receive_buffer ").string
    assert f"asked={2 * most} granted={most} " in line
    assert "net.core.rmem_max" in line


def test_what_the_kernel_drops_is_counted(site: Site) -> None:
    site.settings('target = "app.py:Held"\nlisten = ["udp://127.0.0.1:0"]\nmax_children = 1\nreceive_buffer = "8K"')
    daemon = site.start(*METRICS)
    drops = f'preforkd_listen_drops_total{{listener="{daemon.url("app")}",service="app"}}'
    with udp(daemon.address("app")) as client:
        assert ask(client, b"hold") == b"held"
        assert daemon.metrics()[drops] == 0
        for number in range(100):
            client.send(b"%d" % number)
        eventually(lambda: daemon.metrics()[drops] > 0, "drops are counted")
        dropped = int(daemon.metrics()[drops])
        site.open_gate()
        assert len(answers(client, 101 - dropped)) == 101 - dropped
        client.send(b"last")
        assert client.recv(99) == b"one last"  # and none came in between
        assert daemon.metrics()[drops] == dropped


# From the address that was asked.


KINDS = {
    "fast": 'target = "app.py:Upper"',
    "general": 'target = "app.py:General"\nhandler = "app.py:Upper"',
    "loop": 'target = "app.py:Looping"\nhandler = "app.py:Upper"',
    "threading": 'target = "app.py:Threading"\nhandler = "app.py:Upper"',
    "thread": 'target = "app.py:Upper"\nkind = "thread"\nthreads = 3',
    "gevent": 'target = "app.py:Upper"\nkind = "gevent"',
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("[::]", marks=needs_ipv6)])
def test_an_answer_comes_from_the_address_that_was_asked(site: Site, kind: str, host: str) -> None:
    """A connected socket takes answers from nobody else (udp(7))."""
    site.settings(f'{KINDS[kind]}\nlisten = ["udp://{host}:0"]\nmax_children = 2')
    daemon = site.start()
    port = daemon.address("app")[1]
    with ExitStack() as stack:
        clients = [stack.enter_context(udp((f"127.0.0.{last}", port))) for last in (1, 2, 3, 2)]
        for turn in range(5):
            for client in clients:
                client.send(b"turn %d" % turn)
            assert {client.recv(99) for client in clients} == {b"TURN %d" % turn}


@needs_ipv6
def test_an_answer_comes_from_the_address_of_ipv6_that_was_asked(site: Site, network: None) -> None:
    site.settings('target = "app.py:Upper"\nlisten = ["udp://[::]:0"]\nmax_children = 2')
    port = site.start().address("app")[1]
    link_local = next(line.split()[0] for line in if_inet6() if line.startswith("fe80") and line.endswith(" one"))
    address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(link_local))
    for place in (("fd00:1::1", port), ("fd00:2::1", port), (address, port, 0, socket.if_nametoindex("one"))):
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
            client.settimeout(DEADLINE)
            client.bind(("fd00:2::1" if len(place) == 2 else "::", 0))
            client.connect(place)
            assert ask(client, b"here") == b"HERE"


def if_inet6() -> list[str]:
    return Path("/proc/net/if_inet6").read_text().splitlines()


def test_an_answer_is_sent_all_the_same_when_the_address_that_was_asked_has_gone(site: Site, network: None) -> None:
    site.settings('target = "app.py:Held"\nlisten = ["udp://0.0.0.0:0"]\nmax_children = 1')
    daemon = site.start()
    os.system("ip addr add 10.0.1.99/24 dev one")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE)
        client.bind(("10.0.2.1", 0))
        client.sendto(b"hold", ("10.0.1.99", daemon.address("app")[1]))
        assert client.recvfrom(99) == (b"held", ("10.0.1.99", daemon.address("app")[1]))
        os.system("ip addr del 10.0.1.99/24 dev one")
        site.open_gate()
        assert client.recv(99) == b"one hold"


# Groups.


@pytest.fixture
def network() -> Iterator[None]:
    with namespace():
        yield


def to_group(interface: str, group: str = "239.1.2.3") -> socket.socket:
    """A client whose datagrams leave by this interface, for members on this machine as well."""
    is_ipv6 = ":" in group
    client = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(DEADLINE)
    index = socket.if_nametoindex(interface)
    if is_ipv6:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
    else:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + struct.pack("=i", index))
    return client


def member(interface: str, group: str) -> socket.socket:
    """Somebody else on this machine who is a member of the group, by this interface."""
    is_ipv6 = ":" in group
    found = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    index = socket.if_nametoindex(interface)
    if is_ipv6:
        request = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", index)
        found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    else:
        request = socket.inet_aton(group) + struct.pack("=4si", bytes(4), index)
        found.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    return found


def test_a_group_over_loopback(site: Site) -> None:
    site.settings('target = "app.py:Upper"\nlisten = ["udp://239.1.2.3:0?interface=lo"]')
    daemon = site.start()
    assert daemon.address("app")[0] == "239.1.2.3"
    with to_group("lo") as client:
        client.sendto(b"a", daemon.address("app"))
        answer, (host, port) = client.recvfrom(99)
    assert (answer, port) == (b"A", daemon.address("app")[1])
    assert host != "239.1.2.3"


@pytest.mark.parametrize("interface", ["two", "10.0.2.1"])
def test_a_group_is_joined_on_its_interface_and_answers_from_the_address_there(
    site: Site, network: None, interface: str
) -> None:
    site.settings(f'target = "app.py:Upper"\nlisten = ["udp://239.1.2.3:0?interface={interface}"]')
    place = site.start().address("app")
    with member("one", "239.1.2.3"), to_group("one") as stranger, to_group("two") as client:
        stranger.sendto(b"not for you", place)
        client.sendto(b"a", place)
        assert client.recvfrom(99) == (b"A", ("10.0.2.1", place[1]))
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(99)


@pytest.mark.parametrize(
    ("group", "interface"), [("ff02::1234", "two"), ("ff15::1234", "two"), ("ff15::7", "fd00:2::1")]
)
def test_a_group_of_ipv6(site: Site, network: None, group: str, interface: str) -> None:
    site.settings(f'target = "app.py:Upper"\nlisten = ["udp://[{group}]:0?interface={interface}"]')
    port = site.start().address("app")[1]
    with member("one", group), to_group("one", group) as stranger, to_group("two", group) as client:
        stranger.sendto(b"not for you", (group, port, 0, socket.if_nametoindex("one")))
        client.sendto(b"a", (group, port, 0, socket.if_nametoindex("two")))
        answer, (host, *_) = client.recvfrom(99)
        assert (answer, host == group) == (b"A", False)
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(99)


def test_two_daemons_have_a_group_together(site: Site, serve: Serve, network: None) -> None:
    port = free_port(socket.SOCK_DGRAM)
    site.settings(f'target = "app.py:Upper"\nlisten = ["udp://239.1.2.3:{port}?interface=one"]')
    site.start()
    site.serve("-c", "preforkd.toml", environment={"PREFORKD_NAME": "other"})
    with to_group("one") as client:
        client.sendto(b"a", ("239.1.2.3", port))
        assert [client.recv(9), client.recv(9)] == [b"A", b"A"]


def test_a_reload_changes_the_interface_of_a_group_in_place(site: Site, network: None) -> None:
    text = f'target = "app.py:Upper"\nlisten = ["udp://239.1.2.3:{free_port(socket.SOCK_DGRAM)}?interface=%s"]'
    site.settings(text % "one")
    daemon = site.start()
    place = daemon.address("app")
    with to_group("one") as one, to_group("two") as two:
        one.sendto(b"a", place)
        assert one.recv(9) == b"A"
        site.settings(text % "two")
        assert daemon.ctl("reload").returncode == 0
        two.sendto(b"b", place)
        assert two.recvfrom(9) == (b"B", ("10.0.2.1", place[1]))
        one.sendto(b"c", place)
        two.sendto(b"d", place)
        assert two.recv(9) == b"D"
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.recv(9)
        assert len(daemon.log.matches("^listening service=app")) == 1
        site.settings(text % "three")
        refused = daemon.ctl("reload")
        assert refused.returncode == 1
        assert "there is no interface 'three'" in refused.stderr


@pytest.mark.parametrize("group", ["ff02::1234", "ff15::1234"])
def test_the_interface_of_a_group_of_ipv6_cannot_change(site: Site, network: None, group: str) -> None:
    text = f'target = "app.py:Upper"\nlisten = ["udp://[{group}]:{free_port(socket.SOCK_DGRAM)}?interface=%s"]'
    site.settings(text % "one")
    daemon = site.start()
    site.settings(text % "two")
    refused = daemon.ctl("reload")
    assert refused.returncode == 1
    assert "the interface of an open listener of IPv6 cannot change; needs a restart" in refused.stderr


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("239.1.2.3:0?interface=three", "there is no interface 'three'"),
        ("[ff02::1]:0?interface=three", "there is no interface 'three'"),
        ("239.1.2.3:0?interface=9.9.9.9", "no interface has the address 9.9.9.9"),
        ("239.1.2.3:0", "no route leads to the group; name its interface, such as ?interface=eth0"),
    ],
)
def test_a_group_that_cannot_be_joined_is_named_with_what_to_do(
    serve: Serve, network: None, place: str, words: str
) -> None:
    said = refusal(serve(":UpperDatagram", "--listen", f"udp://{place}", ready=False))
    assert said == f"services.UpperDatagram.listen: udp://{place}: {words}"


# Never forgotten in a queue.


def hold(client: socket.socket, workers: int) -> None:
    """Have every worker hold a request, so that what follows stays in the queue."""
    for _ in range(workers):
        assert ask(client, b"hold") == b"held"


def test_a_reload_answers_what_was_queued_while_all_were_busy_exactly_once(site: Site) -> None:
    site.settings('target = "app.py:Held"\nlisten = ["udp://127.0.0.1:0"]\nmax_children = 2')
    daemon = site.start()
    with udp(daemon.address("app")) as client:
        hold(client, 2)
        for number in range(100):
            client.send(b"%d" % number)
        site.write("three")
        reload = daemon.ctl("reload", "--no-wait")
        assert reload.returncode == 0
        daemon.log.wait_for("^told to drain", 2)
        site.open_gate()
        found = Counter(answer.split()[1] for answer in answers(client, 102))
        assert found == Counter(["hold", "hold", *map(str, range(100))])
        daemon.log.wait_for("^reload_done ")
        assert ask(client, b"more") == b"three more"


SERVED = {
    "fast": 'target = "app.py:Held"',
    "general": 'target = "app.py:General"\nhandler = "app.py:Held"',
    "loop": 'target = "app.py:Looping"\nhandler = "app.py:Held"',
    "thread": 'target = "app.py:Held"\nkind = "thread"\nthreads = 2',
    "gevent": 'target = "app.py:Held"\nkind = "gevent"\ngreenlets = 2',
}


@pytest.mark.parametrize("served", SERVED)
def test_a_stop_answers_what_was_queued_by_then(site: Site, served: str) -> None:
    workers = 1 if served in ("thread", "gevent") else 2
    site.settings(f'{SERVED[served]}\nlisten = ["udp://127.0.0.1:0"]\nmax_children = {workers}')
    daemon = site.start()
    with udp(daemon.address("app")) as client:
        hold(client, 2)
        for number in range(100):
            client.send(b"%d" % number)
        os.kill(daemon.pid, 15)
        daemon.log.wait_for("^told to drain", workers)
        site.open_gate()
        assert Counter(answers(client, 102)) == Counter(["one hold"] * 2 + [f"one {number}" for number in range(100)])
    assert daemon.wait() == 0
    daemon.log.finish()
    assert not daemon.log.matches("^datagrams_left ")
    assert len(daemon.log.matches("^worker_exit service=app .*cause=drained")) == workers


def fill(client: socket.socket) -> int:
    """Send numbered datagrams until no more find room; returns how many did."""
    number = 0
    while True:
        try:
            client.send(b"%d" % number)
        except BlockingIOError:
            return number
        number += 1


def test_a_stop_answers_what_was_queued_at_a_unix_socket(site: Site, tmp_path: Path) -> None:
    site.settings(f'target = "app.py:Held"\nlisten = ["unix-dgram:{tmp_path}/x"]\nmax_children = 1')
    daemon = site.start()
    with unix(tmp_path) as client:
        hold(client, 1)
        client.setblocking(False)
        queued = fill(client)
        client.settimeout(DEADLINE)
        assert queued > 5
        os.kill(daemon.pid, 15)
        daemon.log.wait_for("^told to drain")
        site.open_gate()
        assert answers(client, queued + 1) == ["one hold", *(f"one {number}" for number in range(queued))]
    assert daemon.wait() == 0


@pytest.mark.parametrize("what", ["the listener", "the service"])
@pytest.mark.parametrize("scheme", ["udp", "unix-dgram"])
def test_what_was_queued_at_a_listener_that_goes_is_answered(
    site: Site, tmp_path: Path, what: str, scheme: str
) -> None:
    place = f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}" if scheme == "udp" else f"unix-dgram:{tmp_path}/x"
    site.settings(f'target = "app.py:Held"\nmax_children = 1\nlisten = ["{place}"]')
    daemon = site.start()
    with udp(daemon.address("app")) if scheme == "udp" else unix(tmp_path) as client:
        hold(client, 1)
        for number in range(9):
            client.send(b"%d" % number)
        site.settings(
            'target = "app.py:Held"\nmax_children = 1\nlisten = ["udp://127.0.0.1:0"]',
            name="app" if what == "the listener" else "other",
        )
        assert daemon.ctl("reload", "--no-wait").returncode == 0
        daemon.log.wait_for("^closed ")  # for us; he who is held still has it
        daemon.log.wait_for("^told to drain")
        site.open_gate()
        assert answers(client, 10) == ["one hold", *(f"one {number}" for number in range(9))]


def test_a_worker_that_leaves_others_behind_leaves_the_queue_to_them(site: Site) -> None:
    site.settings('target = "app.py:Held"\nlisten = ["udp://127.0.0.1:0"]\nmax_children = 2')
    daemon = site.start()
    with udp(daemon.address("app")) as client:
        hold(client, 2)
        client.send(b"after")
        assert daemon.ctl("drain", "--no-wait").returncode == 0
        daemon.log.wait_for("^told to drain", 2)
        site.open_gate()
        assert answers(client, 2) == ["one hold"] * 2
        daemon.log.wait_for("^worker_exit service=app ", 2)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(99)
        client.settimeout(DEADLINE)
        assert daemon.ctl("refill").returncode == 0
        assert client.recv(99) == b"one after"


def test_what_keeps_coming_does_not_keep_a_worker_from_leaving(site: Site) -> None:
    """Each answer is asked again: the queue is never empty."""
    site.settings('target = "app.py:Held"\nlisten = ["udp://127.0.0.1:0"]\nmax_children = 1\ngraceful_timeout = 300')
    daemon = site.start()
    with udp(daemon.address("app")) as client:
        hold(client, 1)
        for _ in range(20):
            client.send(b"again")
        os.kill(daemon.pid, 15)
        daemon.log.wait_for("^told to drain")
        site.open_gate()
        asked_again = 0
        client.settimeout(0.01)
        end = time.monotonic() + DEADLINE
        while daemon.process.poll() is None:
            assert time.monotonic() < end, "it stays as long as there is more"
            try:
                client.recv(99)
                client.send(b"again")
                asked_again += 1
            except (TimeoutError, ConnectionRefusedError):
                pass
    assert daemon.wait() == 0
    assert asked_again >= 20
    daemon.log.wait_for("^datagrams_left url=udp://127.0.0.1:")
    daemon.log.wait_for("^worker_exit service=app .*cause=drained")


def test_the_queue_is_left_when_the_time_is_over(site: Site) -> None:
    site.settings(
        'target = "app.py:Held"\nlisten = ["udp://127.0.0.1:0"]\nmax_children = 1\n'
        "graceful_timeout = 1\neof_timeout = 20"
    )
    daemon = site.start()
    with udp(daemon.address("app")) as client:
        hold(client, 1)
        client.send(b"too late")
        os.kill(daemon.pid, 15)
        daemon.log.wait_for("^end_of_file service=app ")
        site.open_gate()
        assert client.recv(99) == b"one hold"
        assert daemon.wait() == 0
    daemon.log.wait_for("^datagrams_left url=udp://127.0.0.1:")
