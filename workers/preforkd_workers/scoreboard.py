"""The scoreboard: a memfd of 64-bit words that tells anyone who maps it what every lane is doing.

One writer per word, so there is no lock and a process may die at any instruction. A row belongs to a lane of a
slot, not to a pid: the next worker in the slot goes on counting where the last one was killed. While nobody lives
in a slot, the master owns its rows. Workers of other generations may have other numbers of lanes: a slot has rows for
each such number that it was ever used with. Words are stored through ``memoryview.cast("Q")``: one aligned store,
never torn (``struct.pack_into`` writes byte by byte and is, which is good enough for texts).

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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from struct import pack_into
from typing import Any, Self

from msgspec import Struct, field
from msgspec.structs import asdict, replace

VERSION = 3
WORD = 8
SPAN = 1 << 26  # bytes
MOST_LANES = 1 << 17  # of all workers that the settings want: their rows leave room for others while they are replaced
DIRECTORY = 1 << 16  # bytes

# The daemon's words, written by the master. Times are nanoseconds since the epoch, durations nanoseconds.
STARTED_AT, HEARTBEAT, LAYOUT, RELOADED_AT, RELOAD_NS, RELOADS = range(6)  # RELOADS: the first of one word per result
LOG_DROPPED = 15  # lines of the log, the master's own and those of molds
RELOAD_FAILED = 14  # 1 when the last reload was not done
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
GENERATION, SIZE, LIMIT, SPAWNS, KILLED, REAPED_CPU_NS, EXITS = range(7)  # EXITS: the first of one word per cause
SERVICE_WORDS = 32
CAPACITY = SERVICE_WORDS - 1  # how many requests it may hold at a time, where that closes the door; 0: not known
HELD_BACK = SERVICE_WORDS - 2  # how many slots are left empty for a while

# A listener's words, written by the master. ENDS: 1 when nobody serves it once the lanes that do have left.
BACKLOG, BACKLOG_LIMIT, DROPS, ENDS = range(4)
LISTENER_WORDS = 8

# A lane's row, written by the lane; the first three words only in the first row of a worker, for all of them. SINCE and
# DEADLINE are on the monotonic clock, in nanoseconds, and 0 when it holds no request; LISTENER, CLIENT and the texts at
# PEER and MARK are of the request that it holds, or held last.
PID, ROW_GENERATION, STATE, SINCE, DEADLINE, LISTENER, CLIENT = range(7)
BEGUN, OK, ERRORS, REFUSED, LIMITED, FULL, IDLED, TRUNCATED, BUSY_NS = range(7, 16)
BUCKETS = 16  # the first of one word per bucket
PEER, MARK, UNWRITTEN, UNLOGGED, THREAD, ROW_WORDS = 33, 39, 45, 46, 47, 48
# UNWRITTEN: lines of the access log that were dropped, UNLOGGED: of the log, both in the first row of a worker. THREAD:
# which one the lane is, as faulthandler names it; 0: none.
TEXT = 48  # bytes of PEER, and of MARK
FEWEST_ROWS = 16  # that are added at a time, and
MOST_ROWS = 4096  # unless one slot has more
MOST_GONE = 32  # services whose words stay although they are not there any more

# What STATE may say. Busy is not among them: a lane is busy while it has begun more requests than it has ended.
EMPTY, STARTING, SERVING, DRAINING = range(4)

# Upper bounds of the latency histogram in nanoseconds; one more bucket takes the rest.
BOUNDS_NS = tuple(
    int(seconds * 1e9)
    for seconds in (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
)


# The longest levels of loggers in a description, in bytes; and what frames the entries in it, with that, and with some
# room for pools that grow.
LEVELS_LENGTH = 1 << 12
_HEADING = (1 << 10) + LEVELS_LENGTH


def ended(row: memoryview) -> int:
    """Number of requests that this row has seen through to an outcome."""
    return int(row[OK] + row[ERRORS] + row[REFUSED])


def write_text(row: memoryview, word: int, text: str) -> None:
    """Have a text at PEER or MARK, as much of it as fits."""
    pack_into("48s", row, word * WORD, text.encode(errors="replace"))


def read_text(row: memoryview, word: int) -> str:
    return bytes(row[word : word + TEXT // WORD]).partition(b"\0")[0].decode(errors="replace")


class Rows:
    """The rows of neighbours: of the lanes of a slot, or of many slots."""

    def __init__(self, words: memoryview) -> None:
        self.words = words

    @classmethod
    def blank(cls, lanes: int = 1) -> Self:
        """Rows of their own, shared with children forked later, for a server that has no scoreboard."""
        return cls(memoryview(mmap.mmap(-1, lanes * ROW_WORDS * WORD)).cast("Q"))

    def __len__(self) -> int:
        return len(self.words) // ROW_WORDS

    def __getitem__(self, lane: int) -> memoryview:
        if not 0 <= lane < len(self):
            raise IndexError(f"no row {lane} of {len(self)}")
        return self.words[lane * ROW_WORDS : (lane + 1) * ROW_WORDS]

    def __iter__(self) -> Iterator[memoryview]:
        return (self[lane] for lane in range(len(self)))

    def column(self, word: int) -> memoryview:
        """This word of every row."""
        return self.words[word::ROW_WORDS]

    def total(self, *words: int) -> int:
        return sum(sum(self.column(word)) for word in words)

    @property
    def ended(self) -> int:
        """Number of requests that they have seen through to an outcome."""
        return self.total(OK, ERRORS, REFUSED)

    @property
    def busy(self) -> int:
        """How many of them hold a request."""
        return sum(map(bool, self.column(SINCE)))

    @property
    def oldest(self) -> int:
        """Since when the one is held that they have held for the longest, on the monotonic clock in ns; 0: none is."""
        return min(filter(None, self.column(SINCE)), default=0)

    def settle(self) -> int:
        """Take over the rows of dead lanes: empty them, and return how many requests died with them."""
        return sum(map(_settle, self))


def _settle(row: memoryview) -> int:
    killed = max(0, row[BEGUN] - ended(row))  # whatever its owner has written there
    row[BEGUN] = ended(row)
    row[STATE], row[PID], row[SINCE], row[DEADLINE] = EMPTY, 0, 0, 0
    return int(killed)


class Entry(Struct):
    """A service's entry in the directory: where its blocks begin, counted in words from the start of the file."""

    service: str
    words: int
    listeners: list[tuple[str, int]] = field(default_factory=list)  # url; an empty one is a block to be used again
    rows: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # of each block: where, how many slots, lanes of each
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

    def place(self, slot: int, lanes: int) -> int:
        """Where the rows of a slot with so many lanes begin. Raises IndexError when it has none yet."""
        for at, slots, of_each in self.entry.rows:
            if of_each != lanes:
                continue
            if slot < slots:
                return at + slot * lanes * ROW_WORDS
            slot -= slots
        raise IndexError(f"{self.entry.service} has no rows for {slot} slots more")

    def rows(self, slot: int, lanes: int = 1) -> Rows:
        """The rows of a slot. Raises IndexError when it has none yet."""
        return self.board.rows_at(self.place(slot, lanes), lanes)

    def blocks(self) -> Iterator[Rows]:
        """All rows, used or not."""
        return (self.board.rows_at(at, slots * lanes) for at, slots, lanes in self.entry.rows)

    def slots(self) -> Iterator[tuple[int, Rows]]:
        """All rows, used or not, those of each slot together, with its number."""
        before: Counter[int] = Counter()  # slots with so many lanes each, in the blocks so far
        for at, slots, lanes in self.entry.rows:
            for slot in range(slots):
                yield before[lanes] + slot, self.board.rows_at(at + slot * lanes * ROW_WORDS, lanes)
            before[lanes] += slots

    def use(self, slot: int, lanes: int = 1) -> int:
        """Where the rows of a slot begin, after making room for them if there is none yet. For the master only.

        Raises MemoryError when the scoreboard is full.
        """
        try:
            return self.place(slot, lanes)
        except IndexError:
            has = sum(slots for _, slots, of_each in self.entry.rows if of_each == lanes)
            slots = max(slot + 1 - has, min(has, MOST_ROWS // lanes), FEWEST_ROWS // lanes)
            self.entry.rows.append((self.board.add_words(slots * lanes * ROW_WORDS), slots, lanes))
        try:
            self.board.write_directory()
        except MemoryError:
            self.entry.rows.pop()
            raise
        return self.place(slot, lanes)


class Scoreboard:
    """The mapped file. Made by the master before anything is forked; attached to by descriptor elsewhere."""

    def __init__(self, mapped: mmap.mmap, fd: int = -1) -> None:
        self.fd = fd
        self.words = memoryview(mapped).cast("Q")
        self.daemon = self.words[_FIRST_BLOCK - DAEMON_WORDS : _FIRST_BLOCK]
        self.name = ""
        self.user_metrics = ""  # directory of the files with metrics of the user's own; empty: there is none
        self.log_levels: dict[str, int] = {}  # of loggers of the target, by name
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
        self._layout, directory = self._published()
        if directory["version"] != VERSION:
            raise ValueError(f"scoreboard of version {directory['version']}, this program reads version {VERSION}")
        self.name, self._end = directory["name"], directory["end"]
        self.user_metrics = directory.get("user_metrics", "")
        self.log_levels = directory.get("log_levels", {})
        entries = [Entry(**fields) for fields in directory["services"]]
        self._entries = {entry.service: entry for entry in entries}
        self.services = {entry.service: Service(self, entry) for entry in entries if not entry.is_gone}

    def _published(self) -> tuple[int, dict[str, Any]]:
        """The directory as it is now, and its number."""
        layout, text = -1, b""
        while self.daemon[LAYOUT] != layout:  # or else the master has begun to write over what we have read
            layout = self.daemon[LAYOUT]
            text = bytes(self._directory(layout))
        return layout, json.loads(text.partition(b"\0")[0])

    def levels_now(self) -> tuple[int, dict[str, int]]:
        """The levels of loggers as they are now, and the number of the directory that says so.

        What else this object knows stays as it is: a lane may be about to refresh that.
        """
        layout, directory = self._published()
        return layout, directory.get("log_levels", {})

    def rows_at(self, at: int, number: int) -> Rows:
        """As many rows, the first of which begins at this word of the file."""
        return Rows(self.words[at : at + number * ROW_WORDS])

    # For the master only.

    def keep_user_metrics(self, directory: str) -> None:
        """Say where the metrics of the user's own are."""
        self.user_metrics = directory
        self.write_directory()

    def keep_log_levels(self, levels: Mapping[str, int]) -> None:
        """Say which levels loggers are to have. Raises MemoryError when that does not fit."""
        before, self.log_levels = self.log_levels, dict(levels)
        try:
            self.write_directory()
        except MemoryError:
            self.log_levels = before
            raise

    def add(self, service: str) -> Service:
        """The words of a service: new ones, or those that it had when it was here before. Rows come with their use."""
        entry = (
            self._entries.pop(service, None) or self._recycled(service) or Entry(service, self.add_words(SERVICE_WORDS))
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
        blocks = [(old.words, SERVICE_WORDS), *((at, slots * lanes * ROW_WORDS) for at, slots, lanes in old.rows)]
        for at, length in blocks:
            self.words[at : at + length] = memoryview(bytes(length * WORD)).cast("Q")
        return Entry(service, old.words, [("", at) for _, at in old.listeners], old.rows)

    def lacks_room(self, services: Mapping[str, Sequence[str]]) -> str | None:
        """Why these services cannot be described with their listeners, if they cannot. Asked before they are added."""
        entries = dict(self._entries)
        for name, urls in services.items():
            entry = entries.get(name) or Entry(name, SPAN, rows=[(SPAN, FEWEST_ROWS, FEWEST_ROWS)])
            known = [url for url, _ in entry.listeners]
            added = [(url, SPAN) for url in urls if url not in known]
            entries[name] = replace(entry, listeners=entry.listeners + added)
        words = json.dumps([self.name, self.user_metrics, *map(asdict, entries.values())])
        length = len(words) + _HEADING
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
        blocks = []  # in the order of the listeners, which is how lanes number them
        for url in dict.fromkeys(urls):
            if url in kept:
                blocks.append((url, kept[url]))
            else:
                at = free.pop() if free else self.add_words(LISTENER_WORDS)
                self.words[at : at + LISTENER_WORDS] = memoryview(bytes(LISTENER_WORDS * WORD)).cast("Q")
                blocks.append((url, at))
        entry.listeners = [*blocks, *(("", at) for at in free)]
        self.write_directory()

    def add_words(self, words: int) -> int:
        """Where a block of so many words begins. Raises MemoryError when the scoreboard is full."""
        if (self._end + words) * WORD > SPAN:
            raise MemoryError(f"the scoreboard is full: {SPAN} bytes")
        at = self._end
        self._end += words
        return at

    def write_directory(self) -> None:
        """Publish what has changed. Raises MemoryError when the description does not fit."""
        services = [asdict(entry) for entry in self._entries.values()]
        about = {"version": VERSION, "name": self.name, "end": self._end, "user_metrics": self.user_metrics}
        text = json.dumps({**about, "log_levels": self.log_levels, "services": services}).encode()
        if len(text) >= DIRECTORY:
            raise MemoryError(f"{len(self._entries)} services need {len(text)} bytes of description, not {DIRECTORY}")
        self._layout += 1
        self._directory(self._layout)[: len(text) + 1] = text + b"\0"
        self.daemon[LAYOUT] = self._layout

    def _directory(self, layout: int) -> memoryview:
        start = layout % 2 * (DIRECTORY // WORD)
        return self.words[start : start + DIRECTORY // WORD].cast("B")
