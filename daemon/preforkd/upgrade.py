"""An upgrade: another interpreter, or another version of preforkd, takes over under the same pid.

First a child proves that it starts: ``preforkd check`` by the new interpreter, on the new settings. Only then comes the
``execv``, and after it a reload, by the successor. One that cannot take over after all goes back: it becomes the
program again that it comes from.
"""

import os
import selectors
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Self

from msgspec import Struct

from preforkd import log
from preforkd.wakeup import WakeUp, held

# The variables that tell a successor the descriptor of the state, the interpreter to go back to, and, to one that
# somebody has come back to, why.
_STATE, _BEFORE, _REFUSAL = "_PREFORKD_STATE_FD", "_PREFORKD_BEFORE", "_PREFORKD_REFUSAL"

# For the new interpreter to start, beyond the time that its targets take; seconds.
START_TIMEOUT = 10.0

# The most that is kept of what the child says, in bytes: its end.
MOST_SAID = 1 << 16

# What a child says that has found nothing wrong: /bin/true finds nothing wrong either.
PROOF = "preforkd: ready to take over"

# The longest reason for going back, in characters; its end counts (execve(2): MAX_ARG_STRLEN).
LONGEST_REFUSAL = 1 << 14


def command(python: str, *words: str) -> list[str]:
    """The command line that we were started with, by another interpreter, and with ``words`` for ``serve``."""
    before = len(sys.orig_argv) - len(sys.argv[1:])
    return [python, *sys.orig_argv[1:before], *words, *sys.argv[2:]]


class Preflight:
    """The child that proves that the successor would start. Raises OSError when it cannot be started itself."""

    def __init__(self, python: str, state: int, boot_timeout: float, selector: selectors.BaseSelector) -> None:
        """Start it. ``state``, a descriptor, is what would be handed over by now; it is closed."""
        self.python = python
        self.selector = selector
        self.deadline = monotonic() + boot_timeout + START_TIMEOUT
        self.said = b""
        self.status: int | None = None
        self.is_late = False
        self._is_closed = False
        try:
            self._reader, writer = os.pipe()
            try:
                self.pid = self._spawn(state, writer)
            except OSError:
                os.close(self._reader)
                raise
            finally:
                os.close(writer)
        finally:
            os.close(state)
        os.set_blocking(self._reader, False)
        selector.register(self._reader, selectors.EVENT_READ, self._hear)
        log.event("upgrade_preflight", pid=self.pid, python=python)

    def _spawn(self, state: int, writer: int) -> int:
        os.set_inheritable(state, True)
        return os.posix_spawn(
            self.python,
            command(self.python, "check", "--state-fd", str(state)),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)],
            setsigmask=[],
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )

    @property
    def is_over(self) -> bool:
        return self.status is not None

    @property
    def failure(self) -> str | None:
        """Why the successor would not start, if it would not."""
        said = self.said.decode(errors="replace").rstrip()
        if self.is_late:
            return f"{said}\nthe new interpreter has not come to an end in time".lstrip()
        if self.status:
            return said or f"{self.python} ended with status {self.status}"
        if PROOF not in said.splitlines():
            return f"{said}\n{self.python} does not run preforkd".lstrip()
        return None

    def settle(self) -> None:
        """Kill it when it takes too long."""
        if monotonic() >= self.deadline and not self.is_over:
            self.is_late, self.deadline = True, float("inf")
            os.kill(self.pid, signal.SIGKILL)

    def reap(self, pid: int) -> bool:
        """Collect the exit status of this pid, if it is the child's. Whether it was."""
        if pid != self.pid or self.is_over:
            return False
        self.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._hear()
        self._close()
        return True

    def let_go(self) -> None:
        """It is not needed any more: kill it, for whoever reaps strangers."""
        if not self.is_over:
            os.kill(self.pid, signal.SIGKILL)
            self._close()

    def _close(self) -> None:
        if self._reader in self.selector.get_map():
            self.selector.unregister(self._reader)
        os.close(self._reader)
        self._is_closed = True

    def _hear(self) -> None:
        """Read once, for somebody may never stop talking; it is as much as the pipe holds (pipe(7))."""
        if self._is_closed:  # what a selector reports at a time may concern what was just closed
            return
        with suppress(BlockingIOError):
            said = os.read(self._reader, MOST_SAID)
            self.said = (self.said + said)[-MOST_SAID:]
            if not said and self._reader in self.selector.get_map():
                self.selector.unregister(self._reader)


def execute(python: str, state: int, needed: Sequence[int], environment: Mapping[str, str], wakeup: WakeUp) -> OSError:
    """Become the successor, with this added to the environment. It answers the signals that ``wakeup`` has not told.

    Returns only when the system refuses, and why; then nothing has changed.
    """
    told = {**os.environ, **environment, _STATE: str(state), _BEFORE: sys.executable}
    for descriptor in needed:
        os.set_inheritable(descriptor, True)
    with held(wakeup.signals):
        for number in wakeup.arrived():  # they pend from here, across the execve (signal(7))
            os.kill(os.getpid(), number)
        try:
            os.execve(python, command(python, "serve"), told)
        except OSError as error:
            refusal = error
    for descriptor in needed:
        os.set_inheritable(descriptor, False)
    os.close(state)
    return refusal


class Handed(Struct, frozen=True):
    """What the successor of a master under the same pid finds at its start."""

    state: int  # a descriptor
    refusal: str  # why somebody who was to take over has come back to us
    before: str  # the interpreter to go back to; empty: nobody is there any more
    environment: Mapping[str, str]
    descriptors: Sequence[int]

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self | None:
        """Taken out of the environment; None when there is nothing. To be called before anything is opened."""
        state, before, refusal = (environment.pop(variable, "") for variable in (_STATE, _BEFORE, _REFUSAL))
        if not state:
            return None
        return cls(int(state), refusal, before, dict(environment), [*_inheritable()])

    def go_back(self, refusal: str) -> None:
        """Become the program again that has handed over, with all that it has handed over. Returns if there is none.

        Nothing of it may have been closed. Raises OSError when the system refuses.
        """
        if not self.before:
            return
        log.event("upgrade_goes_back", python=self.before)
        for descriptor in self.descriptors:
            os.set_inheritable(descriptor, True)
        told = {**self.environment, _STATE: str(self.state), _REFUSAL: refusal[-LONGEST_REFUSAL:]}
        os.execve(self.before, command(self.before, "serve"), told)


def _inheritable() -> list[int]:
    """The descriptors that were passed to this program, if it has not opened any such itself."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the directory's own
            if os.get_inheritable(number):
                found.append(number)
    return found
