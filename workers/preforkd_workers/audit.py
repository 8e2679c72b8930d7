"""The fork-safety audit: what a target has left in its mold that a fork does not copy, or that all workers would share.

Two snapshots of this process are compared, one from before the import and one from after it, so that what was there
already (listeners, scoreboard, channel, log) is nobody's hazard. It looks only: it opens no file, since to close one
would drop the locks that this process has on it (fcntl(2)), and it reads from no socket.
"""

import _socket
import os
import re
import select
import socket
import stat
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

from msgspec import Struct

from preforkd_workers.explanation import TargetError
from preforkd_workers.urls import SCHEMES, with_port

# How long a thread that has been joined may still be in the kernel's list of tasks, in seconds.
LAST_BREATH = 0.25

_ELSEWHERE = "in on_worker_start or at the first request, or set preload = false"

# Every hazard: the event, what its names are called, and what to do.
HAZARDS = {
    "mold_has_threads": (
        "threads",
        f"a fork copies none of them, but the locks they hold: start them {_ELSEWHERE}",
    ),
    "mold_has_native_threads": (
        "native_threads",
        "a library runs them, and a fork copies none, but the locks they hold: limit it to one thread "
        f"(OPENBLAS_NUM_THREADS=1, say), use it {_ELSEWHERE}",
    ),
    "mold_has_sockets": (
        "sockets",
        f"all workers would send and receive on the same one: open it {_ELSEWHERE}; or close it in on_mold",
    ),
    "mold_has_databases": (
        "databases",
        f"a connection must not be carried across a fork (sqlite.org/howtocorrupt.html): open it {_ELSEWHERE}; "
        "or close it in on_mold",
    ),
    "mold_has_event_loop": (
        "descriptors",
        f"such make up an event loop, and all workers would share them: make it {_ELSEWHERE}",
    ),
}

# Who is usually met at a port, so that a line in the log says at once what was opened.
_PORTS = {1433: "SQL Server", 1521: "Oracle", 3306: "MySQL", 5432: "PostgreSQL", 5672: "AMQP", 6379: "Redis"}
_PORTS |= {9042: "Cassandra", 11211: "memcached", 27017: "MongoDB"}

# What a kind of worker begins anew by itself, after the fork: gevent its loop and its threads (gevent.reinit).
_MADE_ANEW = {"gevent": ("mold_has_native_threads", "mold_has_event_loop")}

# Beside a database of SQLite while it is written to (sqlite.org/tempfiles.html).
_COMPANIONS = "-journal", "-wal"


class Hazard(Struct, frozen=True):
    """One kind of hazard, and what was found of it."""

    event: str
    names: tuple[str, ...]

    @property
    def fields(self) -> dict[str, object]:
        """What the event says."""
        label, advice = HAZARDS[self.event]
        return {label: ", ".join(self.names), "advice": advice}

    def __str__(self) -> str:
        label, advice = HAZARDS[self.event]
        return f"{label.replace('_', ' ')} after the import: {', '.join(self.names)} ({advice})"


class Snapshot(Struct, frozen=True):
    """The threads and the descriptors of this process at one moment."""

    threads: Mapping[int, str]  # Python's, but the main one: native id and name
    tasks: Mapping[int, str]  # all others that the kernel has: thread id and name, proc(5)
    descriptors: Mapping[int, str]  # number, and what it is as in /proc/self/fd

    @classmethod
    def take(cls) -> "Snapshot":
        others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        threads = {thread.native_id or 0: thread.name for thread in others}
        return cls(threads, _tasks({os.getpid(), *threads}), _descriptors())


def _tasks(known: set[int]) -> dict[int, str]:
    """The threads of this process that nobody knows of."""
    found = {}
    ours = _name_of(os.getpid())
    for number in {*map(int, os.listdir("/proc/self/task"))} - known:
        with suppress(OSError):  # it has ended
            name = _name_of(number)
            found[number] = "unnamed" if name == ours else name  # it has ours when nobody gives it one, prctl(2)
    return found


def _name_of(task: int) -> str:
    with open(f"/proc/self/task/{task}/comm") as file:
        return file.read().strip()


def _descriptors() -> dict[int, str]:
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one with which we have listed them
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def audit(before: Snapshot, kind: str) -> list[Hazard]:
    """What has come since then and will not do in several processes, for workers of this kind."""
    anew = _MADE_ANEW.get(kind, ())
    now = Snapshot.take() if "mold_has_native_threads" in anew else _settled(before)
    found: dict[str, list[str]] = {event: [] for event in HAZARDS}
    found["mold_has_threads"] = [name for number, name in now.threads.items() if number not in before.threads]
    found["mold_has_native_threads"] = [name for number, name in now.tasks.items() if number not in before.tasks]
    for number, link in _new_descriptors(before.descriptors, now.descriptors).items():
        with suppress(OSError):  # a thread has closed it
            event, name = _judge(number, link, now.descriptors)
            if event:
                found[event].append(name)
    return [Hazard(event, _counted(names)) for event, names in found.items() if names and event not in anew]


