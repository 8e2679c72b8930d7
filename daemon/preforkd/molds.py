"""The master's side of a mold: fork it, ask it for workers, hear what it says."""

import os
import signal
import socket
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Self

from preforkd import nofile
from preforkd.wakeup import held
from preforkd_workers import protocol
from preforkd_workers.spec import Spec

# Descriptors that every mold keeps, and its workers with it, beside those that it needs: dev mode's.
KEPT: set[int] = set()


class Mold:
    """One mold, from its fork to its end."""

    def __init__(self, pid: int, channel: socket.socket, born: float, deadline: float) -> None:
        self.pid = pid
        self.channel = channel
        self.born = born
        self.deadline = deadline  # of the step that it is at: ready, or dead after a signal
        self.ready = False
        self.cause: str | None = None  # why it was killed, if it was
        self.is_mute = False  # its end of the channel is closed
        self.has_said_why = False  # it could not be started
        self.stack = ""  # what faulthandler has written when it was killed

    @classmethod
    def fork(cls, spec: Spec, boot_timeout: float) -> Self:
        """Fork a mold. Raises OSError when the system refuses."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            try:
                with held(signal.valid_signals()):
                    pid = os.fork()
                    if pid == 0:
                        _become_mold(spec, theirs)
            except OSError:
                ours.close()
                raise
        return cls(pid, ours, monotonic(), monotonic() + boot_timeout)

    def ask(self, order: protocol.Order, end: socket.socket) -> None:
        """Ask for a worker; the answer comes with the same serial. Raises OSError when the mold cannot be asked now."""
        protocol.send(self.channel, " ".join(map(str, order)), end.fileno())

    def answer(self, text: str, descriptor: int | None) -> None:
        """Answer what it waits for. Raises OSError when it cannot be told."""
        protocol.send(self.channel, text, descriptor)

    def hear(self) -> Iterator[tuple[str, str]]:
        """What the mold has said since the last time: a word of the protocol, and the rest.

        Ends for good when its end of the channel is closed.
        """
        with suppress(BlockingIOError):
            while not self.is_mute:
                said, _ = protocol.receive(self.channel)
                if said is None:
                    self.is_mute = True
                elif not said.startswith(protocol.WORD):
                    self.stack += said
                else:
                    word, _, rest = said.partition(" ")
                    yield word, rest

    def kill(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def hang_up(self) -> None:
        """Ask for nothing more: the mold leaves when it has answered what it was asked for."""
        with suppress(OSError):  # it has left already
            self.channel.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of it: the mold leaves."""
        self.channel.close()


def _become_mold(spec: Spec, channel: socket.socket) -> None:
    """In the child: let go of all that is the master's, and never come back."""
    try:
        keep = {0, 1, 2, channel.fileno(), spec.scoreboard.fd, *(each.socket.fileno() for each in spec.listeners)}
        close_all_but(keep | KEPT)
        nofile.restore()
        channel.setblocking(True)
        if spec.kind == "gevent":
            from gevent import monkey

            monkey.patch_all()  # before anything is imported that would keep hold of what it replaces
        from preforkd_workers import mold  # here and not above: the master does without socketserver

        mold.run(spec, channel)
    except BaseException:  # a fault of ours, or no memory: nobody else would say so
        traceback.print_exc()
    finally:
        os._exit(1)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor of this process but these: listeners of others, lifelines, the selector's epoll."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in keep:
            with suppress(OSError):
                os.close(number)
