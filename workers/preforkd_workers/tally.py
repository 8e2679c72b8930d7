"""The tally of a lane: counts requests in its row of the scoreboard, and knows which request is held."""

import threading
from bisect import bisect_left
from time import monotonic_ns
from typing import Any

from preforkd_workers.scoreboard import BEGUN, BOUNDS_NS, BUCKETS, BUSY_NS, REFUSED, SINCE


class Tally:
    """For a lane that handles one request at a time. It is the only writer of ``row``."""

    def __init__(self, row: memoryview) -> None:
        self.row = row
        self._held: Any = None

    def begin(self, request: object) -> None:
        row = self.row
        self._held = request
        row[SINCE] = monotonic_ns()
        row[BEGUN] += 1

    def end(self, outcome: int) -> None:
        """Count an outcome, the word OK or ERRORS, and how long the request took."""
        row = self.row
        self._count(monotonic_ns() - row[SINCE])
        row[outcome] += 1
        self._held = None

    def refuse(self) -> None:
        """Count a request that verify_request turned away. It has neither begun nor a duration."""
        row = self.row
        row[BEGUN] += 1
        row[REFUSED] += 1

    def held(self) -> list[Any]:
        """The requests that are being handled."""
        return [] if self._held is None else [self._held]

    def wait(self) -> None:
        """Wait until nothing is held: here, whoever could ask has just stopped handling."""

    def _count(self, elapsed_ns: int) -> None:
        row = self.row
        row[BUSY_NS] += elapsed_ns
        row[BUCKETS + bisect_left(BOUNDS_NS, elapsed_ns)] += 1


class ThreadedTally(Tally):
    """For a server that mixes in ThreadingMixIn: many threads of one process handle requests and share the row."""

    def __init__(self, row: memoryview) -> None:
        super().__init__(row)
        self._changed = threading.Condition()
        self._handling: dict[int, tuple[Any, int]] = {}

    def begin(self, request: object) -> None:
        now = monotonic_ns()
        with self._changed:
            if not self._handling:
                self.row[SINCE] = now
            self._handling[threading.get_ident()] = request, now
            self.row[BEGUN] += 1

    def end(self, outcome: int) -> None:
        with self._changed:
            _, since = self._handling.pop(threading.get_ident())
            self._count(monotonic_ns() - since)
            self.row[outcome] += 1
            self._changed.notify_all()

    def refuse(self) -> None:
        with self._changed:
            super().refuse()

    def held(self) -> list[Any]:
        # No lock: a signal handler asks, perhaps while this very thread holds it. Copying a dict's values is atomic.
        return [request for request, _ in list(self._handling.values())]

    def wait(self) -> None:
        """Wait until no thread handles a request any more, daemon threads included."""
        with self._changed:
            self._changed.wait_for(lambda: not self._handling)
