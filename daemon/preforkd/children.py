"""The master's record of a worker: slot, generation, state, lifeline."""

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from msgspec import Struct, field

from preforkd.plan import State
from preforkd.wear import ENDLESS, Endurance, Weight
from preforkd_workers.scoreboard import ERRORS, SINCE, Rows
from preforkd_workers.spec import UNLIMITED, Limits


class Child(Struct, eq=False):
    """A worker, from the moment that it is asked for until it has been reaped. Times are monotonic, in seconds."""

    serial: int  # tells it from others that the mold was asked for
    slot: int
    generation: int
    rows_at: int  # where its rows of the scoreboard begin
    rows: Rows
    lifeline: socket.socket  # our end of it
    limits: Limits = UNLIMITED  # of its generation
    endurance: Endurance = ENDLESS  # what it may come to
    urls: Sequence[str] = ()  # of what it listens on
    pid: int | None = None  # unknown until the mold has told, or the worker itself
    pidfd: int = -1
    state: State = State.BOOTING
    since: float = field(default_factory=monotonic)
    born: float = field(default_factory=monotonic)
    weight: Weight = Weight()
    worn: str | None = None  # why it is to be replaced
    retires_first: bool = False  # and only then, for there is no memory for both
    reason: str = "drained"  # why it leaves, if it does so in peace
    cause: str | None = None  # why it was killed, if we did it
    failure: list[str] | None = None  # what it said of why it could not boot
    is_leaving: bool = False  # it has been told to drain by somebody else
    must_look: bool = False  # at what was changed before anybody knew its pid
    was_cut: bool = False  # what it held has been ended for it
    is_mute: bool = False  # its end of the lifeline is closed
    unfinished_line: bytes = b""  # of what it says
    ended_before: int = 0  # in its rows by who had its slot before
    errors_before: int = 0

    def __post_init__(self) -> None:
        self.ended_before, self.errors_before = self.rows.ended, self.rows.total(ERRORS)

    @property
    def lanes(self) -> int:
        return len(self.rows)

    @property
    def busy(self) -> bool:
        """Whether any of its lanes holds a request."""
        return any(self.rows.column(SINCE))

    @property
    def requests(self) -> int:
        """Requests that this worker has seen through, unlike its predecessors in the slot."""
        return self.rows.ended - self.ended_before

    @property
    def errors(self) -> int:
        """How many of them have raised."""
        return self.rows.total(ERRORS) - self.errors_before

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
