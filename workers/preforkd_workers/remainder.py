"""What the kernel has queued at a datagram listener when its lanes are told to drain and nobody comes after them.

Who waits in a backlog sees that the listener closes; a datagram is just lost. So before the last lanes leave, they take
what was queued by then, but not what keeps coming: as many as can have been queued at most, and never beyond the time
that they are given.
"""

import select
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from preforkd_workers.adoption import AdoptableSocket
from preforkd_workers.scoreboard import ENDS

_SO_MEMINFO = 55  # asm-generic/socket.h; the first field is SK_MEMINFO_RMEM_ALLOC of linux/sock_diag.h
_SMALLEST = 512  # bytes that an empty datagram takes in a queue, at least: its sk_buff and what belongs to that
_LONGEST_UNIX = "/proc/sys/net/unix/max_dgram_qlen"
_FEW = 64  # where the kernel does not tell


class Remainder:
    """For all lanes of a worker. ``listeners``: the words of its listeners in the scoreboard, as it has servers.

    ``is_deserted``: whether the master is gone, and nobody would come after us.
    """

    def __init__(self, listeners: Sequence[memoryview] = (), is_deserted: Callable[[], bool] = lambda: False) -> None:
        self._listeners = listeners
        self._is_deserted = is_deserted
        self._leave_by = float("inf")  # monotonic

    def leave_within(self, seconds: float) -> None:
        """Take nothing more after so many seconds, or earlier when that was said before."""
        self._leave_by = min(self._leave_by, monotonic() + seconds)

    def take(self, turns: Sequence[tuple[Any, Callable[[], bool]]]) -> None:
        """Take what is queued at each server, by its turn, if it is for us to take."""
        for (server, turn), words in zip(turns, self._listeners, strict=False):
            is_datagram = isinstance(server.socket, AdoptableSocket) and server.socket.type == socket.SOCK_DGRAM
            if is_datagram and (words[ENDS] or self._is_deserted()):
                self._take_from(server.socket, turn)

    def _take_from(self, listener: socket.socket, turn: Callable[[], bool]) -> None:
        poll = select.poll()  # some classes receive in ways of their own, and those wait
        poll.register(listener, select.POLLIN)
        for _ in range(_most_queued(listener)):
            if monotonic() >= self._leave_by or not poll.poll(0) or not turn():
                return


def _most_queued(listener: socket.socket) -> int:
    """How many datagrams can be in the queue now."""
    with suppress(OSError, ValueError):
        if listener.family == socket.AF_UNIX:
            with open(_LONGEST_UNIX) as file:
                return int(file.read()) + 1  # it is full when there are more
        memory: int = struct.unpack_from("=I", listener.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[0]
        return memory // _SMALLEST + 1
    return _FEW
