"""Every signal wakes the main thread, in which alone Python runs its handlers (signal, "Execution of Python signal
handlers").

Without it a worker might sleep on: where another thread has taken the signal, as one of several at a time may be, or
where it has come between the last look at it and a wait, which the kernel then does not interrupt.
"""

import _thread
import os
import select
import signal
import sys
from contextlib import suppress

# What the main thread is woken by where it waits for no descriptor. Ignored by who has no handler for it (signal(7)).
_NUDGE = signal.SIGWINCH

# How long the main thread has to hear that, in seconds: it may have come just before the wait.
_PATIENCE = 0.01


class WakeUp:
    """Readable when a signal has come whose handler is Python's. To be made in the main thread."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._is_watched = self._is_heard = False

    def fileno(self) -> int:
        return self._reader

    def clear(self) -> bytes:
        """Wait for the next one: the handlers of those that have come are run by Python itself. Returns which."""
        with suppress(BlockingIOError):
            return os.read(self._reader, 1 << 10)
        return b""

    def watch(self) -> None:
        """Where there are other threads, have one more wake the main thread, which calls, whatever that waits for."""
        if not self._is_watched and len(sys._current_frames()) > 1:
            self._is_watched = True
            signal.signal(_NUDGE, self._hear)
            with suppress(RuntimeError):  # the system refuses: without it, then
                _thread.start_new_thread(self._nudge, (_thread.get_ident(),))

    def _hear(self, *_: object) -> None:
        self._is_heard = True

    def _nudge(self, main: int) -> None:
        while True:
            select.select([self._reader], [], [])
            if {*self.clear()} <= {_NUDGE}:
                continue
            self._is_heard = False
            while not self._is_heard:
                signal.pthread_kill(main, _NUDGE)
                select.select([], [], [], _PATIENCE)
