"""A worker that is told to leave sees through whatever it has taken, and takes whatever it was woken for."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import ClassVar

import pytest

from preforkd_workers.lane import Lane
from preforkd_workers.lifeline import Lifeline
from preforkd_workers.scoreboard import Rows
from preforkd_workers.tally import Tally
from tests.conftest import Serve
from tests.daemon import DEADLINE
from tests.site import Site, udp

# Begun with, but not more: the gate is a pipe.
THREADS = """
from socketserver import ThreadingTCPServer, ThreadingUDPServer

def wait():
    with open("gate") as gate:
        gate.read()

class Stream(ThreadingTCPServer):
    daemon_threads = True
    def process_request_thread(self, request, client_address):
        request.sendall(b"taken\\n")
        wait()
        super().process_request_thread(request, client_address)

class Datagrams(ThreadingUDPServer):
    def process_request_thread(self, request, client_address):
        self.socket.sendto(b"taken\\n", client_address)
        wait()
        super().process_request_thread(request, client_address)
"""


class Last(BaseRequestHandler):
    """Says whether its lane may take others yet."""

    lane: ClassVar[Lane]

    def handle(self) -> None:
        self.request.sendall(b"taking" if self.lane.is_taking else b"left")


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    made = tmp_path / "gate"
    os.mkfifo(made)
    return made


@pytest.fixture
def servers() -> Iterator[list[TCPServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(TCPServer(("127.0.0.1", 0), Last)) for _ in range(2)]


def test_a_lane_that_several_listeners_have_woken_at_once_takes_from_each_although_it_drains(
    servers: list[TCPServer],
) -> None:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs), ExitStack() as clients:
        lane = Lane(servers, Lifeline(theirs), Tally(Rows.blank()[0]))
        asked = [clients.enter_context(socket.create_connection(each.server_address)) for each in servers]  # type: ignore[arg-type]
        for server in servers:
            server.socket.setblocking(False)
        Last.lane, lane.is_taking = lane, True
        lane.drain()
        lane.take_last()
        for client, answer in zip(asked, (b"taking", b"left"), strict=True):  # the last of them may take long
            client.settimeout(DEADLINE)
            assert client.recv(9) == answer


def test_a_request_that_was_handed_to_a_daemon_thread_is_answered_though_the_worker_leaves(
    tmp_path: Path, serve: Serve, gate: Path
) -> None:
    site = Site(tmp_path, serve)
    site.write("one", THREADS)
    site.settings('max_children = 1\nprobation = 0\nhandler = "app.py:Handler"')
    _replace(tmp_path, 'target = "app.py:Handler"', 'target = "app.py:Stream"')
    site.daemon = serve("-c", "preforkd.toml")
    with site.daemon.connect() as client, client.makefile("rb") as answers:
        client.settimeout(DEADLINE)
        client.sendall(b"version\n")
        assert answers.readline() == b"taken\n"
        site.reload()
        gate.write_text("go on")
        assert answers.readline() == b"one\n", site.daemon.log.text


def test_a_threaded_datagram_server_answers_what_it_has_taken_though_the_worker_leaves(
    tmp_path: Path, serve: Serve, gate: Path
) -> None:
    site = Site(tmp_path, serve)
    site.write("one", THREADS)
    site.settings('max_children = 1\nprobation = 0\nhandler = "app.py:Datagram"', listen="udp://127.0.0.1:0")
    _replace(tmp_path, 'target = "app.py:Handler"', 'target = "app.py:Datagrams"')
    site.daemon = serve("-c", "preforkd.toml")
    with udp(site.daemon.address()) as client:
        client.send(b"quick")
        assert client.recv(99) == b"taken\n"
        site.reload()
        site.daemon.log.wait_for("worker_ready .*gen=2")
        gate.write_text("go on")
        assert client.recv(99) == b"one"


def _replace(directory: Path, before: str, after: str) -> None:
    settings = directory / "preforkd.toml"
    settings.write_text(settings.read_text().replace(before, after))
