"""A target with hooks, for the daemon under test: they append what they saw to the file named in HOOKS."""

import os
import sys
import threading
from socketserver import BaseServer, StreamRequestHandler, TCPServer, ThreadingMixIn
from typing import Any

from tests.targets import ForkAndReturn, Obey

__all__ = ["ForkAndReturn", "Server", "ThreadingServer"]

nothing = None


def note(hook: str, server: BaseServer, *more: object) -> None:
    """One line, in one write: the hook, the process, the thread, and whether the server is draining and still open."""
    thread = "main" if threading.current_thread() is threading.main_thread() else "thread"
    served: Any = server
    state = "draining" if served.draining else "serving"
    is_open = "open" if served.fileno() >= 0 else "closed"
    words = [hook, os.getpid(), thread, state, is_open, served.server_address[1], *more]
    with open(os.environ["HOOKS"], "ab", buffering=0) as file:
        file.write(f"{' '.join(map(str, words))}\n".encode())


def on_mold(server: BaseServer) -> None:
    note("on_mold", server)


def on_worker_start(server: BaseServer, slot: int) -> None:
    note("on_worker_start", server, slot)


class Hooks:
    """Dotted names."""

    @staticmethod
    def on_drain(server: BaseServer) -> None:
        note("on_drain", server)

    @staticmethod
    def on_worker_stop(server: BaseServer) -> None:
        note("on_worker_stop", server)


def raises(server: BaseServer, *_: object) -> None:
    note("raises", server)
    raise ValueError("as told")


def exits(server: BaseServer, *_: object) -> None:
    note("exits", server)
    sys.exit(3)


def interrupts(server: BaseServer, *_: object) -> None:
    note("interrupts", server)
    raise KeyboardInterrupt


def hangs(server: BaseServer, *_: object) -> None:
    note("hangs", server)
    threading.Event().wait()


def takes_signals(server: BaseServer, *_: object) -> None:
    """As a library may that is set up in a hook."""
    import signal

    note("takes_signals", server)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def starts_thread(server: BaseServer) -> None:
    threading.Thread(target=threading.Event().wait, name="helper", daemon=True).start()


class Handler(Obey):
    """Notes that a request has ended."""

    def finish(self) -> None:
        super().finish()
        note("request", self.server)


class Quick(StreamRequestHandler):
    """Answers at once, in a thread: the request is over when the connection is."""

    def handle(self) -> None:
        self.wfile.write(b"quick\n")
        self.rfile.read()
        note("request", self.server)


class Server(TCPServer):
    """Notes when it is closed."""

    def __init__(self, address: Any) -> None:
        super().__init__(address, Handler)

    def server_close(self) -> None:
        note("server_close", self)
        super().server_close()


class ThreadingServer(ThreadingMixIn, TCPServer):
    """Its requests end in threads."""

    def __init__(self, address: Any) -> None:
        super().__init__(address, Quick)

    def server_close(self) -> None:
        note("server_close", self)
        super().server_close()
