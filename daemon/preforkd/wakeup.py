"""Signals as bytes on a pipe, and signals held across a fork."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class WakeUp:
    """Turns the given signals into something that a selector can wait for (signal.set_wakeup_fd)."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self.signals = frozenset(signals)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self.signals:
            signal.signal(number, lambda *_: None)  # the byte on the pipe is what counts

    def fileno(self) -> int:
        return self._reader

    def close(self) -> None:
        """Leave the signals to whoever is next."""
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)

    def arrived(self) -> list[signal.Signals]:
        """The signals that have come since the last time, each once, in order."""
        try:
            return [signal.Signals(number) for number in dict.fromkeys(os.read(self._reader, 1 << 16))]
        except BlockingIOError:
            return []


def name_of(number: int) -> str:
    """``SIGKILL``; most real-time signals have no name of their own (signal(7))."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def release(signals: Iterable[signal.Signals]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextmanager
def held(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Hold these signals for the time of a fork, so that the child meets them only when it is prepared."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
