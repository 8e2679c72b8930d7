"""Which control socket belongs to a process: for whoever knows a daemon only by the pid that a supervisor has started.

It asks /proc and nobody else, never waits, and needs no settings: the master holds the lock beside its control socket.
Only root and a process's own user may look there (ptrace(2)); a master's name, in its title, is for all to see.
"""

import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice

from msgspec import Struct

from preforkd.runtime import SOCKET, directories

_LOCK = ".lock"  # takeover.py: of a control socket ``path`` the lock is ``path.lock``

# How far we look, so that a program which is none of ours costs little: its processes, and descriptors of each.
_PROCESSES = 8
_DESCRIPTORS = 256

_TITLE = b"preforkd: master "

# The environment but for what is ours alone.
_SHARED = {key: value for key, value in os.environ.items() if key != "RUNTIME_DIRECTORY"}


class NoControl(Exception):
    """There is no control socket to be seen; the message says why."""


class Master(Struct, frozen=True):
    """A master and where it is to be asked."""

    pid: int
    control: str


def master_of(pid: int) -> Master | None:
    """The master that this process is or, if it wraps one (a shell, ``uv run``), has started; None: there is none.

    None as well where we may not look.
    """
    for each in _family(pid):
        with suppress(OSError):  # it has gone
            if (path := _control_of(each)) is not None:
                return Master(each, path)
    return None


def name_of(pid: int) -> str | None:
    """The name of the daemon whose master this process is; None if it is none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            title = file.read(4096)
    except OSError:
        return None
    name = title.removeprefix(_TITLE).rstrip(b"\0 ").decode(errors="replace")
    return name if title.startswith(_TITLE) else None


def control_of(pid: int, name: str) -> str:
    """The control socket of this master; where we may not look, the one at which a daemon of its name has it.

    Raises NoControl.
    """
    try:
        found = _control_of(pid)
    except OSError:  # another user's
        return control_named(name, _SHARED)
    if found is None:
        raise NoControl("it has no control socket")
    return found


def control_named(name: str, environment: Mapping[str, str]) -> str:
    """Where a daemon of this name has its control socket. Raises NoControl when nothing is there."""
    usual = [os.path.join(directory, SOCKET) for directory in directories(name, environment)]
    for path in usual:
        if os.path.exists(path):
            return path
    raise NoControl(f"there is no {' nor '.join(usual)}")


def _family(pid: int) -> Iterator[int]:
    """The process and its descendants, the nearest first."""
    found = deque([pid])
    for _ in range(_PROCESSES):
        if not found:
            return
        yield (each := found.popleft())
        with suppress(OSError), open(f"/proc/{each}/task/{each}/children") as children:
            found.extend(map(int, children.read().split()))


def _control_of(pid: int) -> str | None:
    """The socket beside a lock file that is open here and names this process as the master. Raises OSError."""
    with os.scandir(f"/proc/{pid}/fd") as descriptors:
        for each in islice(descriptors, _DESCRIPTORS):
            with suppress(OSError, ValueError):
                path = os.readlink(each.path)
                control = path.removesuffix(_LOCK)
                is_lock = path.startswith("/") and path != control
                if is_lock and _written_in(path) == pid and stat.S_ISSOCK(os.stat(control).st_mode):
                    return control
    return None


def _written_in(lock: str) -> int:
    """Raises ValueError when it is no pid. Whatever another user has put there is not waited for: a pipe, say."""
    descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return int(os.read(descriptor, 20))
    finally:
        os.close(descriptor)
