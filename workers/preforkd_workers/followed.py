"""Descriptors that lead to the file at a path, whatever becomes of the one that was there: logrotate moves it away.

What was written before is in the old file, what comes later in the new one, and no line is lost between them.
"""

import os
from collections.abc import Sequence
from typing import Self

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # the last for a FIFO's sake
MODE = 0o640


class Followed:
    """``descriptors`` exist already, and are of whatever they were until the file is found."""

    def __init__(self, path: str, descriptors: Sequence[int]) -> None:
        self.path = path
        self.descriptors = descriptors
        self.times = 0  # how many files they have led to
        self._identity = (0, 0)
        self._trouble: str | None = None  # why the file could not be looked after the last time

    @classmethod
    def opened(cls, path: str) -> Self:
        """With a descriptor of its own. The file is made if there is none. Raises OSError."""
        found = cls(path, [open_file(path)])
        found.follow()
        return found

    def follow(self) -> None:
        """Lead to the file that is there, if that is another one by now. Raises OSError when there is none, or we may
        not write to it; then nothing has changed."""
        found = os.stat(self.path)
        if (found.st_dev, found.st_ino) != self._identity:
            self._lead_to(os.open(self.path, _APPEND))

    def look_after(self) -> str | None:
        """Follow the file, or make it if there is none. Returns why that cannot be, when it is news."""
        before, self._trouble = self._trouble, None
        try:
            try:
                self.follow()
            except FileNotFoundError:
                self._lead_to(open_file(self.path))
        except OSError as error:
            self._trouble = error.strerror or str(error)
        return self._trouble if self._trouble != before else None

    def _lead_to(self, file: int) -> None:
        found = os.fstat(file)
        for number in self.descriptors:
            os.dup2(file, number, inheritable=os.get_inheritable(number))
        os.close(file)
        self._identity = found.st_dev, found.st_ino
        self.times += 1


def open_file(path: str) -> int:
    """A descriptor that appends to this file, which is made if there is none. Raises OSError."""
    return os.open(path, _APPEND | os.O_CREAT, MODE)
