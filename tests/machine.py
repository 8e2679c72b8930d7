"""A machine without processes: what molds and workers are to the master, in the test's own process.

It stands where the master meets the system: the clock, fork, signals, and exit statuses. All above that seam, and the
sockets of the lifelines, are the real ones.
"""

import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, Self

import pytest

from preforkd import breathing, children, generations, pool, reload, service
from preforkd_workers.protocol import DRAIN, FAILED, LEAVING, READY, SPAWNED, Order
from preforkd_workers.scoreboard import BEGUN, ERRORS, OK, Scoreboard
from preforkd_workers.spec import Spec


@dataclass(eq=False, kw_only=True)
class Process:
    """A mold or a worker: whether it lives, and what was asked of it."""

    pid: int
    service: str
    generation: int
    status: int | None = None  # once it is dead: negative for a signal
    signals: list[int] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        return self.status is None


@dataclass(eq=False, kw_only=True)
class Worker(Process):
    """A worker, with its end of the lifeline."""

    end: socket.socket
    row: memoryview
    is_ready: bool = False

    @property
    def is_told_to_leave(self) -> bool:
        return DRAIN in self.signals

    @property
    def is_cut(self) -> bool:
        try:
            return not self.end.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def say(self, line: str) -> None:
        with suppress(OSError):
            self.end.send(f"{line}\n".encode())

    def serve(self, requests: int, errors: int) -> None:
        self.row[BEGUN] += requests
        self.row[OK] += requests - errors
        self.row[ERRORS] += errors


class Mold(Process):
    """What ``molds.Mold`` is to a generation: made on the machine that is set, told and heard in the same words."""

    machine: "Machine"

    def __init__(self, spec: Spec, boot_timeout: float) -> None:
        if self.machine.cannot_fork:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        super().__init__(pid=self.machine.new_pid(), service=spec.service, generation=spec.generation)
        self.ready = False
        self.born = self.machine.now
        self.deadline = self.born + boot_timeout
        self.cause: str | None = None
        self.is_mute = False
        self.has_said_why = False
        self.stack = ""
        self.outbox: list[tuple[str, str]] = []
        self.has_hung_up = False
        self.channel, self.theirs = socket.socketpair()
        self.machine.processes[self.pid] = self

    # What the generation calls.

    @classmethod
    def fork(cls, spec: Spec, boot_timeout: float) -> Self:
        return cls(spec, boot_timeout)

    def ask(self, order: Order, end: socket.socket) -> None:
        if not self.is_alive:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if self.machine.cannot_fork:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        made = Worker(
            pid=self.machine.new_pid(),
            service=self.service,
            generation=self.generation,
            end=end.dup(),
            row=self.machine.board.rows_at(order.rows_at, 1)[0],
        )
        self.machine.processes[made.pid] = made
        self.outbox.append((SPAWNED, f"{order.serial} {made.pid}"))

    def hear(self) -> Iterator[tuple[str, str]]:
        while self.outbox:
            yield self.outbox.pop(0)
        self.is_mute = not self.is_alive

    def kill(self, number: signal.Signals) -> None:
        self.machine.die(self, -number)

    def hang_up(self) -> None:
        self.has_hung_up = True

    def close(self) -> None:
        self.channel.close()
        self.theirs.close()

    # What the test calls.

    def become_ready(self) -> None:
        self.outbox.append((READY, "a handler class"))

    def fail(self) -> None:
        self.outbox.append((FAILED, "Traceback …\nImportError: as told"))
        self.machine.die(self, 0)


class Machine:
    """The clock, and the processes by pid. It has the names of ``os`` that the master's side calls, and its own."""

    WNOHANG = os.WNOHANG
    waitstatus_to_exitcode = staticmethod(os.waitstatus_to_exitcode)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, board: Scoreboard) -> None:
        self.board = board
        self.now = 1000.0
        self.cannot_fork = False
        self.processes: dict[int, Process] = {}
        self.pids = iter(range(10_000_000, 20_000_000))
        self.path = self
        for module in (pool, children, generations, service, breathing, reload):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)
        for module in (pool, children, generations):
            monkeypatch.setattr(module, "os", self)
        monkeypatch.setattr(pool, "Child", type("Child", (_Child,), {"machine": self}))
        monkeypatch.setattr(generations, "Mold", type("Mold", (Mold,), {"machine": self}))

    def new_pid(self) -> int:
        return next(self.pids)

    def close(self) -> None:
        """Let go of the sockets of those who are left."""
        for process in self.processes.values():
            if isinstance(process, Worker):
                process.end.close()
            elif isinstance(process, Mold):
                process.close()

    def die(self, process: Process, status: int) -> None:
        """Let it be dead, and not yet reaped."""
        if process.is_alive:
            process.status = status
            if isinstance(process, Worker):
                process.end.close()

    @property
    def molds(self) -> list[Mold]:
        return [each for each in self.processes.values() if isinstance(each, Mold) and each.is_alive]

    @property
    def workers(self) -> list[Worker]:
        return [each for each in self.processes.values() if isinstance(each, Worker) and each.is_alive]

    @property
    def dead(self) -> list[Process]:
        return [each for each in self.processes.values() if not each.is_alive]

    # What the master calls of ``os``.

    def getpid(self) -> int:
        return 1

    def exists(self, path: str) -> bool:
        return int(path.removeprefix("/proc/")) in self.processes

    def pidfd_open(self, _pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # a death is told by the end of the lifeline

    def kill(self, pid: int, number: int) -> None:
        process = self.processes[pid]
        process.signals.append(number)
        if isinstance(process, Worker) and process.is_ready and number == DRAIN:
            process.say(LEAVING)
        if number in (signal.SIGKILL, signal.SIGABRT):
            self.die(process, -number)

    def wait4(self, pid: int, _options: int) -> tuple[int, int, object]:
        process = self.processes.get(pid)
        if process is None:
            raise ChildProcessError
        if process.is_alive:
            return 0, 0, None
        return *self.waitpid(pid, 0), _Usage()

    def waitpid(self, pid: int, _options: int) -> tuple[int, int]:
        status = self.processes.pop(pid).status
        assert status is not None, "waited for somebody who lives"
        return pid, -status if status < 0 else status << 8


class _Child(children.Child):
    """Born by the machine's clock."""

    machine: ClassVar[Machine]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.since = self.born = self.machine.now


class _Usage:
    ru_utime = ru_stime = 0.0
    ru_maxrss = 0
