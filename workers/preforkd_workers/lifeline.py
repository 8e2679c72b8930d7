"""The worker's end of its lifeline, the socket pair between master and worker.

Downwards it carries nothing but its end: end-of-file means stop, be it that the master hung up or that it is gone.
Upwards it carries lines of text: what a worker has to say, and the stacks that faulthandler writes.
"""

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress

from preforkd_workers import prctl
from preforkd_workers.protocol import ABANDONED, FAILED, LEAVING, NOTICE, READY, SHUTDOWN, TRIED, WORN


class Lifeline:
    """Where a worker hears that it must stop, and says that it is ready."""

    def __init__(self, end: socket.socket | None = None) -> None:
        if end is not None:
            self.hold(end)
        self.is_ready = False  # and the master knows it

    def hold(self, end: socket.socket) -> None:
        """Have this end, in the process whose lifeline it is."""
        self._end = end
        self._owner = os.getpid()

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def is_cut(self) -> bool:
        """Whether the master has hung up already."""
        readable, _, _ = select.select([self._end], [], [], 0)
        return bool(readable)

    @property
    def is_broken(self) -> bool:
        """Whether the master is gone: its end is closed, and not only hung up (POLLHUP, unix_poll of the kernel)."""
        poll = select.poll()
        poll.register(self._end, 0)
        return bool(poll.poll(0))

    def ready(self) -> None:
        """Say so, once."""
        if not self.is_ready:
            self.is_ready = True
            self._say(f"{READY} {self._owner}\n")

    def failed(self, reason: str) -> None:
        """Say why this worker could not be made, in one line or many."""
        self._say(f"{FAILED}\n{reason}\n")

    def notice(self, event: str, **fields: object) -> None:
        """Have the master log an event. Never waits: a notice that does not fit is dropped."""
        self._say(f"{NOTICE} {json.dumps([event, fields])}\n")

    def text(self, lines: str) -> None:
        """Have the master log text of many lines, or write it ourselves when there is no master any more."""
        if not self._say(f"{lines}\n"):
            # Nobody reads the log; or we are in a signal handler that has interrupted whoever writes to it.
            with suppress(OSError, ValueError, AttributeError, RuntimeError):
                print(lines, file=sys.stderr, flush=True)  # noqa: T201 - the worker's part of the daemon's log

    def leaving(self) -> None:
        """Say that this worker drains: if it was not the master who told it so, that is news."""
        self._say(f"{LEAVING}\n")

    def worn(self) -> bool:
        """Say that this worker has ended as many requests as it is to. Whether that was heard."""
        return self._say(f"{WORN}\n")

    def abandoned(self) -> None:
        """Say that this worker leaves without those lanes that are past their hard deadline."""
        self._say(f"{ABANDONED}\n")

    def tried(self) -> None:
        """Have the master look at what has come of some more requests."""
        self._say(f"{TRIED}\n")

    def ask_for_shutdown(self) -> None:
        """Ask the process that runs ``serve_forever()`` to leave it."""
        self._say(f"{SHUTDOWN}\n")

    def let_go(self) -> None:
        """Make our own end read end-of-file, as if the master had hung up. Safe in a signal handler."""
        with suppress(OSError):  # not connected any more: the master is gone
            self._end.shutdown(socket.SHUT_RD)

    def _say(self, text: str) -> bool:
        """Say it if somebody listens, and now: whether that was so."""
        with suppress(BrokenPipeError, BlockingIOError, ConnectionResetError):
            self._end.send(text.encode(errors="backslashreplace"), socket.MSG_DONTWAIT)
            return True
        return False


def be_adopted(master: int, middle: int) -> None:
    """Wait until the process ``master`` is our parent, and tie our life to its.

    ``middle``, the process in the middle of the double fork, is our parent until it has exited; the death signal
    (PR_SET_PDEATHSIG) counts for the parent of that moment, so it is set afterwards, and only then the parent is
    checked.
    Raises ProcessLookupError when the parent is another one: the master died meanwhile.
    """
    with suppress(ProcessLookupError):  # it has gone already
        exited = os.pidfd_open(middle)
        if os.getppid() == middle:  # or else the number may be another's by now
            select.select([exited], [], [])  # pidfd_open(2): readable when it has terminated
        os.close(exited)
    prctl.signal_on_parent_death(signal.SIGTERM)
    if os.getppid() != master:
        raise ProcessLookupError(f"the master, pid {master}, is gone")
