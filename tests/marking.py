"""Handlers and servers that mark their requests, for the access log."""

import os
import sys
from socketserver import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler, TCPServer, ThreadingMixIn
from typing import Any


class Marking(StreamRequestHandler):
    """Marks the request with each line, and does what some of them say."""

    def handle(self) -> None:
        for line in self.rfile:
            self.server.mark(line.decode().rstrip("\n").encode().decode("unicode_escape"))  # type: ignore[attr-defined]
            match line.split():
                case [b"raise"]:
                    raise ValueError("as told")
                case [b"kill"]:
                    os.kill(os.getpid(), 9)
                case [b"leave"]:
                    os.chdir("/")
                case [b"modules"]:
                    line = " ".join(name for name in sys.modules if "access" in name).encode() + b"\n"
            self.wfile.write(line)


class MarkingDatagram(DatagramRequestHandler):
    def handle(self) -> None:
        data = self.rfile.read()
        self.server.mark(data.decode())  # type: ignore[attr-defined]
        self.wfile.write(data)


class Choosy(TCPServer):
    """Turns away who begins with an exclamation mark."""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return bool(request.recv(1) != b"!")


class Threading(ThreadingMixIn, TCPServer):
    """Threads of its own, inside the worker."""


class Copying(BaseRequestHandler):
    """Forks, and lets parent and child return alike."""

    def handle(self) -> None:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
