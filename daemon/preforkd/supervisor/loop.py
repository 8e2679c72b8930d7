"""A question to a daemon, asked in supervisord's own loop: that has one thread, which nothing in here makes wait.

The connection is one of those that supervisord's one wait is for, so the answer wakes it.
"""

import json
import socket
import struct
import traceback
from collections.abc import Mapping
from time import monotonic
from typing import Any

from supervisor.medusa import asyncore_25 as asyncore

from preforkd.runtime import address_of
from preforkd.supervisor.supervised import Master

VERSION = 1  # of the protocol

# What a daemon may say before and with its answer, in bytes: the status of 4096 workers has half a million.
LONGEST_ANSWER = 1 << 22

# A question that nobody has looked after for so many seconds and turns of the loop has lost its client. Turns as well,
# for supervisord may have been stopped.
FORGOTTEN = 5.0
FORGOTTEN_TURNS = 5

LOST = "it has hung up before it answered"


class Conversation:
    """One request, and what becomes of it. What stands below ``end`` is called by supervisord's loop."""

    def __init__(self, master: Master, do: str, arguments: Mapping[str, object]) -> None:
        """Raises OSError; BlockingIOError when the daemon has not accepted those who came before."""
        request = json.dumps({"v": VERSION, "do": do, **arguments}).encode() + b"\n"
        self.began = self._looked_at = monotonic()
        self._turns = 0  # since then
        self.answer: dict[str, Any] | None = None
        self.line = ""  # the answer as it came: JSON, in ASCII
        self.fault = ""  # why there is none
        self.is_over = False
        self._received = bytearray()
        self._socket = _connected(master)
        self._fileno = self._socket.fileno()
        try:  # a line is short, and nothing else waits there to be read
            self._socket.send(request)
        except OSError:
            self._socket.close()
            raise
        asyncore.socket_map[self._fileno] = self

    def look(self) -> bool:
        """Whether it is over. To be asked every now and then, by whoever still wants to know."""
        self._looked_at, self._turns = monotonic(), 0
        return self.is_over

    def end(self, fault: str = "") -> None:
        """Hang up. What was asked for goes on without us."""
        if not self.is_over:
            self.is_over, self.fault = True, fault
            del asyncore.socket_map[self._fileno]
            self._socket.close()
            _have_answers_looked_at()

    def readable(self) -> bool:
        """Asked on every turn of the loop."""
        self._turns += 1
        if self._turns > FORGOTTEN_TURNS and monotonic() > self._looked_at + FORGOTTEN:
            self.end("nobody waits for the answer")
        return not self.is_over

    def writable(self) -> bool:
        return False

    def handle_write_event(self) -> None:
        """Never: all has been sent."""

    def handle_read_event(self) -> None:
        try:
            received = b"" if self.is_over else self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except ConnectionResetError:
            received = b""
        if not received:
            self.end(LOST)
            return
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._hear(line)
        if len(self._received) > LONGEST_ANSWER:
            self.end(f"its answer is longer than {LONGEST_ANSWER} bytes")

    def _hear(self, line: bytearray) -> None:
        said = json.loads(line)
        if "event" not in said and not self.is_over:  # events: what happens meanwhile
            self.answer, self.line = said, line.decode("ascii", "backslashreplace")
            self.end()

    def handle_error(self) -> None:
        """One of the above has raised."""
        self.end(f"a fault of ours: {traceback.format_exc().splitlines()[-1]}")


def _connected(master: Master) -> socket.socket:
    """A connection to this very process, whoever is at that path otherwise. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with address_of(master.control) as address:
            made.connect(address)
        pid, _, _ = struct.unpack("=iII", made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if pid != master.pid:
            raise ConnectionRefusedError(0, f"pid {pid} is there, not {master.pid}")
    except OSError:
        made.close()
        raise
    return made


def end_all(fault: str) -> None:
    """Hang up on every daemon."""
    for each in [*asyncore.socket_map.values()]:
        if isinstance(each, Conversation):
            each.end(fault)


def _have_answers_looked_at() -> None:
    """Have every deferred answer asked for on the next turn of the loop.

    A channel asks for it at most every ``delay`` seconds, and only when the loop turns, which may be a second later:
    what we set is its own ``last_writable_check`` (supervisor/http.py), and 0 means never.
    """
    for each in asyncore.socket_map.values():
        if getattr(each, "delay", 0):
            each.last_writable_check = 0
