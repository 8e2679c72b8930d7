"""Where the master's log goes: standard error, or a file that is followed when it is moved away. Never waits."""

import errno
import os
import select
import stat
from collections.abc import Mapping
from contextlib import suppress

from preforkd.formats import Format, Journal, Json, Text
from preforkd_workers.followed import Followed, open_file
from preforkd_workers.sink import Losses, Sink, make_room, unblocked

STDOUT, STDERR = 1, 2


def calm() -> None:
    """Have nobody of ours wait for whoever reads our standard output and error, when those are pipes.

    From here on our descriptors 1 and 2 do not block, and so those of molds, of workers, and of what these run: what a
    library or a program writes there by itself must not stop a worker either. A terminal is left as it is: somebody
    looks at it, and what runs in it wants it as usual.
    """
    for number in (STDOUT, STDERR):
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            make_room(number)
            made = unblocked(number)
            if made != number:
                os.dup2(made, number)
                os.close(made)


class Outlet:
    """``path``: of the file; empty: standard error. Raises OSError when it cannot be opened."""

    def __init__(self, path: str, losses: Losses) -> None:
        self.path = path
        self.file: Followed | None = None
        self._stderr = self._sink = Sink(unblocked(STDERR), losses)
        if path:
            self.file = Followed.opened(path)
            self._sink = Sink(self.file.descriptors[0], losses)

    def write(self, text: str) -> None:
        if self.file is not None:
            with suppress(OSError):  # nobody has made another one yet
                self.file.follow()
        self._sink.write(_encoded(text))

    def takes(self, text: str) -> bool:
        """Write this line, if there is room."""
        return self._sink.takes(_encoded(text))

    def write_to_stderr(self, text: str) -> None:
        self._stderr.write(_encoded(text))

    @property
    def has_room(self) -> bool:
        """Whether something may be written now."""
        poll = select.poll()
        poll.register(self._sink.descriptor, select.POLLOUT)
        return [events for _, events in poll.poll(0)] == [select.POLLOUT]

    def close(self) -> None:
        for sink in {self._sink, self._stderr}:
            if sink.descriptor != STDERR:
                os.close(sink.descriptor)


def _encoded(text: str) -> bytes:
    return f"{text}\n".encode(errors="backslashreplace")


def fault_of(path: str) -> str | None:
    """What is wrong with the path of a log file; it is made if there is none."""
    try:
        os.close(open_file(path))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            return f"{path}: no such directory: {os.path.dirname(path)}"
        return f"{path}: {error.strerror}"
    return None


def doubt_of(path: str) -> str | None:
    """What seems to be wrong with the path of a log file, as far as that can be told without making it."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        return f"{path}: no such directory: {directory}"
    if os.path.isdir(path):
        return f"{path}: {os.strerror(errno.EISDIR)}"
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        return f"{path}: {os.strerror(errno.EACCES)}"
    return None


def format_of(name: str, path: str, environment: Mapping[str, str]) -> tuple[str, Format]:
    """The format of this name, with what ``auto`` is here; and what writes it."""
    is_journal = not path and _is_journal(environment)
    found = ("journal" if is_journal else "text") if name == "auto" else name
    made: dict[str, Format] = {
        "text": Text(has_time=bool(path) or not (is_journal or os.isatty(STDERR))),
        "json": Json(),
        "journal": Journal(),
    }
    return found, made[found]


def _is_journal(environment: Mapping[str, str]) -> bool:
    """Whether our standard error is the journal's (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        found = os.fstat(STDERR)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
