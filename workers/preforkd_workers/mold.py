"""The mold: the process of one generation that imports the target once and forks workers on request.

It stays single-threaded, serves nobody, and is gone as soon as its master is.
"""

import faulthandler
import gc
import json
import os
import posix  # for waitpid as it is: gevent has its own in os
import signal
import socket
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from preforkd_workers import lastresort, prctl, process, protocol, streams
from preforkd_workers.audit import Snapshot, audit, refusal
from preforkd_workers.boot import Boot, imported
from preforkd_workers.copies import fork
from preforkd_workers.explanation import explain
from preforkd_workers.hooks import ON_MOLD
from preforkd_workers.levels import Levels
from preforkd_workers.process import Worker
from preforkd_workers.protocol import FAILED, LOOK, NOTICE, READY, REFUSED, SERVES, SPAWNED, Order
from preforkd_workers.spec import Spec, is_script
from preforkd_workers.target import Target
from preforkd_workers.title import setproctitle
from preforkd_workers.usermetrics import UserMetrics


def run(spec: Spec, channel: socket.socket) -> NoReturn:
    """Be a mold: called in a process just forked, with all signals held. Never returns."""
    process.reset_signals()
    setproctitle(f"preforkd: mold {spec.service} gen={spec.generation}")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    faulthandler.enable(channel.fileno(), all_threads=True)
    prctl.signal_on_parent_death(signal.SIGKILL)
    if not spec.is_rehearsal:
        streams.take_over(spec.log)
    if os.getppid() == spec.master:  # or it has died already
        process.leave(lambda: Mold(spec, channel).serve())
    os._exit(1)


# An order, and the worker's end of its lifeline.
Ordered = tuple[Order, int]

# A worker's own: its order, its end of the lifeline, and the process in the middle.
Mine = tuple[Order, int, int]

# How many workers are forked by one process in the middle, if so many were asked for: that is what most of the forks
# are spared by when many workers are replaced.
BATCH = 8


