"""How each server of the benchmark is started, and which of its processes do the work. Never measures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

from tests.bench import procfs
from tests.bench.spawned import START_PATIENCE, WORKER_PATIENCE, CannotRunError, spawned
from tests.bench.tools import Tools

PROCESSES = 4
NUMBERS = count(1)  # several of us may run at the same time: each has a name of its own


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    pid: int
    port: int
    find_workers: Callable[[int], list[int]]
    metrics: int = 0  # the port of its exporter, if it has one

    def workers(self) -> list[int]:
        """The processes whose CPU time is counted; none where they come and go with each connection."""
        return self.find_workers(self.pid)


Opening = Callable[[Tools], AbstractContextManager[Server]]


def preforkd(
    target: str, scheme: str = "tcp", processes: int = PROCESSES, options: Sequence[str] = (), has_metrics: bool = True
) -> Opening:
    """preforkd with all its metrics on, if not told otherwise, ready when it says so."""
    name = target.rpartition(":")[2]
    they_stay = "max_requests=1" not in options

    @contextmanager
    def opening(tools: Tools) -> Iterator[Server]:
        listen = ["--set", f"name=bench-{next(NUMBERS)}", "--listen", f"{scheme}://127.0.0.1:0"]
        exporter = ["--metrics", "tcp://127.0.0.1:0"] if has_metrics else []
        size = ["--max-children", str(processes)]
        command = [sys.executable, "-m", "preforkd", "serve", target, *listen, *exporter, *size, *options]
        with spawned(command, tools.bytecode) as server:
            server.wait_for(r"^ready\b", patience=START_PATIENCE + WORKER_PATIENCE * processes)
            port, metrics = (
                int(server.wait_for(rf"^listening .*service={service} .*url=\S+:(\d+)")[1]) if is_there else 0
                for service, is_there in ((name, True), ("metrics", has_metrics))
            )
            find = partial(titled, f"preforkd: worker {name}#", processes) if they_stay else nobody
            yield Server(server.process.pid, port, find, metrics)

    return opening


def nobody(pid: int) -> list[int]:
    """For servers without workers, or with such as come and go."""
    return []


def itself(pid: int) -> list[int]:
    """For servers of one process."""
    return [pid]


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


def in_c(mode: str, processes: int = PROCESSES) -> Opening:
    """The C pre-fork server."""

    @contextmanager
    def opening(tools: Tools) -> Iterator[Server]:
        with spawned([tools.server, mode, str(processes)], tools.bytecode) as server:
            port = int(server.wait_for(r"^ready (\d+)")[1])
            yield Server(server.process.pid, port, procfs.children)

    return opening


def in_python(peer: str) -> Opening:
    """One of the servers of peers.py."""
    find = {"uvloop": procfs.children, "threading": itself}.get(peer.partition("-")[0], nobody)
    return in_module("tests.bench.peers", peer, str(PROCESSES), find=find)


def with_gevent(mode: str, processes: int) -> Opening:
    """gevent's own StreamServer, in as many processes."""
    return in_module("tests.bench.gevent_peer", mode, str(processes), find=procfs.children)


def in_module(*module: str, find: Callable[[int], list[int]] = nobody) -> Opening:
    """A module run as a program that says when it is ready."""

    @contextmanager
    def opening(tools: Tools) -> Iterator[Server]:
        command = [sys.executable, "-m", *module]
        with spawned(command, tools.bytecode) as server:
            port = int(server.wait_for(r"^ready (\d+)")[1])
            yield Server(server.process.pid, port, find)

    return opening
