"""``sys.stdout`` and ``sys.stderr`` of a mold and of its workers: whole lines for the log, and never a wait.

Both are line-buffered: a worker leaves by ``os._exit``, or is killed, and what it has printed is not lost then. A line
without an end is kept until that comes, or the worker leaves, lest it runs into somebody else's. A stream on a terminal
is left as it is. The same goes for the descriptors 1 and 2 below them, where the log is a file: both lead there.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from preforkd_workers.copies import undo_in_copies
from preforkd_workers.followed import Followed
from preforkd_workers.sink import Losses, Sink
from preforkd_workers.spec import Log

STDOUT, STDERR = 1, 2

# The longest line in bytes that is waited for the end of; and the longest text that is written at once.
LONGEST = 1 << 16

losses = Losses()  # of both


class Lines(io.RawIOBase):
    """What is below such a stream. Its ``write`` takes everything, whatever becomes of it."""

    def __init__(self, number: int, name: str, file: Followed | None) -> None:
        self.name = name
        self.file = file
        self._sink = Sink(number, losses)
        self._keeps, self._unfinished = True, b""

    def write(self, data: object) -> int:
        text = bytes(data)  # type: ignore[call-overload]
        if not self._keeps or (text.endswith(b"\n") and not self._unfinished):  # as it mostly does
            self.write_lines(text)
            return len(text)
        whole, end, self._unfinished = (self._unfinished + text).rpartition(b"\n")
        if end:
            self.write_lines(whole + end)
        if len(self._unfinished) > LONGEST:
            self.finish()
        return len(text)

    def finish(self) -> None:
        """End the line that has no end."""
        if self._unfinished:
            text, self._unfinished = self._unfinished, b""
            self.write_lines(text + b"\n")

    def keep_unfinished(self, wanted: bool) -> None:
        """Whether a line without an end is kept until that comes. What there was of one is somebody else's to write."""
        self._keeps, self._unfinished = wanted, b""

    def write_lines(self, lines: bytes) -> None:
        """Write whole lines, whatever is kept of another."""
        if self.file is not None:
            with suppress(OSError):  # moved away, and the master has not made another one yet
                self.file.follow()
        self._sink.write(lines)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._sink.descriptor

    def isatty(self) -> bool:
        return False


_lines: list[Lines] = []


def take_over(log: Log) -> None:
    """Have the streams of this process write so. To be called before the target is imported, and once."""
    file = None
    if log.file:
        file = Followed(log.file, [STDOUT, STDERR])
        with suppress(OSError):  # gone again: then we follow when it is there
            file.follow()
    for number, name in (STDOUT, "stdout"), (STDERR, "stderr"):
        if not os.isatty(number):
            _lines.append(Lines(number, f"<{name}>", file))
            stream = _stream(_lines[-1], getattr(sys, name))
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    undo_in_copies(_begin_anew)


def _stream(lines: Lines, before: io.TextIOWrapper) -> io.TextIOWrapper:
    stream = io.TextIOWrapper(
        io.BufferedWriter(lines, LONGEST), encoding=before.encoding, errors=before.errors, line_buffering=True
    )
    stream.mode = "w"  # type: ignore[misc]
    return stream


def write(lines: bytes) -> None:
    """Write whole lines to standard error, past the stream."""
    for each in _lines:
        if each.fileno() == STDERR:
            return each.write_lines(lines)
    return Sink(STDERR, losses).write(lines)


def follow() -> None:
    """Let go of a log file that was moved away. Safe in a signal handler."""
    for file in {each.file for each in _lines if each.file is not None}:
        with suppress(OSError):
            file.follow()


def finish() -> None:
    """Nothing more comes: write what has no end, and tell of what was dropped, room or not."""
    for each in _lines:
        each.finish()
    losses.say()


def begin(count: Callable[[int], object], tell: Callable[[int], object]) -> None:
    """In a worker: count what is dropped, and tell of it when there is room again."""
    losses.count, losses.tell = count, tell
    for each in _lines:
        each.keep_unfinished(True)


def _begin_anew() -> None:
    """A child that is no worker of ours does not know when it ends: it keeps nothing."""
    losses.begin_anew()
    for each in _lines:
        each.keep_unfinished(False)
