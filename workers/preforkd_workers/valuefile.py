"""Files of values, in the format of prometheus_client's multiprocess mode, whose collector merges them into a page.

    | bytes in use: 4 | 4 | entries: length of the key: 4, key, 1 to 8 blanks, value: 8, time: 8 |

A file belongs to a slot and a kind of metric, not to a pid: the next worker in the slot goes on with it. It appears
under its name as a whole, and all its bytes are allocated before they are mapped, for a write to a page that the system
cannot give is a SIGBUS (mmap(2)). Values are aligned words, so one writer needs no lock, and may die at any
instruction. Reading trusts nothing: prometheus_client's own reader would believe any length.
"""

import errno
import json
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator
from functools import lru_cache

# How long a file is when it is made, in bytes; it doubles when it is full.
SHORTEST = mmap.PAGESIZE

# The kinds of gauges that vanish with their process. mark_process_dead of prometheus_client removes the same.
LIVE = tuple(f"gauge_live{mode}" for mode in ("all", "min", "max", "sum", "mostrecent"))

# Where the mold counts what it counts while it imports, in place of a slot.
MOLD = "mold"

_HEADER, _INTEGER = struct.Struct("ii"), struct.Struct("i")
_NAME = re.compile(rf"((?:gauge_)?[a-z]+)_([^_]+)-(?:\d+|{MOLD})\.db")


class Damaged(ValueError):
    """A file that is none of these; the message says why."""


def name_of(kind: str, service: str, slot: int | str) -> str:
    """What the file is called. prometheus_client splits the name at underscores: the service's are encoded."""
    encoded = re.sub(rb"[^A-Za-z0-9.-]", lambda found: b"%%%02X" % ord(found[0]), service.encode())
    return f"{kind}_{encoded.decode()}-{slot}.db"


def kind_of(name: str) -> str:
    """The kind of metric in the file of this name. Raises Damaged when no file of ours is called so."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise Damaged("not a name that we give")
    return found[1]


def read(path: str) -> bytes:
    """The bytes of the file. Raises OSError, and Damaged when it is no regular one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Damaged("not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def entries(data: bytes) -> Iterator[tuple[str, int]]:
    """What each entry is a value of, and where its value is, counted in words of 8 bytes. Raises Damaged."""
    if len(data) < _HEADER.size or len(data) % 8:
        raise Damaged(f"{len(data)} bytes")
    used, at = _INTEGER.unpack_from(data)[0], _HEADER.size
    if not at <= used <= len(data) or used % 8:
        raise Damaged(f"{used} of {len(data)} bytes in use")
    while at < used:
        length = _INTEGER.unpack_from(data, at)[0]
        value = at + 4 + _padded(length)
        if length <= 0 or value + 16 > used:
            raise Damaged(f"a key of {length} bytes")
        yield identity(data[at + 4 : at + 4 + length]), value // 8
        at = value + 16


@lru_cache(1 << 14)
def identity(key: bytes) -> str:
    """What tells values apart: the key but for its help text, which new code may word anew. Raises Damaged."""
    try:
        match json.loads(key):
            case [str() as metric, str() as name, dict() as labels, str()]:
                if all(isinstance(value, str) for value in labels.values()):
                    return json.dumps([metric, name, labels], sort_keys=True)
    except (ValueError, RecursionError):
        pass
    raise Damaged("a key that is none")


def _padded(length: int) -> int:
    return length + 8 - (length + 4) % 8


class ValueFile:
    """A file of values, open to its one writer. Raises OSError when it cannot be had."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.damage = ""  # why the one that was there had to be replaced
        try:
            self._open(read(path))
        except FileNotFoundError:
            self._make()
        except Damaged as damage:
            self.damage = str(damage)
            self._make()

    def _make(self) -> None:
        new = f"{self.path}.new"
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.write(descriptor, _HEADER.pack(_HEADER.size, 0).ljust(SHORTEST, b"\0")) < SHORTEST:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        os.rename(new, self.path)
        self._open(read(self.path))

    def _open(self, data: bytes) -> None:
        self._places = dict(entries(data))
        self._used = _INTEGER.unpack_from(data)[0]
        self._map(len(data))

    def _map(self, size: int) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._mapped, self._size = mmap.mmap(descriptor, size), size
        finally:
            os.close(descriptor)
        self.words = memoryview(self._mapped).cast("d")  # value and time of an entry are neighbours

    def place(self, key: str) -> int:
        """Which word is the value of this key; an entry is added if there is none, and ``words`` may be others then.

        Raises OSError when there is no room for it.
        """
        encoded = key.encode()
        name = identity(encoded)
        if name not in self._places:
            padded = encoded.ljust(_padded(len(encoded)))
            entry = struct.pack(f"i{len(padded)}sdd", len(encoded), padded, 0.0, 0.0)
            while self._used + len(entry) > self._size:
                self._map(self._size * 2)
            self._mapped[self._used : self._used + len(entry)] = entry
            self._used += len(entry)
            self._mapped[:4] = _INTEGER.pack(self._used)  # from here on it is to be seen
            self._places[name] = self._used // 8 - 2
        return self._places[name]