class Mold:
    """The loop of a mold: say what came of the import, then answer requests for workers."""

    def __init__(self, spec: Spec, channel: socket.socket) -> None:
        self.spec = spec
        self.channel = channel
        self.target: Target | None = None
        self.urls = [listener.url for listener in spec.listeners]  # what each of its servers listens at
        self.user_metrics = UserMetrics(spec.user_metrics, spec.service, self._notice)
        streams.losses.tell = self._tell_dropped
        self.levels = Levels(spec.scoreboard)

    def serve(self) -> None:
        """Import, then fork a worker for every request, until the master hangs up or is gone; in a worker, serve."""
        load_parts(self.spec)
        self.user_metrics.expect()
        lastresort.expect(self.spec.log, self.spec.service)
        self.levels.expect()
        if is_script(self.spec.target):
            return self._run_script()
        if self.spec.preload and not self._import():
            return None
        worker = self._fork_workers()
        return worker.serve() if worker is not None else None

    def _run_script(self) -> None:
        """In the place of the import. What the script does after it has served, it does in the workers."""
        from preforkd_workers.bindings import Bindings  # here and not above: other targets do without
        from preforkd_workers.script import Script

        before = Snapshot.take()

        def wait(target: Target, urls: list[str]) -> Worker:
            return self._wait(target, urls, script.known(before))

        script = Script(self.spec, Bindings(self.spec, self.channel), wait, self._fail)
        try:
            script.run()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if script.worker is None:
                self._fail(error)
            raise

    def _wait(self, target: Target, urls: list[str], before: Snapshot) -> Worker:
        """Where the script serves: fork workers there. Returns in a worker only."""
        self.target, self.urls = target, urls[self.spec.server - 1 : self.spec.server]
        try:
            if not self.spec.is_rehearsal:
                target.hooks.run(ON_MOLD, target.servers)
            process.reset_signals()
            self._examine(target, before)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            self._fail(error)
        self._tell(f"{SERVES} {json.dumps(urls)}")
        process.flush()  # or every worker would say it again
        worker = self._fork_workers()
        if worker is None:
            os._exit(0)
        return worker

    def _fail(self, error: BaseException) -> NoReturn:
        self._tell(f"{FAILED} {protocol.shorten(explain(error))}")
        process.leave(lambda: None)

    def _fork_workers(self) -> Worker | None:
        """Say that we are ready, and fork a worker for every request. Returns in a worker; None when there is no more
        request."""
        self.user_metrics.keep_what_the_mold_counted()
        lastresort.prepare()
        boot = Boot(self.spec, self.target, self.urls, self.user_metrics, self.levels)
        gc.collect()  # or what is free between what is shared is filled by each worker for itself
        gc.freeze()
        signal.signal(LOOK, lambda *_: streams.follow())
        streams.losses.say()
        kind = "not preloaded" if self.target is None else self.target.kind
        self._tell(f"{READY} {kind}")
        while True:
            orders = self._orders()
            if not orders:
                return None
            boot.look()
            if mine := self._fork(orders):
                order, end, middle = mine
                lifeline = type(self.channel)(fileno=end)  # not gevent's: that is of no use in a signal handler
                self.channel.close()
                return boot.be_worker(order, lifeline, middle)
            for _, end in orders:
                os.close(end)

    def _orders(self) -> list[Ordered]:
        """Wait for an order and take it, with those that have come meanwhile; none when the master hangs up."""
        orders: list[Ordered] = []
        with suppress(BlockingIOError):
            while len(orders) < BATCH:
                request, end = protocol.receive(self.channel, socket.MSG_DONTWAIT if orders else 0)
                if request is None or end is None:
                    break
                orders.append((Order(*map(int, request.split())), end))
        return orders

    def _import(self) -> bool:
        before = Snapshot.take()
        try:
            self.target = imported(self.spec)
            self._examine(self.target, before)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            self._tell(f"{FAILED} {protocol.shorten(explain(error))}")
            return False
        return True

    def _examine(self, target: Target, before: Snapshot) -> None:
        """Say what will not do in several processes. Raises TargetError when none shall be forked then."""
        gc.collect()
        hazards = audit(before, self.spec.kind)
        if hazards and self.spec.fork_safety == "refuse":
            raise refusal(hazards)
        for event, fields in [*((hazard.event, hazard.fields) for hazard in hazards), *needless(target)]:
            self._notice(event, **fields)

    def _fork(self, orders: list[Ordered]) -> Mine | None:
        """Fork twice: the process in the middle tells the master the workers' pids and exits, which gives them away.

        Returns None; but in a worker what is its own.
        """
        try:
            middle = fork()
            if middle == 0:
                return self._be_middle(orders)
            reason = "the process that forks it was killed" if _wait_for(middle) else ""
        except OSError as error:
            reason = error.strerror or str(error)
        for order, _ in orders if reason else ():  # the master knows the pids of those that there are, and keeps them
            self._tell(f"{REFUSED} {order.serial} {reason}")
        return None

    def _be_middle(self, orders: list[Ordered]) -> Mine | None:
        """The master hears a pid before it can see the worker die: it is not its child before we have exited.

        Returns in the workers only.
        """
        status, middle = 1, os.getpid()
        try:
            for order, end in orders:
                try:
                    pid = fork()
                except OSError as error:
                    self._tell(f"{REFUSED} {order.serial} {error.strerror}")
                    continue
                if pid == 0:
                    for other in [other for _, other in orders if other != end]:
                        os.close(other)
                    return order, end, middle
                self._tell(f"{SPAWNED} {order.serial} {pid}")
            status = 0
        finally:
            if os.getpid() == middle:
                os._exit(status)
        return None

    def _notice(self, event: str, **fields: object) -> None:
        self._tell(f"{NOTICE} {json.dumps([event, fields])}")

    def _tell_dropped(self, lines: int) -> None:
        self._notice("log_dropped", lines=lines)

    def _tell(self, text: str) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the master is gone; the next receive says so
            protocol.send(self.channel, text)


def load_parts(spec: Spec) -> None:
    """Import what only some services need: here all workers share it, and molds of other services do without."""
    parts = {
        "thread": spec.kind == "thread",
        "greenlets": spec.kind == "gevent",
        "door": spec.limits.has_door,
        "idle": bool(spec.limits.idle_timeout),
        "accesslog": bool(spec.access_log),
    }
    for part in (name for name, is_needed in parts.items() if is_needed):
        import_module(f"preforkd_workers.{part}")


def _wait_for(child: int) -> int:
    """Reap a child and return its status; 0 when the target ignores SIGCHLD, so that the kernel has reaped it."""
    try:
        return posix.waitpid(child, 0)[1]
    except ChildProcessError:
        return 0


def needless(target: Target) -> list[tuple[str, dict[str, object]]]:
    """What a target does that the pool does already. A script is as it is."""
    mixin = target.mixes_in()
    if mixin and target.kind != "script" and not getattr(target.servers[0], "threads_are_meant", False):
        return [("mixin_unnecessary", {"mixin": mixin, "advice": "the pool serves clients side by side already"})]
    return []
