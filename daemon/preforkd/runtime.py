"""Where a daemon's files are at run time: one rule for the daemon that makes them and preforkctl that looks."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from msgspec import Struct

SOCKET = "control.sock"
_SYSTEM = "/run"
_LONGEST_ADDRESS = 107  # bytes, unix(7): sun_path less its terminating NUL


class Place(Struct, frozen=True):
    """Where the control socket is, and whether somebody has said so."""

    path: str
    is_configured: bool  # by the setting
    is_chosen: bool = True  # by the setting, or by who has started us


def directories(name: str, environment: Mapping[str, str]) -> list[str]:
    """Where the files of the daemon of this name may be. The daemon takes the first."""
    # Several, if so configured, and sorted (systemd.exec(5)).
    given = [*filter(None, environment.get("RUNTIME_DIRECTORY", "").split(":"))]
    own = [path for path in given if path.endswith(f"/preforkd/{safe(name)}")] or given[:1]
    return own or [os.path.join(parent, safe(name)) for parent in parents(environment)]


def parents(environment: Mapping[str, str]) -> list[str]:
    """Where the directories of all daemons are: the user's own, then the system's."""
    own = environment.get("XDG_RUNTIME_DIR", "")
    return [os.path.join(parent, "preforkd") for parent in (own, _SYSTEM) if os.path.isabs(parent)]


def control_place(name: str, configured: str, environment: Mapping[str, str]) -> Place:
    """Where the daemon of this name has its control socket; ``configured`` is the setting ``control``."""
    if configured:
        return Place(os.path.abspath(configured), True)
    is_chosen = bool(environment.get("RUNTIME_DIRECTORY"))
    return Place(os.path.join(directories(name, environment)[0], SOCKET), False, is_chosen)


def make_directory(path: str) -> None:
    """Make the directory of one daemon, for its user alone, and the one above it, for all. Raises OSError."""
    before = os.umask(0)
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        if not os.path.isdir(path):
            os.mkdir(path, 0o700)
    finally:
        os.umask(before)


@contextmanager
def address_of(path: str) -> Iterator[str]:
    """A socket address that means ``path``, however long that is: by way of its opened directory (proc(5), fd).

    Raises OSError when there is no such directory.
    """
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield path
        return
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def safe(name: str) -> str:
    """The name as that of a directory: a daemon may be called after a path."""
    return re.sub(r"[^\w.@:-]", "_", name).lstrip(".") or "preforkd"
