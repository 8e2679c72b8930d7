"""Telling whoever started us how we are: systemd's protocol (sd_notify(3)) and a newline (s6).

Nothing that serving depends on: it never waits, and never fails. What is said when is decided by ``Rhythm``, which
has neither a clock nor a socket; ``Manager`` says it.
"""

import os
import selectors
import socket
from collections import deque
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from enum import Enum
from time import CLOCK_MONOTONIC, clock_gettime_ns, monotonic
from typing import Self

from msgspec import Struct

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

# How much longer we ask to be given for a step of which nobody knows how long it takes, and how often, in seconds.
EXTENSION = 10.0
EXTEND_EVERY = 4.0

# How often a status is told that differs from the last one, in seconds.
STATUS_EVERY = 5.0

# How often the watchdog is fed at least, in seconds: if we die, those whom we leave have the rest of its time.
FEED_EVERY = 5.0

# How long a barrier is waited for, in seconds.
BARRIER_TIMEOUT = 5.0


class Stage(Enum):
    """What the daemon is about, as far as a service manager is patient with it."""

    BOOTING = "booting"
    SERVING = "serving"
    RELOADING = "reloading"
    STOPPING = "stopping"


def status_line(busy: int, idle: int, generation: int, reload: str | None) -> str:
    """What ``STATUS=`` tells: workers, generation, and how the last reload went, if there was one."""
    line = f"{busy + idle} workers: {busy} busy, {idle} idle; generation {generation}"
    return f"{line}; last reload: {reload}" if reload else line


class Rhythm(Struct):
    """What is to be said again and again. Times are on the caller's clock, in seconds."""

    watchdog_interval: float = float("inf")  # inf: nobody watches
    wake_at: float = 0.0
    _watchdog_at: float = 0.0
    _extend_at: float = 0.0
    _status_at: float = 0.0
    _status: str = ""
    _stage: Stage | None = None

    def due(self, now: float, stage: Stage, status: str, *, is_well: bool) -> list[str]:
        """What to say now. ``is_well``: whether the watchdog may be fed."""
        lines = []
        watched = is_well and self.watchdog_interval < float("inf")
        if watched and now >= self._watchdog_at:
            lines.append("WATCHDOG=1")
            self._watchdog_at = now + self.watchdog_interval
        is_extending = stage is not Stage.SERVING
        if stage is not self._stage:
            self._stage, self._extend_at = stage, now
        if is_extending and now >= self._extend_at:
            lines.append(f"EXTEND_TIMEOUT_USEC={EXTENSION * 1e6:.0f}")
            self._extend_at = now + EXTEND_EVERY
        if status != self._status and now >= self._status_at:
            lines.append(self.tell(now, status))
        self.wake_at = min(
            self._watchdog_at if watched else float("inf"),
            self._extend_at if is_extending else float("inf"),
            self._status_at if status != self._status else float("inf"),
        )
        return lines

    def tell(self, now: float, status: str) -> str:
        """The line for this status, to be said now."""
        self._status, self._status_at = status, now + STATUS_EVERY
        return f"STATUS={' '.join(status.split())}"


