"""A directory with settings and an application in it, as somebody deploys it: written anew, and reloaded."""

import signal
import socket
from pathlib import Path
from typing import Self

from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon

APP = """
import os
import socket
import time
from socketserver import DatagramRequestHandler, StreamRequestHandler, TCPServer

VERSION = "{version}"


class Handler(StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            match line.decode().split():
                case ["version"]:
                    answer = VERSION
                case ["pid"]:
                    answer = str(os.getpid())
                case ["raise"]:
                    raise ValueError("as told")
                case ["kill"]:
                    os.kill(os.getpid(), 9)
                case ["until_eof"]:
                    self.wfile.write(b"waiting\\n")
                    self.rfile.read()
                    answer = "eof"
                case ["forever"]:
                    self.wfile.write(b"waiting\\n")
                    while True:
                        time.sleep(60)
                case other:
                    answer = " ".join(other)
            self.wfile.write(answer.encode() + b"\\n")


class Datagram(DatagramRequestHandler):
    def handle(self):
        if self.rfile.read() == b"slow":
            self.socket.sendto(b"begun", self.client_address)
            while not self.server.draining:
                time.sleep(0.01)
            with open("gate") as gate:  # a pipe: until somebody opens it to write
                gate.read()
        self.wfile.write(VERSION.encode())
"""


class Site:
    """The files of a deployment, and the daemon that serves them."""

    def __init__(self, directory: Path, serve: Serve) -> None:
        self.directory = directory
        self.serve = serve
        self.writes = 0
        self.reloads = 0
        self.daemon: Daemon

    def write(self, version: str, more: str = "") -> None:
        """A version of the application; ``more``: what it does besides when it is imported."""
        self.writes += 1
        (self.directory / "app.py").write_text(APP.replace("{version}", version) + f"{more}\n# {'.' * self.writes}\n")

    def settings(self, text: str = "", daemon: str = "", listen: str = "tcp://127.0.0.1:0", name: str = "app") -> None:
        """Settings of one service, with ``text`` in its table or below, and ``daemon`` above."""
        (self.directory / "preforkd.toml").write_text(
            f'{daemon}\n[services.{name}]\ntarget = "app.py:Handler"\nlisten = ["{listen}"]\n{text}\n'
        )

    def start(self, text: str = 'probation = "0s"', daemon: str = "", version: str = "one", **keywords: object) -> Self:
        self.write(version)
        self.settings(text, daemon)
        self.daemon = self.serve("-c", "preforkd.toml", **keywords)
        return self

    def hup(self) -> None:
        self.daemon.signal(signal.SIGHUP)

    def reload(self, result: str = "done") -> str:
        """Have it reloaded; returns the line that says how that has ended."""
        self.hup()
        return self.ended(result)

    def ended(self, result: str = "done") -> str:
        self.reloads += 1
        line = self.daemon.log.wait_for("^reload_(done|rolled_back|refused|abandoned) ", self.reloads).string
        assert line.startswith(f"reload_{result} "), self.daemon.log.text
        return line

    def ask(self, line: str = "version", service: str | None = None) -> str:
        return self.daemon.ask(f"{line}\n".encode(), service).decode().strip()

    def versions(self, number: int = 12) -> set[str]:
        return {self.ask() for _ in range(number)}


class Talk(Conversation):
    """A conversation that stays open, and the pid of its worker."""

    def __init__(self, daemon: Daemon, service: str | None = None) -> None:
        super().__init__(daemon.connect(service))
        self.pid = int(self.ask("pid"))

    def ask(self, line: str) -> str:
        self.socket.sendall(f"{line}\n".encode())
        return self.answers.readline().decode().strip()


def udp(address: tuple[str, int]) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(DEADLINE)
    client.connect(address)
    return client


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody had a moment ago."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
