"""``preforkd serve --dev``: a process beside the master that has it reload when a source of the project is saved.

The master forks the watcher, and collects it; watching needs threads, which it cannot have. Molds and workers tell the
watcher what they import (``preforkd_workers.imports``); it watches the directories of those files, not the ones below,
and sends the master SIGHUP.
"""

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from time import time_ns
from typing import NoReturn

from preforkd import log, molds, nofile
from preforkd.wakeup import held, name_of
from preforkd_workers import imports, prctl
from preforkd_workers.title import setproctitle

MISSING = "--dev needs the library watchfiles: pip install 'preforkd[dev]'"

# How often the watcher looks whether there is more to watch, in milliseconds.
TICK = 200

# By how much the time of a file may be behind the clock, in nanoseconds: the kernel takes that of its last tick.
COARSE = 20_000_000


def is_possible() -> bool:
    """Whether the library is installed. It is loaded by the watcher only."""
    return find_spec("watchfiles") is not None


class Watcher:
    """The master's side of the watcher: from its fork to its end."""

    def __init__(self, files: Sequence[str]) -> None:
        """Start it. ``files`` are watched beside the sources. Raises OSError when the system refuses."""
        born, master = time_ns(), os.getpid()
        reader, writer = os.pipe()
        with held(signal.valid_signals()):
            pid = os.fork()
            if pid == 0:
                _become_watcher(reader, [*map(os.path.abspath, files)], born, master)
        os.close(reader)
        os.set_blocking(writer, False)
        self.pid: int | None = pid
        molds.KEPT.add(writer)
        imports.see(writer, os.path.dirname(__file__))

    def stop(self) -> None:
        """End it."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None

    def reap(self, pid: int) -> bool:
        """Collect the exit status of this pid, if it is the watcher's. Whether it was."""
        if pid != self.pid:
            return False
        self.pid = None
        exitcode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        how = {"signal": name_of(-exitcode)} if exitcode < 0 else {"status": exitcode}
        log.event("dev_ended", pid=pid, **how, advice="saves are not noticed any more; SIGHUP reloads")
        return True


def _become_watcher(reader: int, files: Sequence[str], born: int, master: int) -> NoReturn:
    """In the child: let go of all that is the master's, and never come back."""
    try:
        molds.close_all_but({0, 1, 2, reader})
        nofile.restore()
        from preforkd_workers import process  # here and not above: the master does without socketserver

        process.reset_signals()
        setproctitle("preforkd: watcher")
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        prctl.signal_on_parent_death(signal.SIGKILL)
        os.set_blocking(reader, False)
        process.leave(lambda: _watch(Directories(reader, files, born), master))
    finally:
        os._exit(1)


def _watch(directories: "Directories", master: int) -> None:
    """Until the master is gone."""
    from watchfiles import PythonFilter, watch

    is_source = PythonFilter()
    while os.getppid() == master:
        is_first = True
        for changes in watch(
            *directories.begin(),
            watch_filter=lambda change, path: is_source(change, path) or path in directories.files,
            rust_timeout=TICK,
            yield_on_timeout=True,
            recursive=False,
        ):
            now = time_ns()
            changed = {path for _, path in changes}
            if is_first:  # and not before, is nothing missed any more
                changed |= directories.changed()
                log.event("dev_watching", directories=" ".join(directories.since))
                is_first = False
            directories.seen(now)
            if changed and os.getppid() == master:
                log.event("dev_changed", files=" ".join(sorted(changed)))
                os.kill(master, signal.SIGHUP)
            if directories.have_changed():
                break


class Directories:
    """What is watched, and until when it is known what has happened there."""

    def __init__(self, reader: int, files: Sequence[str], born: int) -> None:
        self.files = files
        self.since = dict.fromkeys(map(os.path.dirname, files), born)  # by directory: nanoseconds since the epoch
        self._reader = reader
        self._unfinished_line = b""
        self._watched: Mapping[str, object] = {}

    def begin(self) -> Iterable[str]:
        """Those that are there to be watched from now on."""
        self._hear()
        self._watched = self._identities()
        return [*self._watched]

    def changed(self) -> set[str]:
        """The sources that have changed since they were seen, or imported."""
        return {path for directory, since in self.since.items() for path in self._later_than(since - COARSE, directory)}

    def seen(self, now: int) -> None:
        self.since = dict.fromkeys(self.since, now)

    def have_changed(self) -> bool:
        """Whether there are others than those being watched: new ones, or old ones made anew."""
        self._hear()
        return self._identities() != self._watched

    def _hear(self) -> None:
        """What has been imported meanwhile."""
        with suppress(BlockingIOError):
            while said := os.read(self._reader, 1 << 16):
                *lines, self._unfinished_line = (self._unfinished_line + said).split(b"\n")
                for line in lines:
                    since, _, directory = os.fsdecode(line).partition(" ")
                    self.since.setdefault(directory, int(since))

    def _identities(self) -> dict[str, tuple[int, int]]:
        found = {}
        for directory in self.since:
            with suppress(OSError):
                status = os.stat(directory)
                found[directory] = status.st_dev, status.st_ino
        return found

    def _later_than(self, since: int, directory: str) -> Iterable[str]:
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                is_meant = entry.name.endswith(".py") or entry.path in self.files
                if is_meant and entry.stat(follow_symlinks=False).st_ctime_ns > since:
                    yield entry.path
