"""What is measured of a server: exchanges a second, CPU time, memory, time to ready. Never compares two.

A probe is called with the seconds it may take and gives figures by name. A side of a comparison is a context in
which its probe can be called again and again.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from time import monotonic

from tests.bench import procfs
from tests.bench.scrapes import scraping
from tests.bench.servers import Opening, Server
from tests.bench.spawned import CannotRunError
from tests.bench.tools import Tools

Figures = Mapping[str, float]
Probe = Callable[[float], Figures]
Side = Callable[[Tools], AbstractContextManager[Probe]]

PATIENCE = 20.0  # seconds that a generator may take on top of what it was told
FEW, MANY = 4, 12  # workers, between which the cost of one more is taken
VISITS = 50  # requests to every worker before its memory is looked at
LINE = b"one line\n"
GET = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"


def exchanges(opening: Opening, mode: str, clients: int, scraped: bool = False) -> Side:
    """Exchanges a second under load.c, and the workers' CPU time for each. ``scraped``: while metrics are read."""

    def measure(tools: Tools, server: Server, seconds: float) -> Figures:
        with scraping(server.metrics) if scraped else nullcontext():
            found = run([tools.load, mode, str(server.port), str(clients), str(seconds)], seconds)
        figures = {name: float(value) for name, value in re.findall(r"(\w+)=(\S+)", found)}
        return figures | {"per_second": figures["count"] / figures["seconds"]}

    return under_load(opening, measure)


def pages(opening: Opening, clients: int) -> Side:
    """Pages a second under wrk, which counts in whole seconds."""

    def measure(tools: Tools, server: Server, seconds: float) -> Figures:
        whole = max(1, round(seconds))
        url = f"http://127.0.0.1:{server.port}/"
        command = ["wrk", "--threads", "2", "--connections", str(clients), "--duration", f"{whole}s", url]
        found = run(command, whole)
        bad = re.findall(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", found)
        wrong = re.findall(r"Non-2xx or 3xx responses: (\d+)", found)
        return {
            "count": float(only(r"(\d+) requests in", found)),
            "per_second": float(only(r"Requests/sec:\s+([\d.]+)", found)),
            "errors": sum(map(float, [*(bad[0] if bad else ()), *wrong])),
        }

    return under_load(opening, measure)


def under_load(opening: Opening, measure: Callable[[Tools, Server, float], Figures]) -> Side:
    """A side with one server for all rounds; `measure` is completed with the CPU time of its workers."""

    @contextmanager
    def side(tools: Tools) -> Iterator[Probe]:
        with opening(tools) as server:

            def probe(seconds: float) -> Figures:
                workers = server.workers()
                before = procfs.cpu_seconds(workers)
                figures = measure(tools, server, seconds)
                if not figures["count"]:
                    raise CannotRunError(f"not one exchange succeeded, {figures['errors']:.0f} failed")
                if not workers:
                    return figures
                if server.workers() != workers:
                    raise CannotRunError("workers were replaced while they were measured")
                spent = procfs.cpu_seconds(workers) - before
                return {**figures, "cpu_us": spent / figures["count"] * 1e6}

            yield probe

    return side


def memory(opening: Callable[[int], Opening], request: bytes) -> Side:
    """What one worker more costs in proportional memory, the whole tree counted, after each has served."""

    def total(tools: Tools, workers: int) -> float:
        with opening(workers)(tools) as server:
            for _ in range(VISITS):
                visit(server.port, workers, request)
            return procfs.pss_mib([server.pid, *procfs.descendants(server.pid)])

    @contextmanager
    def side(tools: Tools) -> Iterator[Probe]:
        yield lambda _: {"mib": (total(tools, MANY) - total(tools, FEW)) / (MANY - FEW)}

    return side


def time_to_ready(opening: Opening, request: bytes) -> Side:
    """From before the process starts until all workers have been announced and a first request is answered."""

    def probe(tools: Tools) -> Figures:
        started = monotonic()
        with opening(tools) as server:
            visit(server.port, 1, request)
            return {"ms": (monotonic() - started) * 1000}

    @contextmanager
    def side(tools: Tools) -> Iterator[Probe]:
        yield lambda _: probe(tools)

    return side


def visit(port: int, number: int, request: bytes) -> None:
    """Be served on this many connections, all open before the first one asks: idle workers take one each."""
    with ExitStack() as stack:
        connections = []
        for _ in range(number):
            connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)))
        for connection in connections:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        for connection in connections:
            with connection.makefile("rb") as answer:
                if not answer.read():
                    raise CannotRunError("a server hung up without an answer")


def run(command: list[str], seconds: float) -> str:
    """The output of a load generator. Raises CannotRunError if it fails or does not end in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + PATIENCE, check=True)
    except subprocess.SubprocessError as error:
        raise CannotRunError(f"{command[0]}: {error}") from error
    return done.stdout


def only(pattern: str, text: str) -> str:
    """The first group of `pattern` in `text`."""
    if match := re.search(pattern, text):
        return match[1]
    raise CannotRunError(f"no {pattern!r} in: {text}")
