"""Server classes with loops of their own over ``handle_request()``. They know nothing of preforkd.

They append what happens to the file named in HOOKS.
"""

import os
import socket
from socketserver import ForkingMixIn, TCPServer, ThreadingMixIn, UDPServer
from typing import Any

from tests.targets import Obey, Pid, UpperDatagram


def note(*words: object) -> None:
    with open(os.environ["HOOKS"], "ab", buffering=0) as file:
        file.write(f"{' '.join(map(str, words))}\n".encode())


def on_worker_stop(server: TCPServer) -> None:
    note("on_worker_stop")


class Counting(Obey):
    """Tells, too, how often ``handle_request()`` has returned before."""

    def obey(self, order: str, *words: str) -> bytes:
        server: Any = self.server
        return b"%d\n" % server.returned if order == "returned" else super().obey(order, *words)


class ForEver(TCPServer):
    """Never looks at anything, least of all at what it was told."""

    allow_reuse_address = True
    returned = 0

    def __init__(self, address: Any) -> None:
        super().__init__(address, Counting)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        while True:
            self.handle_request()
            self.returned += 1

    def handle_timeout(self) -> None:
        note("handle_timeout")

    def server_close(self) -> None:
        note("server_close")
        super().server_close()


class Patient(ForEver):
    """Gives itself a time-out, and so may its socket."""

    def __init__(self, address: Any) -> None:
        super().__init__(address)
        self.timeout, socket_timeout = (float(word) if word else None for word in os.environ["TIMEOUTS"].split(","))
        if socket_timeout is not None:
            self.socket.settimeout(socket_timeout)


class Careful(ForEver):
    """Expects anything to go wrong, and goes on."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        while True:
            try:
                self.handle_request()
            except Exception as error:
                note("caught", type(error).__name__)


class Considerate(ForEver):
    """Looks whether it should go on, and tidies up at the end of its loop."""

    draining = False

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        while not self.draining:
            self.handle_request()
        note("tidied up")


class Closing(ForEver):
    """Closes its socket and goes on."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self.handle_request()
        self.socket.close()
        super().serve_forever(poll_interval)


class Both(ForEver):
    """Some by itself, and the rest by the loop of socketserver; and with a hook of its own."""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return True

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        for _ in range(3):
            self.handle_request()
        TCPServer.serve_forever(self, poll_interval)


class Datagrams(UDPServer):
    """The same for datagrams."""

    def __init__(self, address: Any) -> None:
        super().__init__(address, UpperDatagram)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        while True:
            self.handle_request()


class Threads(ThreadingMixIn, ForEver):
    """The same, with threads of its own for requests."""


class Children(ForkingMixIn, ForEver):
    """The same, with children of its own."""


class Second(Obey):
    """Asks a server that it runs by hand."""

    def obey(self, order: str, *words: str) -> bytes:
        with (
            TCPServer(("127.0.0.1", 0), Pid) as second,
            socket.create_connection(second.server_address[:2]) as client,  # type: ignore[arg-type]
        ):
            second.handle_request()
            return client.makefile("rb").read()
