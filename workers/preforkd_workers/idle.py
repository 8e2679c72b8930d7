"""Connections on which nothing has come for too long: their handlers read end-of-file.

All of it is done in a signal handler. Imported by molds of services that have an ``idle_timeout``, and by nobody else.
"""

import fcntl
import socket
import struct
import termios
from collections.abc import Iterable
from time import monotonic_ns
from typing import Any

from preforkd_workers.reading import end_reading
from preforkd_workers.scoreboard import IDLED, SINCE
from preforkd_workers.tally import Tally

# Where the kernel says how long ago the last data came, in milliseconds (struct tcp_info, tcpi_last_data_recv).
_TCP_INFO_BYTES, _LAST_DATA_RECV = 104, 52

_NOTHING_WAITS = struct.pack("i", 0)


class HeardSocket(socket.socket):
    """A connection that notes when something was read from it: of a Unix socket the kernel does not tell."""

    heard_ns = 0  # on the monotonic clock

    def recv(self, *arguments: Any) -> Any:
        return self._note(super().recv(*arguments))

    def recv_into(self, *arguments: Any, **keywords: Any) -> Any:
        return self._note(super().recv_into(*arguments, **keywords))

    def recvfrom(self, *arguments: Any) -> Any:
        return self._note(super().recvfrom(*arguments))

    def recvfrom_into(self, *arguments: Any, **keywords: Any) -> Any:
        return self._note(super().recvfrom_into(*arguments, **keywords))

    def recvmsg(self, *arguments: Any) -> Any:
        return self._note(super().recvmsg(*arguments))

    def recvmsg_into(self, *arguments: Any) -> Any:
        return self._note(super().recvmsg_into(*arguments))

    def _note(self, received: Any) -> Any:
        self.heard_ns = monotonic_ns()
        return received


class Idle:
    """Ends the reading side of connections on which nothing has come for ``timeout`` seconds, each once."""

    def __init__(self, tallies: Iterable[Tally], timeout: float) -> None:
        self.tallies = tallies
        self.timeout_ns = int(timeout * 1e9)
        self._ended: set[tuple[int, int]] = set()  # by identity and since when: those who have had it

    def look(self) -> None:
        """Look at every request that has been held for so long. In a signal handler."""
        now, ended = monotonic_ns(), set()
        for tally in self.tallies:
            if not 0 < tally.row[SINCE] <= now - self.timeout_ns:
                continue
            for request, since in tally.held_since():
                key = id(request), since
                if key in self._ended:
                    ended.add(key)
                elif 0 < since <= now - self.timeout_ns and self._end_if_silent(request):
                    ended.add(key)
                    tally.row[IDLED] += 1
        self._ended = ended

    def _end_if_silent(self, request: Any) -> bool:
        try:
            return silence_ns(request) >= self.timeout_ns and end_reading(request)
        except (OSError, AttributeError, TypeError):  # closed by now, or no stream, or something of the target's own
            return False


def silence_ns(request: Any) -> int:
    """For how long nothing has come from the client, as far as can be told; 0 where it cannot.

    Raises OSError, AttributeError or TypeError for a request that is no open connection.
    """
    if request.family != socket.AF_UNIX:
        told = request.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        return int(struct.unpack_from("I", told, _LAST_DATA_RECV)[0]) * 1_000_000
    if not isinstance(request, HeardSocket):
        return 0
    waits = fcntl.ioctl(request.fileno(), termios.FIONREAD, _NOTHING_WAITS)
    return monotonic_ns() - request.heard_ns if waits == _NOTHING_WAITS else 0
