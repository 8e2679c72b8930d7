"""The scoreboard: a memfd of 64-bit words that tells anyone who maps it what every lane is doing.

One writer per word, so there is no lock and a process may die at any instruction. A row belongs to a lane of a
slot, not to a pid: the next worker in the slot goes on counting where the last one was killed. While nobody lives
in a slot, the master owns its row. Words are stored through ``memoryview.cast("Q")``: one aligned store, never torn
(``struct.pack_into`` writes byte by byte and is).

The file describes itself in JSON, so that a reader needs nothing but the descriptor:

    | directory | directory | daemon words | blocks: service words, listener words, rows, in the order of their making |

Blocks are added while the daemon runs, when a reload brings services, listeners or a larger pool; none is ever moved,
and what a service has counted stays when it goes, for it may come back (of those gone, MOST_GONE are remembered). Of
the two directories the one is valid that the parity of the word LAYOUT says; the master writes the other one and then
adds one to LAYOUT, so a reader never sees half a directory. The file is as long as it will ever be from the start, and
mapped once: what nobody has written to takes no memory.
"""

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

VERSION = 2
WORD = 8
SPAN = 1 << 26  # bytes
DIRECTORY = 1 << 16  # bytes

# The daemon's words, written by the master. Times are nanoseconds since the epoch, durations nanoseconds.
STARTED_AT, HEARTBEAT, LAYOUT, RELOADED_AT, RELOAD_NS, RELOADS = range(6)  # RELOADS: the first of one word per result
DAEMON_WORDS = 16
_FIRST_BLOCK = 2 * DIRECTORY // WORD + DAEMON_WORDS

# How a reload may end. The order is the layout: append only.
RESULTS = ("done", "rolled_back", "refused")