def refusal(hazards: list[Hazard]) -> TargetError:
    """With ``fork_safety = "refuse"``: why no worker is forked."""
    return TargetError("not safe to fork: " + "\n".join(map(str, hazards)))


def _counted(names: list[str]) -> tuple[str, ...]:
    """A pool of threads by its name and number."""
    return tuple(name if number == 1 else f"{name} ({number})" for name, number in Counter(names).items())


def _settled(before: Snapshot) -> Snapshot:
    """A snapshot without threads that are about to end: ``Thread.join`` does not wait for the kernel's part of it."""
    end = monotonic() + LAST_BREATH
    now = Snapshot.take()
    while now.tasks.keys() - before.tasks.keys() and monotonic() < end:
        select.select([], [], [], 0.005)  # nothing tells of the end of a thread (pidfd_open(2): from Linux 6.9 on)
        now = Snapshot.take()
    return now


def _new_descriptors(before: Mapping[int, str], now: Mapping[int, str]) -> dict[int, str]:
    """Those that were not there under any number: a server has its listener under another one than we had."""
    known = {link for link in before.values() if not link.startswith("anon_inode:")}  # all of a kind are called alike
    return {number: link for number, link in now.items() if before.get(number) != link and link not in known}


def _judge(number: int, link: str, descriptors: Mapping[int, str]) -> tuple[str | None, str]:
    """Which event this descriptor belongs to, if any, and what to call it."""
    kind, _, rest = link.partition(":")
    if kind == "anon_inode":
        return ("mold_has_event_loop" if _is_of_a_loop(rest) else None), f"{rest.strip('[]')} fd={number}"
    if kind == "pipe":
        return "mold_has_event_loop", f"pipe fd={number}"
    if kind == "socket":
        return _judge_socket(number)
    return ("mold_has_databases" if _is_database(number, link, descriptors) else None), link


def _is_of_a_loop(name: str) -> bool:
    return re.match(r"\[?(eventpoll|eventfd|io_uring|signalfd|timerfd|inotify)", name) is not None


def _judge_socket(number: int) -> tuple[str | None, str]:
    family, type_, where, peer, is_listening = _look_at(number)
    if (family, type_) == (socket.AF_UNIX, socket.SOCK_DGRAM):
        return None, ""  # the system's log or manager: whole messages, and no answer
    if peer is None and (not where or where[1] == 0):
        return None, ""  # nowhere yet
    if family == socket.AF_UNIX and not where and not peer:
        return "mold_has_event_loop", f"socket pair fd={number}"
    kind = SCHEMES.get((family, type_), f"family {family}")
    what = "listening at" if is_listening else "at" if peer is None else "to"
    return "mold_has_sockets", f"{kind} {what} {_shown(peer or where)} fd={number}"


def _look_at(number: int) -> tuple[int, int, Any, Any, bool]:
    """Family, type, address, peer's address or None, and whether it listens."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)  # or the target's socket itself would be put into non-blocking mode
    try:
        copy = _socket.socket(fileno=os.dup(number))  # socket.socket may be gevent's
    finally:
        socket.setdefaulttimeout(patience)
    try:
        is_listening = bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        return copy.family, copy.type, copy.getsockname(), _peer_of(copy), is_listening
    finally:
        copy.close()


def _peer_of(copy: _socket.socket) -> object:
    try:
        return copy.getpeername()
    except OSError:
        return None


def _shown(address: object) -> str:
    """An address as it is written, with the name of who is usually met there."""
    if not isinstance(address, tuple):
        text = os.fsdecode(address) if isinstance(address, bytes) else str(address)
        return text.replace("\0", "@", 1)
    host, port = address[:2]
    known = _PORTS.get(port) if isinstance(port, int) else None
    return with_port(str(host), port) + (f" ({known})" if known else "")


def _is_database(number: int, path: str, descriptors: Mapping[int, str]) -> bool:
    """Whether this is a database of SQLite (sqlite.org/fileformat.html), or one that it is just writing."""
    with suppress(OSError):  # write-only, or not a file of the kind that has an offset
        if stat.S_ISREG(os.fstat(number).st_mode) and os.pread(number, 16, 0) == b"SQLite format 3\0":
            return True
    return any(f"{path}{companion}" in descriptors.values() for companion in _COMPANIONS)
