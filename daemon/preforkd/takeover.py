"""Whether anything of an earlier instance still lives: a lock that every process of ours holds by inheritance.

The lock (flock(2)) belongs to the open file, not to a process: it is held until the last of master, molds and workers
has gone, whatever they died of. Programs that a handler runs do not get it (O_CLOEXEC). A new master waits for that.
"""

import fcntl
import os
import selectors
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic
from typing import Self

from preforkd import log
from preforkd.notify import EXTENSION, Manager
from preforkd.wakeup import WakeUp, release

# The signals that end the wait. They are held before and after it.
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Held(Exception):
    """Somebody of an earlier instance did not leave; the message names them and says what to do."""


class Stopped(Exception):
    """A signal has ended the wait."""


class Namesake(Exception):
    """A daemon of the same name serves; the message says so."""


class Lock:
    """The lock file of a daemon. It holds the pid of the master, for whoever wants to know."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = -1

    @classmethod
    def inherited(cls, descriptor: int, path: str) -> Self:
        """The lock that a master before us under the same pid has taken."""
        os.set_inheritable(descriptor, False)
        lock = cls(path)
        lock.descriptor = descriptor
        return lock

    def acquire(self) -> bool:
        """Take the lock if nobody has it; whether we have it now. Raises OSError when the file cannot be made."""
        while self.descriptor < 0:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            if _inode(descriptor) == _inode(self.path):
                self.descriptor = descriptor
            else:  # its last owner has removed it before we had it
                os.close(descriptor)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, b"%d\n" % os.getpid(), 0)
        return True

    def release(self) -> None:
        """Let go of it, and remove the file unless others of ours still live."""
        if not self.holders():
            with suppress(OSError):
                os.unlink(self.path)
        os.close(self.descriptor)

    def master(self) -> int:
        """The pid of the master that has taken it last; 0 when that is not known."""
        try:
            with open(self.path, "rb") as file:
                return int(file.read(20))
        except (OSError, ValueError):
            return 0

    def holders(self) -> list[int]:
        """The pids of the others who hold it, as far as we may see them (proc(5): fd, and the locks in fdinfo)."""
        inode = _inode(self.path)
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
        return [pid for pid in pids if inode and pid != os.getpid() and _holds(pid, inode)]


def _inode(path: str | int) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _holds(pid: int, inode: tuple[int, int]) -> bool:
    """Whether this process has the file open, and with the lock on it."""
    with suppress(OSError):  # it has gone, or is none of our business
        for number in os.listdir(f"/proc/{pid}/fd"):
            if _inode(f"/proc/{pid}/fd/{number}") == inode:
                with open(f"/proc/{pid}/fdinfo/{number}") as info:
                    if any("FLOCK" in line for line in info):
                        return True
    return False


def take_over(lock: Lock, timeout: float, manager: Manager, *, is_default: bool) -> None:
    """Take the lock; wait at most ``timeout`` seconds for those who have it. Call with the signals held.

    ``is_default``: nobody has chosen the path, so that another daemon may have the same by accident.
    Raises Held, Stopped, Namesake, or OSError when the file cannot be made.
    """
    if lock.acquire():
        return
    pids = lock.holders()
    if is_default and lock.master() in pids:
        raise Namesake(f"pid {lock.master()} is a daemon of the same name")
    began = monotonic()
    manager.extend(timeout + EXTENSION)
    log.event("takeover_waits", pids=_listed(pids), timeout=f"{timeout:g}s", lock=lock.path)
    with _stop_signals() as wakeup:
        while not lock.acquire():
            seen, pids = pids, lock.holders()
            if not pids and not seen:
                advice = "see lslocks(8) as root"
                raise Held(f"processes that this user cannot see still hold {lock.path}; {advice}")
            # Who was seen may have closed it by now, and be about to let go of the lock: that is so when it has exited.
            _wait({*seen, *pids}, began + timeout, wakeup, lock)
    log.event("takeover", seconds=round(monotonic() - began, 1))


def _wait(pids: Collection[int], end: float, wakeup: WakeUp, lock: Lock) -> None:
    """Wait until all of them have gone. Raises Held when that takes too long, and Stopped."""
    with ExitStack() as descriptors, selectors.DefaultSelector() as selector:
        selector.register(wakeup, selectors.EVENT_READ)
        for pid in pids:
            with suppress(ProcessLookupError):
                exited = os.pidfd_open(pid)
                descriptors.callback(os.close, exited)
                selector.register(exited, selectors.EVENT_READ)
        while len(selector.get_map()) > 1:
            gone = selector.select(max(0.0, end - monotonic()))
            if any(key.fileobj is wakeup for key, _ in gone):
                raise Stopped
            if not gone:
                left = _listed(lock.holders())
                advice = "stop it (kill -TERM, or -KILL as the last resort), or raise takeover_timeout"
                raise Held(f"an earlier instance still runs: pids {left} hold {lock.path}; {advice}")
            for key, _ in gone:
                selector.unregister(key.fileobj)


@contextmanager
def _stop_signals() -> Iterator[WakeUp]:
    """Hear the stop signals for a while, and hold them again. Raises Stopped at the end if one has come."""
    wakeup = WakeUp(_STOP)
    release(_STOP)
    try:
        yield wakeup
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
        has_come = bool(wakeup.arrived())
        wakeup.close()
    if has_come:
        raise Stopped


def _listed(pids: Sequence[int]) -> str:
    return ",".join(map(str, pids)) or "unknown"
