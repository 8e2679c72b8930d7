"""How each server of the benchmark is started, and which of its processes do the work. Never measures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from tests.bench import procfs
from tests.bench.spawned import CannotRunError, spawned
from tests.bench.tools import Tools

PROCESSES = 4


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    pid: int
    port: int
    find_workers: Callable[[int], list[int]]

    def workers(self) -> list[int]:
        """The processes whose CPU time is counted; none where they come and go with each connection."""
        return self.find_workers(self.pid)


Opening = Callable[[Tools], AbstractContextManager[Server]]


def preforkd(target: str, scheme: str = "tcp", processes: int = PROCESSES) -> Opening:
    """preforkd with all its metrics on, ready when it says so."""
    name = target.rpartition(":")[2]

    @contextmanager
    def opening(tools: Tools) -> Iterator[Server]:
        listen = ["--listen", f"{scheme}://127.0.0.1:0", "--metrics", "tcp://127.0.0.1:0"]
        size = ["--max-children", str(processes)]
        command = [sys.executable, "-m", "preforkd", "serve", target, *listen, *size]
        with spawned(command, tools.bytecode) as server:
            server.wait_for(r"^ready\b")
            port = int(server.wait_for(rf"^listening .*service={name} .*url=\S+:(\d+)")[1])
            yield Server(server.process.pid, port, partial(titled, f"preforkd: worker {name}#", processes))

    return opening


def titled(start: str, number: int, pid: int) -> list[int]:
    """The children of `pid` whose title starts with `start`; CannotRunError if they are not `number`."""
    found = [child for child in procfs.children(pid) if procfs.title(child).startswith(start)]
    if len(found) != number:
        raise CannotRunError(f"{len(found)} processes are called {start!r}, not {number}")
    return found


def gunicorn(processes: int = PROCESSES) -> Opening:
    """gunicorn with sync workers, ready when all of them have been booted."""

    @contextmanager
    def opening(tools: Tools) -> Iterator[Server]:
        settings = ["--config", "tests/bench/gunicorn_conf.py", "--workers", str(processes)]
        command = [sys.executable, "-m", "gunicorn", *settings, "tests.bench.wsgi:application"]
        with spawned(command, tools.bytecode) as server:
            port = int(server.wait_for(r"Listening at: http://127\.0\.0\.1:(\d+)")[1])
            server.wait_for(r"Booting worker with pid", processes)
            yield Server(server.process.pid, port, procfs.children)

    return opening


def in_c(mode: str) -> Opening:
    """The C pre-fork server."""

    @contextmanager
    def opening(tools: Tools) -> Iterator[Server]:
        with spawned([tools.server, mode, str(PROCESSES)], tools.bytecode) as server:
            port = int(server.wait_for(r"^ready (\d+)")[1])
            yield Server(server.process.pid, port, procfs.children)

    return opening


def in_python(peer: str) -> Opening:
    """One of the servers of peers.py."""
    find = procfs.children if peer.startswith("uvloop") else lambda pid: []

    @contextmanager
    def opening(tools: Tools) -> Iterator[Server]:
        command = [sys.executable, "-m", "tests.bench.peers", peer, str(PROCESSES)]
        with spawned(command, tools.bytecode) as server:
            port = int(server.wait_for(r"^ready (\d+)")[1])
            yield Server(server.process.pid, port, find)

    return opening
