"""Dev mode: sees which source files of the project are imported, and has each compiled anew every time.

Before it takes compiled bytecode for a source, the import system asks for the source's time, in whole seconds, and size
(importlib.abc.SourceLoader.path_stats). Of two saves within a second, with the same size, it would take the second for
the first. An OSError for an answer means: neither read bytecode nor write it.

Installed in the master, which imports nothing of the project, and inherited by every mold and worker.
"""

import os
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from time import time_ns

_INSTALLED = {"site-packages", "dist-packages"}


def see(writer: int, ours: str) -> None:
    """From now on, write every directory from which a source is imported to this pipe, before the source is read.

    A line for each: nanoseconds since the epoch, a blank, the path. The standard library, installed packages, the
    directory ``ours`` and our own are left as they are.
    """
    path_stats = SourceFileLoader.path_stats
    told: set[str] = set()
    foreign = tuple(f"{each}{os.sep}" for each in (os.path.dirname(os.__file__), os.path.dirname(__file__), ours))

    def own_path_stats(self: SourceFileLoader, path: str) -> object:
        path = os.path.abspath(path)
        if path.startswith(foreign) or _INSTALLED.intersection(path.split(os.sep)):
            return path_stats(self, path)
        directory = os.path.dirname(path)
        if directory not in told:
            told.add(directory)
            _tell(writer, f"{time_ns()} {directory}\n")
        raise OSError("in dev mode every source is compiled anew")

    SourceFileLoader.path_stats = own_path_stats  # type: ignore[assignment, method-assign]


def _tell(writer: int, line: str) -> None:
    with suppress(OSError):  # nobody watches any more
        os.write(writer, os.fsencode(line))
