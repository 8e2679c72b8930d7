"""The mold: the process of one generation that imports the target once and forks workers on request.

It stays single-threaded, serves nobody, and is gone as soon as its master is.
"""

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from setproctitle import setproctitle

from preforkd_workers import prctl, process, protocol
from preforkd_workers.explanation import explain
from preforkd_workers.hooks import ON_MOLD, ON_WORKER_START
from preforkd_workers.lifeline import Lifeline, be_adopted
from preforkd_workers.process import Worker
from preforkd_workers.protocol import FAILED, NOTICE, READY, REFUSED, SPAWNED, Order
from preforkd_workers.spec import Spec
from preforkd_workers.target import Target, build


def run(spec: Spec, channel: socket.socket) -> NoReturn:
    """Be a mold: called in a process just forked, with all signals held. Never returns."""
    process.reset_signals()
    setproctitle(f"preforkd: mold {spec.service} gen={spec.generation}")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    faulthandler.enable(channel.fileno(), all_threads=True)
    prctl.signal_on_parent_death(signal.SIGKILL)
    if os.getppid() == spec.master:  # or it has died already
        process.leave(lambda: Mold(spec, channel).serve())
    os._exit(1)


class Mold:
    """The loop of a mold: say what came of the import, then answer requests for workers."""

    def __init__(self, spec: Spec, channel: socket.socket) -> None:
        self.spec = spec
        self.channel = channel
        self.target: Target | None = None

    def serve(self) -> None:
        """Import, then fork a worker for every request, until the master hangs up or is gone."""
        if self.spec.preload and not self._import():
            return
        gc.collect()
        gc.freeze()
        kind = "not preloaded" if self.target is None else self.target.kind
        self._tell(f"{READY} {kind}")
        while True:
            request, descriptor = protocol.receive(self.channel)
            if request is None or descriptor is None:
                return
            self._fork(Order(*map(int, request.split())), descriptor)
            os.close(descriptor)

    def _import(self) -> bool:
        try:
            self.target = self._build()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            self._tell(f"{FAILED} {protocol.shorten(explain(error))}")
            return False
        for event, fields in hazards(self.target):
            self._tell(f"{NOTICE} {json.dumps([event, fields])}")
        return True

    def _fork(self, order: Order, end: int) -> None:
        """Fork twice: the process in the middle tells the master the worker's pid and exits, which gives it away."""
        try:
            middle = os.fork()
            if middle == 0:
                self._be_middle(order, end)
            if _wait_for(middle):
                self._tell(f"{REFUSED} {order.serial} the process that forks it was killed")
        except OSError as error:
            self._tell(f"{REFUSED} {order.serial} {error.strerror}")

    def _be_middle(self, order: Order, end: int) -> NoReturn:
        """The master hears the pid before it can see the worker die: it is not its child before we have exited."""
        status, middle = 1, os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                process.leave(lambda: self._be_worker(order, end, middle))
            self._tell(f"{SPAWNED} {order.serial} {pid}")
            status = 0
        except OSError as error:
            self._tell(f"{REFUSED} {order.serial} {error.strerror}")
            status = 0
        finally:
            os._exit(status)

    def _be_worker(self, order: Order, end: int, middle: int) -> None:
        spec = self.spec
        lifeline = Lifeline(socket.socket(fileno=end))
        self.channel.close()
        process.report_stacks(lifeline)
        setproctitle(f"preforkd: worker {spec.service}#{order.slot} gen={spec.generation}")
        try:
            be_adopted(spec.master, middle)
        except ProcessLookupError:
            return
        if lifeline.is_cut:  # the mold died before the master heard of us: the slot, and its row, may be another's
            return
        row = spec.scoreboard.row_at(order.row_at)
        process.claim(row, spec.generation)
        target = self.target or self._import_in_worker(lifeline)
        if target is None:
            sys.exit(1)
        for server in target.servers:
            server.scoreboard = spec.scoreboard  # type: ignore[attr-defined]
        if not self._start(target, order.slot, lifeline):
            sys.exit(1)
        worker = Worker(target.servers, lifeline, row, spec.graceful_timeout, spec.eof_timeout, target.hooks)
        worker.lane.be_on_trial(order.trial_ms / 1000)
        process.open_for_service(row, lifeline)
        worker.serve()

    def _import_in_worker(self, lifeline: Lifeline) -> Target | None:
        """``preload = false``: the worker imports for itself."""
        try:
            return self._build()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            lifeline.failed(explain(error))
            return None

    def _build(self) -> Target:
        """Import, construct and run ``on_mold``; then forget what the target has done with signals."""
        target = build(self.spec)
        if not self.spec.is_rehearsal:
            target.hooks.run(ON_MOLD, target.servers)
        process.reset_signals()
        return target

    def _start(self, target: Target, slot: int, lifeline: Lifeline) -> bool:
        """Run ``on_worker_start``. Whether nothing went wrong."""
        try:
            target.hooks.run(ON_WORKER_START, target.servers, slot)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            lifeline.failed(explain(error))
            return False
        if self.target is None or ON_WORKER_START in target.hooks:  # the target's own code has run in this process
            process.reset_signals()
            process.report_stacks(lifeline)
        return True

    def _tell(self, text: str) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the master is gone; the next receive says so
            protocol.send(self.channel, text)


def _wait_for(child: int) -> int:
    """Reap a child and return its status; 0 when the target ignores SIGCHLD, so that the kernel has reaped it."""
    try:
        return os.waitpid(child, 0)[1]
    except ChildProcessError:
        return 0


def hazards(target: Target) -> list[tuple[str, dict[str, object]]]:
    """What the log should say about a target before workers are forked from it."""
    found: list[tuple[str, dict[str, object]]] = []
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others:
        advice = "a fork copies none of them; start threads in the handler's process, or set preload = false"
        found.append(("mold_has_threads", {"threads": ", ".join(others), "advice": advice}))
    mixin = target.mixes_in()
    if mixin and not getattr(target.servers[0], "threads_are_meant", False):
        found.append(("mixin_unnecessary", {"mixin": mixin, "advice": "the pool serves clients side by side already"}))
    return found
