"""Boot: a process that was just forked becomes a worker.

What it takes for that is made in the mold as far as it can be, so that all workers share it; the rest in each of them,
and nothing there that is not needed: whatever a process touches after the fork is copied for it.
"""

import socket
import sys
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import NoReturn

from preforkd_workers import process, resources, streams, wear
from preforkd_workers.explanation import explain
from preforkd_workers.hooks import ON_MOLD, ON_WORKER_START
from preforkd_workers.keeper import be_fresh, be_plain, is_plain, keep
from preforkd_workers.levels import Levels
from preforkd_workers.lifeline import Lifeline, be_adopted
from preforkd_workers.process import Worker
from preforkd_workers.protocol import Order
from preforkd_workers.scoreboard import UNLOGGED, Rows
from preforkd_workers.spec import Spec, is_script
from preforkd_workers.target import Target, build
from preforkd_workers.title import setproctitle
from preforkd_workers.usermetrics import UserMetrics


def imported(spec: Spec) -> Target:
    """Import, construct and run ``on_mold``; then forget what the target has done with signals."""
    target = build(spec)
    if not spec.is_rehearsal:
        target.hooks.run(ON_MOLD, target.servers)
    process.reset_signals()
    return target


class Boot:
    """``target``: None where each worker imports for itself. ``urls``: what each of its servers listens at."""

    def __init__(
        self, spec: Spec, target: Target | None, urls: list[str], user_metrics: UserMetrics, levels: Levels
    ) -> None:
        self.spec = spec
        self.target = target
        self.urls = urls
        self.user_metrics = user_metrics
        self.levels = levels
        self.lifeline = Lifeline()  # of the worker to come
        self.worker = self._made_ahead()

    def _made_ahead(self) -> Worker | None:
        """What all workers are to be, where nothing of the target comes before it."""
        target, spec = self.target, self.spec
        if target is None or spec.is_rehearsal or spec.kind != "process" or is_script(spec.target):
            return None
        if ON_WORKER_START in target.hooks:
            return None
        worker = self._equipped(target)
        worker.take_over()
        return worker

    def look(self) -> None:
        """Have those that are forked from now on begin with the log's file and the loggers' levels as they are now."""
        streams.follow()
        self.levels.apply()

    def be_worker(self, order: Order, end: socket.socket, middle: int) -> Worker:
        """Be a worker, and a ready one. Leaves when it cannot be, or is not needed any more.

        ``end``: of its lifeline. ``middle``: the process in the middle of the double fork.
        """
        rows = self._take_place(order, end, middle)
        trial_ends = order.trial_ms and monotonic() + order.trial_ms / 1000
        if order.is_fresh:
            worker = self._be_kept(order.slot, rows, trial_ends)
        else:
            worker = self._make(order.slot, rows, trial_ends)
            if order.max_requests:
                wear.limit(worker, order.max_requests)
        worker.open_for_service()
        return worker

    def _take_place(self, order: Order, end: socket.socket, middle: int) -> Rows:
        """Be the master's child, in this slot, with these rows, and with what the settings give a worker."""
        spec, lifeline = self.spec, self.lifeline
        lifeline.hold(end)
        self._begin_anew()
        process.report_stacks(lifeline)
        setproctitle(f"preforkd: worker {spec.service}#{order.slot} gen={spec.generation}")
        try:
            be_adopted(spec.master, middle)
        except ProcessLookupError:
            process.leave(lambda: None)
        if lifeline.is_cut:  # the mold died before the master heard of us: the slot, and its row, may be another's
            process.leave(lambda: None)
        rows = spec.scoreboard.rows_at(order.rows_at, spec.lanes)
        process.claim(rows[0], spec.generation)
        try:
            resources.apply(spec.resources, order.slot)
        except resources.Refused as error:
            self._fail(str(error))
        streams.begin(_counting(rows[0]), lambda lines: lifeline.notice("log_dropped", lines=lines))
        return rows

    def _begin_anew(self) -> None:
        """After a fork."""
        if self.spec.kind == "gevent":
            from preforkd_workers.greenlets import begin_anew

            begin_anew()

    def _be_kept(self, slot: int, rows: Rows, trial_ends: float) -> Worker:
        """Be a keeper. Returns in its fresh processes; where a worker is made ahead of them, they begin in its lane."""
        lifeline = self.lifeline
        if self._is_plain:
            worker = self._make(slot, rows, trial_ends)
            be_plain(worker)
            worker.lanes[0].fork_ahead = partial(keep, lifeline, rows[0], self.look)
        else:
            keep(lifeline, rows[0], self.look, lambda: lifeline.tried() if monotonic() < trial_ends else None)
            self._begin_anew()
            worker = self._make(slot, rows, trial_ends)
            be_fresh(worker)
        return worker

    @property
    def _is_plain(self) -> bool:
        """Whether a worker can be made ahead of its fresh processes: nothing but the handler, of the target or of ours,
        has to be done in each of them."""
        target, spec = self.target, self.spec
        if target is None or spec.kind != "process" or spec.access_log or self.user_metrics.are_there:
            return False
        return not is_script(spec.target) and all(map(is_plain, target.servers)) and not target.hooks.of_workers

    def _make(self, slot: int, rows: Rows, trial_ends: float) -> Worker:
        """A worker that could serve now. Leaves when there cannot be one."""
        spec = self.spec
        self.user_metrics.belong_to(slot, self.lifeline.notice)
        target = self.target or self._import()
        for server in target.servers:
            server.scoreboard = spec.scoreboard  # type: ignore[attr-defined]
        self._start(target, slot)
        worker = self.worker or self._equipped(target)
        worker.begin(rows)
        self.levels.apply()  # by now the master's word is heard, so none that comes later is missed
        if spec.access_log:
            self._follow(worker, slot)
        worker.be_on_trial(trial_ends)
        if not self.worker and not is_script(spec.target):
            worker.take_over()
        return worker

    def _import(self) -> Target:
        """``preload = false``: the worker imports for itself."""
        try:
            return imported(self.spec)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            self._fail(explain(error))

    def _start(self, target: Target, slot: int) -> None:
        """Run ``on_worker_start``."""
        try:
            target.hooks.run(ON_WORKER_START, target.servers, slot)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            self._fail(explain(error))
        if self.target is None or ON_WORKER_START in target.hooks:  # the target's own code has run in this process
            process.reset_signals()
            process.report_stacks(self.lifeline)

    def _equipped(self, target: Target) -> Worker:
        """A worker that knows what the service asks of it."""
        spec = self.spec
        timeouts = spec.graceful_timeout, spec.eof_timeout
        blank = Rows.blank(spec.lanes)
        worker = Worker(target.servers, self.lifeline, blank, *timeouts, target.hooks, spec.kind, spec.limits)
        if is_script(spec.target):
            spec.scoreboard.refresh()  # its listener was bound since
        listeners = spec.scoreboard.services[spec.service].listeners()
        worker.know_listeners([listeners[url] for url in self.urls])
        if spec.limits.has_door:
            from preforkd_workers.door import Door  # here and not above: most do without

            worker.guard(Door(spec, worker.next_tally, worker.make_lock()))
        worker.look_at(streams.follow)
        worker.look_at(lambda: self.levels.look(worker.lanes[0].complain))
        return worker

    def _follow(self, worker: Worker, slot: int) -> None:
        """Have the access log written."""
        from preforkd_workers import accesslog  # here and not above: most do without

        try:
            accesslog.follow(worker, self.spec, slot, self.urls)
        except accesslog.Refused as refusal:
            self._fail(str(refusal))

    def _fail(self, reason: str) -> NoReturn:
        """There cannot be a worker: say why, and leave."""
        self.lifeline.failed(reason)
        process.leave(lambda: sys.exit(1))


def _counting(row: memoryview) -> Callable[[int], None]:
    """What counts dropped lines in this row."""

    def count(lines: int) -> None:
        row[UNLOGGED] += lines

    return count
