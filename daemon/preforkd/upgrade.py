"""An upgrade: another interpreter, or another version of preforkd, takes over under the same pid.

First a child proves that it starts: ``preforkd check`` by the new interpreter, on the new settings. Only then comes the
``execv``, and after it a reload, by the successor.
"""

import os
import selectors
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from time import monotonic

from preforkd import log
from preforkd.wakeup import held

# The variable that tells a successor the descriptor of the state.
VARIABLE = "_PREFORKD_STATE_FD"

# For the new interpreter to start, beyond the time that its targets take; seconds.
START_TIMEOUT = 10.0

# The most that is kept of what the child says, in bytes.
MOST_SAID = 1 << 16


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
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        words = [*command(python, "check"), "--state-fd", str(state)]
        os.set_inheritable(state, True)
        try:
            self.pid = os.posix_spawn(
                python,
                words,
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)],
                setsigmask=[],
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
            )
        except OSError:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)
            os.close(state)
        selector.register(self._reader, selectors.EVENT_READ, self._hear)
        log.event("upgrade_preflight", pid=self.pid, python=python)

    @property
    def is_over(self) -> bool:
        return self.status is not None

    @property
    def failure(self) -> str | None:
        """Why the successor would not start, if it would not."""
        if not self.status and not self.is_late:
            return None
        said = self.said.decode(errors="replace").rstrip()
        if self.is_late:
            return f"{said}\nthe new interpreter has not come to an end in time".lstrip()
        return said or f"{self.python} ended with status {self.status}"

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
        if self._reader in self.selector.get_map():
            self.selector.unregister(self._reader)
        os.close(self._reader)
        return True

    def kill(self) -> None:
        """The daemon stops."""
        if not self.is_over:
            os.kill(self.pid, signal.SIGKILL)

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            while said := os.read(self._reader, MOST_SAID):
                self.said = (self.said + said)[:MOST_SAID]
            if self._reader in self.selector.get_map():
                self.selector.unregister(self._reader)


def execute(
    python: str,
    state: int,
    needed: Sequence[int],
    environment: Mapping[str, str],
    signals: Iterable[signal.Signals],
) -> OSError:
    """Become the successor, with this added to the environment. It answers what comes of these signals meanwhile.

    Returns only when the system refuses, and why; then nothing has changed.
    """
    for descriptor in needed:
        os.set_inheritable(descriptor, True)
    with held(signals):
        try:
            os.execve(python, command(python, "serve"), {**os.environ, **environment, VARIABLE: str(state)})
        except OSError as error:
            refusal = error
    for descriptor in needed:
        os.set_inheritable(descriptor, False)
    os.close(state)
    return refusal
