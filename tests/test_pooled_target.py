"""A server with the library's pool of threads as the target of the daemon."""

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation
from tests.site import Site, udp

# Begun with, but not more: the gate is a pipe.
POOLS = """
from preforkd import ThreadPoolTCPServer, ThreadPoolUDPServer

class Gated:
    def process_request_thread(self, request, client_address):
        self.taken(request, client_address)
        with open("gate") as gate:
            gate.read()
        super().process_request_thread(request, client_address)

class Plain(ThreadPoolTCPServer):
    max_threads = 2

class Stream(Gated, ThreadPoolTCPServer):
    def taken(self, request, client_address):
        request.sendall(b"taken\\n")

class DaemonStream(Stream):
    daemon_threads = True

class Datagrams(Gated, ThreadPoolUDPServer):
    def taken(self, request, client_address):
        self.socket.sendto(b"taken\\n", client_address)

class DaemonDatagrams(Datagrams):
    daemon_threads = True

class Loop(ThreadPoolTCPServer):
    max_threads = 1
    idle_thread_timeout = 3600.0
    def serve_forever(self, poll_interval=0.5):
        while True:
            self.handle_request()
    def handle_timeout(self):
        raise AssertionError("it has no time-out")

class DatagramLoop(ThreadPoolUDPServer):
    idle_thread_timeout = 3600.0
    serve_forever = Loop.serve_forever
"""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    made = tmp_path / "gate"
    os.mkfifo(made)
    return made


def site_of(name: str, directory: Path, serve: Serve) -> Site:
    site = Site(directory, serve)
    site.write("one", POOLS)
    scheme, handler = ("udp", "Datagram") if "Datagram" in name else ("tcp", "Handler")
    site.settings(
        f'max_children = 1\nprobation = 0\nhandler = "app.py:{handler}"\ngraceful_timeout = {DEADLINE}',
        listen=f"{scheme}://127.0.0.1:0",
    )
    settings = directory / "preforkd.toml"
    settings.write_text(settings.read_text().replace('target = "app.py:Handler"', f'target = "app.py:{name}"'))
    site.daemon = serve("-c", "preforkd.toml")
    return site


def say(conversation: Conversation, line: bytes) -> bytes:
    conversation.socket.sendall(line + b"\n")
    return conversation.answers.readline()


@pytest.mark.parametrize("name", ["Plain", "Loop"])
def test_with_all_threads_busy_a_connection_waits_and_a_drain_lets_the_others_finish(
    name: str, tmp_path: Path, serve: Serve
) -> None:
    daemon = site_of(name, tmp_path, serve).daemon
    threads = {"Plain": 2, "Loop": 1}[name]
    clients = [Conversation(daemon.connect()) for _ in range(threads)]
    for client in clients:
        assert say(client, b"said") == b"said\n"
    with Conversation(daemon.connect()) as waiting:
        waiting.socket.sendall(b"version\n")
        with clients.pop() as first:
            assert say(first, b"still") == b"still\n"
        assert waiting.answers.readline() == b"one\n"
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("^stopping|^drain")
        for client in [*clients, waiting]:
            assert say(client, b"last") == b"last\n"
        for client in clients:
            client.close()


@pytest.mark.parametrize("name", ["Stream", "DaemonStream"])
def test_a_connection_that_was_handed_to_a_thread_is_answered_though_the_worker_leaves(
    name: str, tmp_path: Path, serve: Serve, gate: Path
) -> None:
    site = site_of(name, tmp_path, serve)
    with Conversation(site.daemon.connect()) as client:
        assert say(client, b"version") == b"taken\n"
        site.reload()
        gate.write_text("go on")
        assert client.answers.readline() == b"one\n", site.daemon.log.text


@pytest.mark.parametrize("name", ["Datagrams", "DaemonDatagrams"])
def test_a_datagram_that_was_handed_to_a_thread_is_answered_though_the_worker_leaves(
    name: str, tmp_path: Path, serve: Serve, gate: Path
) -> None:
    site = site_of(name, tmp_path, serve)
    with udp(site.daemon.address()) as client:
        client.send(b"quick")
        assert client.recv(99) == b"taken\n"
        site.reload()
        site.daemon.log.wait_for("worker_ready .*gen=2")
        gate.write_text("go on")
        assert client.recv(99) == b"one"


def test_idle_threads_of_a_loop_over_handle_request_do_not_hold_the_worker(tmp_path: Path, serve: Serve) -> None:
    daemon = site_of("DatagramLoop", tmp_path, serve).daemon
    with udp(daemon.address()) as client:
        client.send(b"quick")
        assert client.recv(99) == b"one"
    daemon.signal(signal.SIGTERM)
    daemon.log.wait_for("^worker_exit .*status=0")