class Manager:
    """The service manager that started us, if one did; else everything here does nothing."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        self._variables = {name: environment[name] for name in _VARIABLES if name in environment}
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._unsent: deque[tuple[bytes, int | None]] = deque()
        self._selector: selectors.BaseSelector | None = None
        self._is_waiting = False  # for room, in the selector
        self._rhythm = Rhythm(_watchdog_interval(environment, pid) if address else float("inf"))

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self:
        """Made from our environment and taken out of it: a handler's programs are not to speak for us."""
        manager = cls(environment, os.getpid())
        for name in manager._variables:
            del environment[name]
        return manager

    def environment(self) -> dict[str, str]:
        """What was taken out of the environment, for a successor under the same pid."""
        return dict(self._variables)

    @property
    def is_there(self) -> bool:
        return bool(self._address)

    @property
    def is_behind(self) -> bool:
        """Whether it has not yet read all that it was told."""
        return bool(self._unsent)

    @property
    def watchdog_interval(self) -> float:
        """How often the watchdog wants to be fed, in seconds; inf: there is none."""
        return self._rhythm.watchdog_interval

    @property
    def wake_at(self) -> float:
        """When ``turn`` is to be called again, on the monotonic clock."""
        return self._rhythm.wake_at if self.is_there and not self._unsent else float("inf")

    def attend(self, selector: selectors.BaseSelector) -> None:
        """Use this selector to wait for a manager that is behind with its reading."""
        self._selector = selector

    def close(self) -> None:
        """Say nothing more."""
        self._disconnect()
        self._unsent.clear()
        self._address = ""

    # What we say.

    def turn(self, stage: Stage, status: str, *, is_well: bool) -> None:
        """Say what is due at this turn of the loop; ``is_well``: whether every service has somebody."""
        if self.is_there and not self._unsent:
            self._say(*self._rhythm.due(monotonic(), stage, status, is_well=is_well))

    def ready(self, status: str) -> None:
        """The daemon serves: after the start, or again after a reload."""
        self._say("READY=1", self._rhythm.tell(monotonic(), status), f"MAINPID={os.getpid()}")

    def reloading(self) -> None:
        """A reload begins; ``ready`` ends it, whatever has come of it."""
        self._say("RELOADING=1", f"MONOTONIC_USEC={clock_gettime_ns(CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    def status(self, line: str) -> None:
        """Tell a status at once."""
        self._say(self._rhythm.tell(monotonic(), line))

    def extend(self, seconds: float) -> None:
        """Ask for so much time for what we are at, from now on."""
        self._say(f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}")

    # The descriptor store.

    def keep(self, name: str, descriptor: int) -> None:
        """Give a copy of a descriptor to the store, to be passed to our successor under this name.

        The manager is told not to look at it (FDPOLL=0): a listener with an error pending would be dropped.
        """
        self._say("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptor=descriptor)

    def forget(self, name: str) -> None:
        """Take every descriptor of this name out of the store."""
        self._say("FDSTOREREMOVE=1", f"FDNAME={name}")

    def barrier(self) -> None:
        """Wait until the manager has done all that it was told: it closes a pipe then. Not for within the loop."""
        if not self.is_there:
            return
        reader, writer = os.pipe()
        try:
            self._say("BARRIER=1", descriptor=writer)
            os.close(writer)
            with selectors.DefaultSelector() as selector:
                selector.register(reader, selectors.EVENT_READ)
                selector.select(BARRIER_TIMEOUT)
        finally:
            os.close(reader)

    # The deed.

    def _say(self, *lines: str, descriptor: int | None = None) -> None:
        if lines and self.is_there:
            self._unsent.append(("\n".join(lines).encode(), descriptor))
            if len(self._unsent) == 1:
                self._send()

    def _send(self) -> None:
        """Send what is unsent, in order; what does not fit now is sent when the manager has read some of it."""
        while self._unsent:
            message, descriptor = self._unsent[0]
            try:
                self._connected()
                assert self._socket is not None
                socket.send_fds(self._socket, [message], [] if descriptor is None else [descriptor])
            except BlockingIOError:
                return self._wait_for_room()
            except OSError:  # the manager is deaf, or the descriptor has been closed meanwhile
                self._disconnect()
            self._unsent.popleft()
        self._stop_waiting()
        return None

    def _connected(self) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.connect(self._address)

    def _disconnect(self) -> None:
        self._stop_waiting()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _wait_for_room(self) -> None:
        if self._selector is None:  # before the loop, nobody would come back to it
            self._unsent.clear()
        elif self._socket is not None and not self._is_waiting:
            self._selector.register(self._socket, selectors.EVENT_WRITE, self._send)
            self._is_waiting = True

    def _stop_waiting(self) -> None:
        if self._is_waiting and self._selector is not None and self._socket is not None:
            self._selector.unregister(self._socket)
        self._is_waiting = False


def _watchdog_interval(environment: Mapping[str, str], pid: int) -> float:
    """Half the time that sd_watchdog_enabled(3) would return, or less, in seconds; inf when nobody watches us."""
    try:
        period = int(environment.get("WATCHDOG_USEC", ""))
        is_ours = int(environment.get("WATCHDOG_PID", pid)) == pid
    except ValueError:
        return float("inf")
    return min(period / 2e6, FEED_EVERY) if period > 0 and is_ours else float("inf")


def newline(descriptor: int) -> None:
    """Write a newline to ``descriptor`` and close it, as s6's notification-fd wants it."""
    with suppress(OSError):  # whoever wanted to know has gone
        os.write(descriptor, b"\n")
        os.close(descriptor)
