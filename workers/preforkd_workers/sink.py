"""A sink: takes whole lines for the log, and never waits. What does not fit is dropped, and counted.

A pipe whose reader stands still, a supervisord that is stopped, say, would otherwise stop everybody who says something.
A pipe is opened a second time for that (proc(5), fd), since O_NONBLOCK belongs to the open file description, which we
may share with whoever has started us. A socket, systemd's journal, is asked for each send; a file is just written to.

The lines of several processes do not mix: up to PIPE_BUF bytes are written as a whole or not at all (pipe(7)), and a
longer line only where there is room for it.
"""

import errno
import fcntl
import os
import stat
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from select import PIPE_BUF
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, socket  # here, for it is gevent's later on: that one waits

# What a pipe shall hold, in bytes: a reader that is late for a moment costs no line. An ordinary user may have as much.
ROOM = 1 << 20


_END = b"\n"[0]


class Losses:
    """How many lines were dropped. Whoever keeps it says where they are counted, and who is told."""

    def __init__(self) -> None:
        self.untold = 0  # since somebody was told
        self.count: Callable[[int], object] | None = None
        self.tell: Callable[[int], object] | None = None

    def add(self, lines: int) -> None:
        self.untold += lines
        if self.count is not None:
            self.count(lines)

    def say(self) -> None:
        """Tell of those that nobody was told of: now there is room."""
        if self.untold and self.tell is not None:
            lines, self.untold = self.untold, 0
            self.tell(lines)

    def begin_anew(self) -> None:
        """In a child just forked: what was lost so far, and those who are told of it, are its parent's."""
        self.untold, self.count, self.tell = 0, None, None


class Sink:
    """Where lines go: a descriptor, and the losses on the way there, which several sinks may share."""

    def __init__(self, descriptor: int, losses: Losses | None = None) -> None:
        """``descriptor`` does not block, or is that of a file, or of a socket."""
        self.descriptor = descriptor
        self.losses = losses or Losses()
        self._is_cut = False  # the last line has no end
        self._is_pipe = False
        self._socket: _Borrowed | None = None
        self._see()

    def _see(self) -> None:
        """See what the descriptor is: a target may make it another one."""
        mode = os.fstat(self.descriptor).st_mode
        self._is_pipe = stat.S_ISFIFO(mode)
        self._socket = _Borrowed(fileno=self.descriptor) if stat.S_ISSOCK(mode) else None

    def write(self, lines: bytes) -> None:
        """Write these lines, each with its end, as far as they fit."""
        if len(lines) <= PIPE_BUF:
            self._write(lines)
        else:
            for piece in _pieces(lines):
                self._write(piece)

    def _write(self, piece: bytes) -> None:
        text = b"\n" + piece if self._is_cut else piece
        written = self._attempt(text)
        if written == len(text):
            if self.losses.untold:
                self.losses.say()
        else:
            self.losses.add(max(1, text[written or -len(piece) :].count(b"\n")))

    def takes(self, line: bytes) -> bool:
        """Write this line, if there is room. It is not counted otherwise: whoever asks says it later."""
        text = b"\n" + line if self._is_cut else line
        return self._attempt(text) == len(text)

    def _attempt(self, text: bytes) -> int:
        """How many bytes were written."""
        try:
            written = self._put(text) if len(text) <= PIPE_BUF or self._has_room(len(text)) else 0
        except OSError:  # full, nobody reads it, or no space left on the device
            written = 0
        if written:
            self._is_cut = written < len(text) and text[written - 1] != _END
        return written

    def _put(self, text: bytes) -> int:
        if self._socket is not None:
            try:
                return self._socket.send(text, MSG_DONTWAIT | MSG_NOSIGNAL)
            except OSError as error:
                if error.errno != errno.ENOTSOCK:
                    raise
                self._see()
        return os.write(self.descriptor, text)

    def _has_room(self, length: int) -> bool:
        """Whether a pipe takes a long line as a whole. A page of it may be filled to the half only, and one be read."""
        if not self._is_pipe:
            return True
        try:
            room = fcntl.fcntl(self.descriptor, fcntl.F_GETPIPE_SZ)
        except OSError:  # it is none any more
            self._see()
            return True
        waiting = int.from_bytes(fcntl.ioctl(self.descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
        return 2 * waiting + length + 3 * PIPE_BUF <= room


class _Borrowed(socket):
    """A socket whose descriptor is somebody else's to close."""

    def __del__(self) -> None:
        self.detach()


def _pieces(lines: bytes) -> Iterator[bytes]:
    """The lines, as many at a time as are written as a whole, or one that is longer."""
    begin = 0
    while len(lines) - begin > PIPE_BUF:
        end = lines.rfind(b"\n", begin, begin + PIPE_BUF) + 1 or lines.find(b"\n", begin) + 1 or len(lines)
        yield lines[begin:end]
        begin = end
    if begin < len(lines):
        yield lines[begin:]


def unblocked(descriptor: int) -> int:
    """A descriptor of the same pipe or terminal that does not block; of anything else, this one.

    A pipe that is another user's cannot be opened, nor one that has no reader now: then this one is made not to block,
    for whoever has started us as somebody else has made the pipe for us.
    """
    if not is_waiting_kind(descriptor):
        return descriptor
    try:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{descriptor}", flags)
    except OSError:
        if not os.isatty(descriptor):  # that is shared with a shell, which would read end-of-file
            os.set_blocking(descriptor, False)
        return descriptor


def is_waiting_kind(descriptor: int) -> bool:
    """Whether writing there waits for somebody who reads, unless it was opened not to."""
    return stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor)


def make_room(descriptor: int) -> None:
    """Have a pipe hold more."""
    with suppress(OSError):  # no pipe, or as much as this user may have
        if fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ) < ROOM:
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, ROOM)
