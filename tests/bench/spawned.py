"""A process started for the benchmark: what it says, line by line, and its certain end.

Never waits without a deadline, nor signals a process that it did not start and that does not descend from one.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired
from threading import Condition, Thread
from time import monotonic

from tests.bench import procfs

ROOT = Path(__file__).parents[2]
START_PATIENCE = 30.0  # seconds, until a server says that it is ready
WORKER_PATIENCE = 0.1  # and for each worker of many
STOP_PATIENCE = 10.0  # seconds, until a server told to stop is gone, and again until the killed are
TAIL = 15  # lines shown of a server that failed
NOT_INHERITED = ("PREFORKD_", "GUNICORN_", "LISTEN_", "NOTIFY_", "WEB_CONCURRENCY", "PYTHONDONTWRITEBYTECODE")


class CannotRunError(Exception):
    """Something of the benchmark did not start, or did not do its work."""


class Spawned:
    """A running server and its output, standard output and error together, as it comes."""

    def __init__(self, arguments: Sequence[str], bytecode: str) -> None:
        """Start `arguments` from the root of the repository, compiled modules being kept in `bytecode`."""
        self.name = " ".join(arguments)
        self.lines: list[str] = []
        self.ended = False
        self.changed = Condition()
        self.process = Popen(
            arguments,
            cwd=ROOT,
            env=environment(bytecode),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
            process_group=0,  # an interrupt from the terminal is for the benchmark, which then stops its servers
        )
        self.reader = Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Collect lines until nobody can write any more: in a thread, so that no server has to wait."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line.rstrip())
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def wait_for(self, pattern: str, times: int = 1, patience: float = START_PATIENCE) -> re.Match[str]:
        """The match of `pattern` in the `times`-th line that has one; CannotRunError after so many seconds."""

        def matches() -> list[re.Match[str]]:
            return [match for line in self.lines if (match := re.search(pattern, line))]

        with self.changed:
            self.changed.wait_for(lambda: self.ended or len(matches()) >= times, patience)
            found = matches()
        if len(found) < times:
            raise CannotRunError("\n".join([f"no {pattern!r} from: {self.name}", *self.lines[-TAIL:]]))
        return found[times - 1]

    def stop(self) -> None:
        """Ask it to stop, and see to it that it and all below it are gone; say so if that took force."""
        below = [fd for pid in procfs.descendants(self.process.pid) if (fd := pidfd(pid)) is not None]
        try:
            self.process.terminate()
            if status := self.process.wait(STOP_PATIENCE):
                complain(f"left with status {status} when asked to stop: {self.name}")
        except TimeoutExpired:
            complain(f"had to be killed: {self.name}")
            self.process.kill()
            self.process.wait()
        finally:
            deadline = monotonic() + STOP_PATIENCE
            if left := sum(not gone(fd, deadline) for fd in below):
                complain(f"left {left} processes running: {self.name}")
            self.reader.join(STOP_PATIENCE)
            if self.process.stdout is not None and not self.reader.is_alive():
                self.process.stdout.close()


def environment(bytecode: str) -> dict[str, str]:
    """Ours, without what would set up a server behind our back; modules are compiled once for every side."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return kept | {"PYTHONPYCACHEPREFIX": bytecode, "XDG_RUNTIME_DIR": bytecode}


def pidfd(pid: int) -> int | None:
    """A descriptor that stays with this process even when its number is given to another one."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def gone(fd: int, deadline: float) -> bool:
    """Whether the process has left by itself until then; it is killed otherwise. Closes `fd`."""
    try:
        if select.select([fd], [], [], max(0.0, deadline - monotonic()))[0]:
            return True
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        return False
    finally:
        os.close(fd)


def complain(text: str) -> None:
    sys.stderr.write(f"bench: {text}\n")


@contextmanager
def spawned(arguments: Sequence[str], bytecode: str) -> Iterator[Spawned]:
    """A server that runs as long as the block."""
    server = Spawned(arguments, bytecode)
    try:
        yield server
    finally:
        server.stop()
