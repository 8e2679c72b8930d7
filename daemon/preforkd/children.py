"""The master's record of a worker: slot, generation, state, lifeline."""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from preforkd.plan import State
from preforkd_workers.scoreboard import ERRORS, ended, is_busy


@dataclass(eq=False)
class Child:
    """A worker, from the moment that it is asked for until it has been reaped. Times are monotonic, in seconds."""

    serial: int  # tells it from others that the mold was asked for
    slot: int
    generation: int
    row_at: int  # where its row of the scoreboard begins
    row: memoryview
    lifeline: socket.socket  # our end of it
    pid: int | None = None  # unknown until the mold has told, or the worker itself
    pidfd: int = -1
    state: State = State.BOOTING
    since: float = field(default_factory=monotonic)
    born: float = field(default_factory=monotonic)
    cause: str | None = None  # why it was told to go, if it was killed
    failure: list[str] | None = None  # what it said of why it could not boot
    is_leaving: bool = False  # it has been told to drain by somebody else
    was_cut: bool = False  # what it held has been ended for it
    is_mute: bool = False  # its end of the lifeline is closed
    unfinished_line: bytes = b""  # of what it says

    def __post_init__(self) -> None:
        self.ended_before, self.errors_before = ended(self.row), int(self.row[ERRORS])

    @property
    def busy(self) -> bool:
        return is_busy(self.row)

    @property
    def requests(self) -> int:
        """Requests that this worker has seen through, unlike its predecessors in the slot."""
        return ended(self.row) - self.ended_before

    @property
    def errors(self) -> int:
        """How many of them have raised."""
        return int(self.row[ERRORS]) - self.errors_before

    def enter(self, state: State) -> None:
        self.state, self.since = state, monotonic()

    def hang_up(self) -> None:
        """End-of-file on the worker's end; what it has to say still reaches us."""
        with suppress(OSError):  # it has left already
            self.lifeline.shutdown(socket.SHUT_WR)

    def send(self, number: signal.Signals) -> None:
        """Signal the worker. It is our child and not yet reaped, so the pid is its own."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def hear(self) -> list[str]:
        """What the worker has said since the last time, in whole lines.

        Raises BlockingIOError when it has said nothing, EOFError when it has closed its end.
        """
        try:
            said = self.lifeline.recv(1 << 16)
        except ConnectionResetError:
            said = b""
        if not said and not self.unfinished_line:
            raise EOFError
        *lines, self.unfinished_line = (self.unfinished_line + said + (b"" if said else b"\n")).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        """Let go of the descriptors. The selector must have forgotten them before."""
        self.lifeline.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
