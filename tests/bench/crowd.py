"""Connections that are open at once, and what they cost their server in memory. Leaves none without its answer."""

from __future__ import annotations

import resource
import selectors
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic
from typing import Self

from tests.bench import procfs
from tests.bench.probes import Figures, Probe, Side
from tests.bench.servers import Opening
from tests.bench.spawned import CannotRunError
from tests.bench.tools import Tools

SIZES = (0, 100, 250, 500, 1000)  # connections
DESCRIPTORS = 4096  # for us, and for a server, which inherits our limit
PATIENCE = 20.0  # seconds, for one more answer
MESSAGE = b"one of many\n"


def crowd(opening: Opening, most_at_once: int = SIZES[-1]) -> Side:
    """Proportional memory of the whole tree, in MiB, with so many connections open on each of which a line was sent.

    ``most_at_once``: so many are answered, and held by a handler; the others wait to be accepted until those leave.
    """

    def probe(tools: Tools) -> Figures:
        have_descriptors(DESCRIPTORS)
        figures: dict[str, float] = {}
        with opening(tools) as server, Crowd(server.port) as clients:
            for size in SIZES:
                clients.grow(size)
                clients.hear(min(size, most_at_once))
                figures[f"mib_{size}"] = procfs.pss_mib([server.pid, *procfs.descendants(server.pid)])
            clients.leave()
        return figures | {"grown_mib": figures[f"mib_{SIZES[-1]}"] - figures[f"mib_{SIZES[0]}"]}

    @contextmanager
    def side(tools: Tools) -> Iterator[Probe]:
        yield lambda _: probe(tools)

    return side


class Crowd:
    """Clients that send one line each, and stay."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.stack = ExitStack()
        self.selector = self.stack.enter_context(selectors.DefaultSelector())
        self.size = 0
        self.answered: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def grow(self, size: int) -> None:
        """Be as many clients as that."""
        for _ in range(self.size, size):
            client = self.stack.enter_context(socket.create_connection(("127.0.0.1", self.port), PATIENCE))
            client.sendall(MESSAGE)
            self.selector.register(client, selectors.EVENT_READ)
        self.size = size

    def hear(self, number: int) -> None:
        """Wait until so many have had their answer."""
        deadline = monotonic() + PATIENCE
        while len(self.answered) < number:
            found = self.selector.select(deadline - monotonic())
            if not found:
                raise CannotRunError(f"{len(self.answered)} of {self.size} connections were answered, not {number}")
            for key, _ in found:
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj.recv(len(MESSAGE)) != MESSAGE:
                    raise CannotRunError("a server hung up without an answer")
                self.selector.unregister(key.fileobj)
                self.answered.append(key.fileobj)

    def leave(self) -> None:
        """Hang up, those that wait for an answer when they have it."""
        left = 0
        while left < self.size:
            self.hear(left + 1)
            for client in self.answered[left:]:
                client.close()
            left = len(self.answered)


def have_descriptors(number: int) -> None:
    """Raise our limit of open descriptors to that, as far as we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < number:
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
