"""Every signal wakes the main thread, in which alone Python runs its handlers (signal, "Execution of Python signal
handlers").

Without it a worker might sleep on: where another thread has taken the signal, as one of several at a time may be, or
where it has come between the last look at it and a wait, which the kernel then does not interrupt.
"""

import os
import signal
from contextlib import suppress


class WakeUp:
    """Readable when a signal has come whose handler is Python's. To be made in the main thread."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._reader

    def clear(self) -> None:
        """Wait for the next one: the handlers of those that have come are run by Python itself."""
        with suppress(BlockingIOError):
            os.read(self._reader, 1 << 10)
