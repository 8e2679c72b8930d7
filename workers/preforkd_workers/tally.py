"""The tally of a lane: counts requests in its row of the scoreboard, and knows which request is held."""

import threading
from bisect import bisect_left
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from preforkd_workers.scoreboard import (
    BEGUN,
    BOUNDS_NS,
    BUCKETS,
    BUSY_NS,
    DEADLINE,
    LISTENER,
    MARK,
    PEER,
    REFUSED,
    SINCE,
    TRUNCATED,
    write_text,
)
from preforkd_workers.urls import with_port

# Of the thread or greenlet that looks: the ``tally`` of the lane that it is, whether its turn has ``taken`` any, and
# the one that was ``claimed`` at the door for that.
here = threading.local()


def current(otherwise: "Tally") -> "Tally":
    """The tally of the lane that calls; another one when it is called by a thread of the target's own."""
    found: Tally = getattr(here, "tally", otherwise)
    return found


def let_go_of_claim() -> "Tally | None":
    """Let go of the row that was claimed at the door for a request that does not begin. Returns whose it was."""
    claimed: Tally | None = getattr(here, "claimed", None)
    if claimed is not None:
        claimed.row[SINCE] = 0
        here.claimed = None
    return claimed


def peer_of(address: Any) -> str:
    """A client's address in words, as it fits into a row; empty where a client has none. Asked at every request."""
    if type(address) is tuple and len(address) > 1:
        host, port = address[0], address[1]
        return with_port(host, port) if type(host) is str and type(port) is int else ""
    if isinstance(address, bytes):
        return address.decode(errors="replace")
    return address if isinstance(address, str) else ""


class Tally:
    """For a lane that handles one request at a time. It is the only writer of ``row``.

    ``timeout``: what a request may take, in seconds; 0: for ever.
    """

    def __init__(self, row: memoryview, timeout: float = 0.0) -> None:
        self.row = row
        self.timeout_ns = int(timeout * 1e9)
        self._held: Any = None

    def begin(self, request: object, address: object, listener: int) -> None:
        """Hold this request, of a client at this address, taken from the n-th listener."""
        row = self.row
        self._held = request
        write_text(row, PEER, peer_of(address))
        row[MARK] = 0
        row[LISTENER] = listener
        since = row[SINCE] or monotonic_ns()  # at the door it was noted already, and others go by it
        if self.timeout_ns:
            row[DEADLINE] = since + self.timeout_ns
        row[SINCE] = since
        row[BEGUN] += 1

    def end(self, outcome: int) -> None:
        """Count an outcome, the word OK or ERRORS, and how long the request took."""
        row = self.row
        self._count(monotonic_ns() - row[SINCE])
        row[outcome] += 1
        if self.timeout_ns:
            row[DEADLINE] = 0
        row[SINCE] = 0
        self._held = None

    def refuse(self, address: object, listener: int) -> None:
        """Count a request that verify_request turned away, as ``begin`` has it. It has neither begun nor a duration."""
        row = self.row
        row[BEGUN] += 1
        row[REFUSED] += 1

    def truncate(self) -> None:
        """Count a datagram of which the handler sees only the beginning."""
        self.row[TRUNCATED] += 1

    def mark(self, text: str) -> None:
        """Have this said of the request that is held."""
        write_text(self.row, MARK, text)

    def extend(self, seconds: float) -> None:
        """Let the request that is held take so much longer."""
        if self.row[DEADLINE]:
            self.row[DEADLINE] += int(seconds * 1e9)

    def held(self) -> list[Any]:
        """The requests that are being handled."""
        return [request for request, _ in self.held_since()]

    def held_since(self) -> list[tuple[Any, int]]:
        """The same, each with the time since when; 0 for one that is just beginning or ending."""
        held = self._held
        return [] if held is None else [(held, self.row[SINCE])]

    def wait(self) -> None:
        """Wait until nothing is held: here, whoever could ask has just stopped handling."""

    def _count(self, elapsed_ns: int) -> None:
        row = self.row
        row[BUSY_NS] += elapsed_ns
        row[BUCKETS + bisect_left(BOUNDS_NS, elapsed_ns)] += 1


def precede(tally: Tally, name: str, do: Callable[[], None]) -> None:
    """Have something done before each call of this method of a tally."""
    method = getattr(tally, name)

    def preceded(*arguments: object) -> None:
        do()
        method(*arguments)

    setattr(tally, name, preceded)


def follow(tally: Tally, name: str, do: Callable[[], None]) -> None:
    """Have something done after each call of this method of a tally."""
    method = getattr(tally, name)

    def followed(*arguments: object) -> None:
        method(*arguments)
        do()

    setattr(tally, name, followed)


class ThreadedTally(Tally):
    """For a server that mixes in ThreadingMixIn: many threads of one process handle requests and share the row.

    It shows since when the oldest is held, and the earliest deadline.
    """

    def __init__(self, row: memoryview, timeout: float = 0.0) -> None:
        super().__init__(row, timeout)
        self._changed = threading.Condition()
        self._handling: dict[int, tuple[Any, int, int]] = {}  # by thread: request, since, deadline

    def begin(self, request: object, address: object, listener: int) -> None:
        now = monotonic_ns()
        with self._changed:
            self._handling[threading.get_ident()] = request, now, now + self.timeout_ns
            write_text(self.row, PEER, peer_of(address))
            self.row[MARK] = 0
            self.row[LISTENER] = listener
            self._show()
            self.row[BEGUN] += 1

    def end(self, outcome: int) -> None:
        with self._changed:
            _, since, _ = self._handling.pop(threading.get_ident())
            self._count(monotonic_ns() - since)
            self.row[outcome] += 1
            self._show()
            self._changed.notify_all()

    def extend(self, seconds: float) -> None:
        """Let the request of the calling thread take so much longer."""
        with self._changed:
            held = self._handling.get(threading.get_ident())
            if held is not None:
                self._handling[threading.get_ident()] = (*held[:2], held[2] + int(seconds * 1e9))
                self._show()

    def _show(self) -> None:
        if self.timeout_ns:
            self.row[DEADLINE] = min((deadline for _, _, deadline in self._handling.values()), default=0)
        self.row[SINCE] = min((since for _, since, _ in self._handling.values()), default=0)

    def refuse(self, address: object, listener: int) -> None:
        with self._changed:
            super().refuse(address, listener)

    def held_since(self) -> list[tuple[Any, int]]:
        # No lock: a signal handler asks, perhaps while this very thread holds it. Copying a dict's values is atomic.
        return [(request, since) for request, since, _ in list(self._handling.values())]

    def wait(self) -> None:
        """Wait until no thread handles a request any more, daemon threads included."""
        with self._changed:
            self._changed.wait_for(lambda: not self._handling)
