"""The scoreboard: a memfd of 64-bit words that tells anyone who maps it what every lane is doing.

One writer per word, so there is no lock and a process may die at any instruction. A row belongs to a lane of a
slot, not to a pid: the next worker in the slot goes on counting where the last one was killed. While nobody lives
in a slot, the master owns its row. Words are stored through ``memoryview.cast("Q")``: one aligned store, never torn
(``struct.pack_into`` writes byte by byte and is).

The file begins with a description of itself in JSON, so that a reader needs nothing but the descriptor:

    | JSON, padded to HEADER bytes | daemon words | service words, listener words, rows | next service … |
"""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Self

VERSION = 1
HEADER = 1 << 16
WORD = 8

# The daemon's words, written by the master.
STARTED_AT, HEARTBEAT = range(2)  # nanoseconds since the epoch
DAEMON_WORDS = 8

# Why a worker left. The order is the layout: append only.
CAUSES = (
    "drained", "max_requests", "max_rss", "max_lifetime", "deadline", "oom", "crash", "boot", "operator", "orphaned",
)  # fmt: skip

# A service's words, written by the master.
GENERATION, SIZE, ROWS_USED, SPAWNS, KILLED, REAPED_CPU_NS, EXITS = range(7)  # EXITS: the first of one word per cause
SERVICE_WORDS = 24

# A listener's words, written by the master.
BACKLOG, BACKLOG_LIMIT, DROPS = range(3)
LISTENER_WORDS = 8

# A lane's row, written by the lane.
PID, ROW_GENERATION, STATE, SINCE, BEGUN, OK, ERRORS, REFUSED, BUSY_NS, BUCKETS = range(10)
ROW_WORDS = 32

# What STATE may say. Busy is not among them: a lane is busy while it has begun more requests than it has ended.
EMPTY, STARTING, SERVING, DRAINING = range(4)

# Upper bounds of the latency histogram in nanoseconds; one more bucket takes the rest.
BOUNDS_NS = tuple(
    int(seconds * 1e9)
    for seconds in (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
)


def ended(row: memoryview) -> int:
    """Number of requests that this row has seen through to an outcome."""
    return int(row[OK] + row[ERRORS] + row[REFUSED])


def is_busy(row: memoryview) -> bool:
    """Whether the lane of this row holds a request."""
    return bool(row[BEGUN] > ended(row))


def blank_row() -> memoryview:
    """A row of its own, shared with children forked later, for a server that has no scoreboard."""
    return memoryview(mmap.mmap(-1, ROW_WORDS * WORD)).cast("Q")


@dataclass(frozen=True)
class Section:
    """One service's part: how many rows it has, and which listeners it counts for."""

    service: str
    kind: str
    listeners: tuple[str, ...]
    rows: int

    @property
    def words(self) -> int:
        return SERVICE_WORDS + LISTENER_WORDS * len(self.listeners) + ROW_WORDS * self.rows


class Service:
    """A service's words: the master's own, one group per listener, and the rows of its lanes."""

    def __init__(self, section: Section, words: memoryview) -> None:
        self.section = section
        self.words = words[:SERVICE_WORDS]
        self._listeners = words[SERVICE_WORDS : SERVICE_WORDS + LISTENER_WORDS * len(section.listeners)]
        self._rows = words[SERVICE_WORDS + LISTENER_WORDS * len(section.listeners) :]

    def listener(self, index: int) -> memoryview:
        return self._listeners[index * LISTENER_WORDS : (index + 1) * LISTENER_WORDS]

    def row(self, index: int) -> memoryview:
        """The row of a lane, ``index`` counted within the service; no bounds beyond the section's ``rows``."""
        return self._rows[index * ROW_WORDS : (index + 1) * ROW_WORDS]

    def rows(self) -> Iterator[memoryview]:
        """The rows that were ever used; an untouched page of the rest is never read, for reading would allocate it."""
        return (self.row(index) for index in range(self.words[ROWS_USED]))

    def settle_row(self, index: int) -> int:
        """Take over the row of a dead lane: empty it, and return how many requests died with it."""
        row = self.row(index)
        killed = max(0, row[BEGUN] - ended(row))  # whatever its owner has written there
        row[BEGUN] = ended(row)
        row[STATE], row[PID] = EMPTY, 0
        return int(killed)


class Scoreboard:
    """The mapped file. Made by the master before anything is forked; attached to by descriptor elsewhere."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        header = json.loads(bytes(self._map[:HEADER]).rstrip(b"\0"))
        if header["version"] != VERSION:
            raise ValueError(f"scoreboard of version {header['version']}, this program reads version {VERSION}")
        self.name: str = header["name"]
        words = memoryview(self._map)[HEADER:].cast("Q")
        self.daemon = words[:DAEMON_WORDS]
        self.services: dict[str, Service] = {}
        start = DAEMON_WORDS
        for fields in header["services"]:
            section = Section(**{**fields, "listeners": tuple(fields["listeners"])})
            self.services[section.service] = Service(section, words[start : start + section.words])
            start += section.words

    @classmethod
    def create(cls, name: str, sections: Sequence[Section]) -> Self:
        """Make a scoreboard of zeros for these services.

        Raises ValueError when their description does not fit into the header.
        """
        services = [asdict(section) for section in sections]
        header = json.dumps({"version": VERSION, "name": name, "services": services}).encode()
        if len(header) > HEADER:
            raise ValueError(f"{len(sections)} services need {len(header)} bytes of description, not {HEADER}")
        fd = os.memfd_create("preforkd-scoreboard")
        os.ftruncate(fd, HEADER + WORD * (DAEMON_WORDS + sum(section.words for section in sections)))
        os.pwrite(fd, header, 0)
        return cls(fd)