# Why a worker left. The order is the layout: append only.
CAUSES = (
    "drained", "max_requests", "max_rss", "max_lifetime", "deadline", "oom", "crash", "boot", "operator", "orphaned",
    "eof",
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
FEWEST_ROWS = 16  # that are added at a time
MOST_GONE = 32  # services whose words stay although they are not there any more

# What STATE may say. Busy is not among them: a lane is busy while it has begun more requests than it has ended.
EMPTY, STARTING, SERVING, DRAINING = range(4)

# Upper bounds of the latency histogram in nanoseconds; one more bucket takes the rest.
BOUNDS_NS = tuple(
    int(seconds * 1e9)
    for seconds in (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
)


# What frames the entries in a description, and some room for pools that grow, in bytes.
_HEADING = 1 << 10


def ended(row: memoryview) -> int:
    """Number of requests that this row has seen through to an outcome."""
    return int(row[OK] + row[ERRORS] + row[REFUSED])


def is_busy(row: memoryview) -> bool:
    """Whether the lane of this row holds a request."""
    return bool(row[BEGUN] > ended(row))


def blank_row() -> memoryview:
    """A row of its own, shared with children forked later, for a server that has no scoreboard."""
    return memoryview(mmap.mmap(-1, ROW_WORDS * WORD)).cast("Q")


@dataclass
class Entry:
    """A service's entry in the directory: where its blocks begin, counted in words from the start of the file."""

    service: str
    words: int
    listeners: list[tuple[str, int]] = field(default_factory=list)  # url; an empty one is a block to be used again
    rows: list[tuple[int, int]] = field(default_factory=list)  # where a block of rows begins, and how many it has
    is_gone: bool = False


class Service:
    """A service's words: the master's own, one group per listener, and the rows of its lanes."""

    def __init__(self, board: "Scoreboard", entry: Entry) -> None:
        self.board = board
        self.entry = entry
        self.words = board.words[entry.words : entry.words + SERVICE_WORDS]

    def listeners(self) -> dict[str, memoryview]:
        """The words of each listener, by its URL."""
        return {url: self.board.words[at : at + LISTENER_WORDS] for url, at in self.entry.listeners if url}

    def place_of_row(self, index: int) -> int:
        """Where the row of a lane begins. ``index`` is counted within the service; IndexError when it has no such."""
        for at, number in self.entry.rows:
            if index < number:
                return at + index * ROW_WORDS
            index -= number
        raise IndexError(f"{self.entry.service} has no row {index} more")

    def row(self, index: int) -> memoryview:
        return self.board.row_at(self.place_of_row(index))

    def rows(self) -> Iterator[memoryview]:
        """The rows that were ever used; an untouched page of the rest is never read, for reading would allocate it."""
        return (self.row(index) for index in range(self.words[ROWS_USED]))

    def use_row(self, index: int) -> int:
        """Where the row of a lane begins, after making room for it if there is none yet. For the master only.

        Raises MemoryError when the scoreboard is full.
        """
        has = sum(number for _, number in self.entry.rows)
        if index >= has:
            self.entry.rows.append(self.board.add_rows(max(index + 1 - has, has, FEWEST_ROWS)))
            try:
                self.board.write_directory()
            except MemoryError:
                self.entry.rows.pop()
                raise
        self.words[ROWS_USED] = max(self.words[ROWS_USED], index + 1)
        return self.place_of_row(index)

    def settle_row(self, index: int) -> int:
        """Take over the row of a dead lane: empty it, and return how many requests died with it."""
        row = self.row(index)
        killed = max(0, row[BEGUN] - ended(row))  # whatever its owner has written there
        row[BEGUN] = ended(row)
        row[STATE], row[PID] = EMPTY, 0
        return int(killed)


class Scoreboard:
    """The mapped file. Made by the master before anything is forked; attached to by descriptor elsewhere."""

    def __init__(self, mapped: mmap.mmap, fd: int = -1) -> None:
        self.fd = fd
        self.words = memoryview(mapped).cast("Q")
        self.daemon = self.words[_FIRST_BLOCK - DAEMON_WORDS : _FIRST_BLOCK]
        self.name = ""
        self.services: dict[str, Service] = {}
        self._entries: dict[str, Entry] = {}
        self._end = _FIRST_BLOCK
        self._layout = 0

    @classmethod
    def create(cls, name: str) -> Self:
        """Make an empty scoreboard, in a memfd."""
        fd = os.memfd_create("preforkd-scoreboard")
        os.ftruncate(fd, SPAN)
        return cls._named(name, mmap.mmap(fd, SPAN), fd)

    @classmethod
    def private(cls, name: str) -> Self:
        """Make an empty scoreboard that only this process and those that it forks can see."""
        return cls._named(name, mmap.mmap(-1, SPAN), -1)

    @classmethod
    def _named(cls, name: str, mapped: mmap.mmap, fd: int) -> Self:
        board = cls(mapped, fd)
        board.name = name
        board.write_directory()
        return board

    @classmethod
    def attach(cls, fd: int) -> Self:
        """The scoreboard that somebody else has made. Raises ValueError when it is none, or of another version."""
        if os.fstat(fd).st_size != SPAN:
            raise ValueError(f"descriptor {fd} is no scoreboard of version {VERSION}")
        board = cls(mmap.mmap(fd, SPAN), fd)
        board.refresh()
        return board

    def refresh(self) -> None:
        """Take notice of what has been added or has gone since the last time. For readers."""
        if self.daemon[LAYOUT] == self._layout:
            return
        text = b""
        while self.daemon[LAYOUT] != self._layout:  # or else the master has begun to write over what we have read
            self._layout = self.daemon[LAYOUT]
            text = bytes(self._directory(self._layout))
        directory = json.loads(text.partition(b"\0")[0])
        if directory["version"] != VERSION:
            raise ValueError(f"scoreboard of version {directory['version']}, this program reads version {VERSION}")
        self.name, self._end = directory["name"], directory["end"]
        entries = [Entry(**fields) for fields in directory["services"]]
        self._entries = {entry.service: entry for entry in entries}
        self.services = {entry.service: Service(self, entry) for entry in entries if not entry.is_gone}

    def row_at(self, at: int) -> memoryview:
        """The row that begins at this word of the file."""
        return self.words[at : at + ROW_WORDS]

    # For the master only.

    def add(self, service: str) -> Service:
        """The words of a service: new ones, or those that it had when it was here before. Rows come with their use."""
        entry = (
            self._entries.pop(service, None) or self._recycled(service) or Entry(service, self._block(SERVICE_WORDS))
        )
        entry.is_gone = False
        self._entries[service] = entry
        self.services[service] = Service(self, entry)
        self.write_directory()
        return self.services[service]

    def _recycled(self, service: str) -> Entry | None:
        """The blocks of a service that has gone, when too many are remembered, with nothing in them."""
        gone = [entry for entry in self._entries.values() if entry.is_gone]
        if len(gone) < MOST_GONE:
            return None
        old = self._entries.pop(gone[0].service)
        blocks = [(old.words, SERVICE_WORDS), *((at, number * ROW_WORDS) for at, number in old.rows)]
        for at, length in blocks:
            self.words[at : at + length] = memoryview(bytes(length * WORD)).cast("Q")
        return Entry(service, old.words, [("", at) for _, at in old.listeners], old.rows)

    def lacks_room(self, services: Mapping[str, Sequence[str]]) -> str | None:
        """Why these services cannot be described with their listeners, if they cannot. Asked before they are added."""
        entries = {name: asdict(entry) for name, entry in self._entries.items()}
        for name, urls in services.items():
            entry = entries.setdefault(name, asdict(Entry(name, SPAN, rows=[(SPAN, FEWEST_ROWS)])))
            known = [url for url, _ in entry["listeners"]]
            entry["listeners"] += [(url, SPAN) for url in urls if url not in known]
        length = len(json.dumps(list(entries.values()))) + len(json.dumps(self.name)) + _HEADING
        if length < DIRECTORY:
            return None
        return f"{len(services)} services with their addresses need {length} bytes of description, not {DIRECTORY}"

    def remove(self, service: str) -> None:
        """Show the service no more. What it has counted stays."""
        entry = self._entries[service] = self._entries.pop(service)  # of those gone the first has gone the longest ago
        entry.is_gone = True
        del self.services[service]
        self.write_directory()

    def list_listeners(self, service: str, urls: Sequence[str]) -> None:
        """Have words for exactly these listeners of a service; a listener that stays keeps what it has counted."""
        entry = self._entries[service]
        kept = dict(entry.listeners)
        free = [at for url, at in entry.listeners if url not in urls]
        blocks = [(url, kept[url]) for url in urls if url in kept]
        for url in dict.fromkeys(urls):
            if url not in kept:
                at = free.pop() if free else self._block(LISTENER_WORDS)
                self.words[at : at + LISTENER_WORDS] = memoryview(bytes(LISTENER_WORDS * WORD)).cast("Q")
                blocks.append((url, at))
        entry.listeners = [*blocks, *(("", at) for at in free)]
        self.write_directory()

    def add_rows(self, number: int) -> tuple[int, int]:
        return self._block(number * ROW_WORDS), number

    def _block(self, words: int) -> int:
        if (self._end + words) * WORD > SPAN:
            raise MemoryError(f"the scoreboard is full: {SPAN} bytes")
        at = self._end
        self._end += words
        return at

    def write_directory(self) -> None:
        """Publish what has changed. Raises MemoryError when the description does not fit."""
        services = [asdict(entry) for entry in self._entries.values()]
        text = json.dumps({"version": VERSION, "name": self.name, "end": self._end, "services": services}).encode()
        if len(text) >= DIRECTORY:
            raise MemoryError(f"{len(self._entries)} services need {len(text)} bytes of description, not {DIRECTORY}")
        self._layout += 1
        self._directory(self._layout)[: len(text) + 1] = text + b"\0"
        self.daemon[LAYOUT] = self._layout

    def _directory(self, layout: int) -> memoryview:
        start = layout % 2 * (DIRECTORY // WORD)
        return self.words[start : start + DIRECTORY // WORD].cast("B")
