"""From checked settings to a running master: bind, lay out the scoreboard, serve, and tidy up."""

import gc
import os
import selectors
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic, time_ns

from preforkd import handover, log, molds, nofile, settings, usermetrics
from preforkd.control import listen
from preforkd.descriptors import Inherited, Store, scoreboard
from preforkd.exits import Exit
from preforkd.handover import Surroundings
from preforkd.listeners import Bound, ListenError
from preforkd.master import SIGNALS, Master
from preforkd.notify import Manager
from preforkd.roster import Roster, not_passed
from preforkd.runtime import control_place, make_directory
from preforkd.sources import Checked, Faults
from preforkd.takeover import Held, Lock, Namesake, Stopped, take_over
from preforkd.upgrade import Handed
from preforkd.wakeup import release
from preforkd_workers.scoreboard import RELOAD_FAILED, STARTED_AT


def serve(checked: Checked, read: Callable[[], Checked], watched: Sequence[str] | None = None) -> Exit:
    """Serve until stopped. ``read`` gives the settings anew, for a reload.

    ``watched``: reload when a source of the target is saved, or one of these files; None: nobody looks.
    Call with the master's signals held, so that none is lost before the loop runs.
    """
    gc.freeze()  # all that is loaded stays, and no collection of a mold's is to copy it
    # Before we open anything under a number that was meant to be inherited.
    log.set_format(checked.settings.log_format, checked.settings.log_file)
    if refusals := not_passed(checked):
        return _cannot_start(refusals)
    if (reason := log.fault(checked.settings.log_file)) is not None:
        return _cannot_start([f"log_file: {reason}"])
    log.begin(checked.settings.log_format, checked.settings.log_file)
    manager, inherited = Manager.take(os.environ), Inherited.take(os.environ)
    with ExitStack() as tidy:
        try:
            lock, control = _move_in(checked.settings, manager, tidy)
        except (Held, ListenError) as refusal:
            return _cannot_start([str(refusal)])
        except Stopped:
            log.event("stopped", status=Exit.STOPPED.value)
            return Exit.STOPPED
        selector = tidy.enter_context(selectors.DefaultSelector())
        roster = Roster(checked, scoreboard(checked.settings.name, inherited), selector, manager, inherited)
        tidy.callback(roster.close)
        roster.tell_levels()
        roster.board.keep_user_metrics(usermetrics.make_directory(control.path if control else None))
        tidy.callback(usermetrics.remove_directory, roster.board.user_metrics)
        try:
            change = roster.examine(checked)
        except Faults as faults:
            return _cannot_start(faults.lines)
        nofile.use_all()
        roster.board.daemon[STARTED_AT], roster.board.daemon[RELOAD_FAILED] = time_ns(), 0
        for service in roster.load(change):
            service.roll(checked.settings.max_old_generations)
        roster.commit(change)
        if control is not None:
            log.event("control", path=control.path)
        around = Surroundings(monotonic(), control, lock, inherited.taken)
        return _run(_master(roster, read, manager, around, tidy), watched)


def resume(handed: Handed, read: Callable[[], Checked], watched: Sequence[str] | None = None) -> Exit:
    """Go on where a master before us under the same pid has handed over, and reload. Signals as for ``serve``."""
    gc.freeze()  # as in serve
    with ExitStack() as tidy:
        try:
            master = _resumed(handed, read, tidy)
        except Exception:
            handed.go_back(traceback.format_exc().rstrip())  # before anything is closed
            raise
        os.close(handed.state)
        return _run(master, watched)


def _resumed(handed: Handed, read: Callable[[], Checked], tidy: ExitStack) -> Master:
    inherited = handover.read(handed.state)
    log.adopt(inherited.checked.settings.log_format, inherited.checked.settings.log_file)
    log.be_quiet()
    manager = Manager.take(os.environ)
    around = handover.surroundings(inherited)
    if around.lock is not None:
        _keep(around.lock, tidy)
    if around.control is not None:
        tidy.callback(around.control.close)
    selector = tidy.enter_context(selectors.DefaultSelector())
    roster = handover.take_over(inherited, selector, manager)
    tidy.callback(roster.close)
    tidy.callback(usermetrics.remove_directory, roster.board.user_metrics)
    nofile.use_all(inherited.nofile)
    master = _master(roster, read, manager, around, tidy)
    master.resume(inherited.release, around, handed.refusal)
    return master


def _master(
    roster: Roster, read: Callable[[], Checked], manager: Manager, around: Surroundings, tidy: ExitStack
) -> Master:
    manager.attend(roster.selector)
    tidy.callback(manager.close)
    return Master(roster, read, manager, Store(manager, around.stored), around.control, around.lock)


def _run(master: Master, watched: Sequence[str] | None) -> Exit:
    with ExitStack() as tidy:
        if watched is not None:
            from preforkd.dev import Watcher

            master.watcher = Watcher(watched)
            tidy.callback(master.watcher.stop)
        release(SIGNALS)
        return master.serve_forever()


def _move_in(wanted: settings.Settings, manager: Manager, tidy: ExitStack) -> tuple[Lock | None, Bound | None]:
    """The lock, once nobody of an earlier instance is left, and the control socket; None: we do without.

    Raises Stopped; Held and ListenError when somebody has chosen the place where we cannot be.
    """
    place = control_place(wanted.name, wanted.control, os.environ)
    lock = Lock(f"{place.path}.lock")
    try:
        if not place.is_configured:
            make_directory(os.path.dirname(place.path))
        take_over(lock, wanted.takeover_timeout, manager, is_default=not place.is_chosen)
        _keep(lock, tidy)
        made = listen(place.path)
    except (ListenError, Namesake, OSError) as error:
        reason = _explain(error, place.path) if isinstance(error, OSError) else str(error)
        if place.is_configured:
            raise ListenError(f"control: {reason}") from error
        log.event("no_control", reason=reason, advice=_advice(error, os.path.dirname(place.path)))
        return (lock if lock.descriptor >= 0 else None), None
    tidy.callback(made.close)
    return lock, made


def _explain(error: OSError, path: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"unix:{path}: no such directory: {os.path.dirname(path)}"
    return f"unix:{path}: {error.filename}: {error.strerror}"


def _advice(error: Exception, directory: str) -> str:
    """What to do for a control socket, where we may not make its directory ourselves."""
    other = "say where: --control PATH"
    if not isinstance(error, PermissionError):
        return other
    return f"have root make the directory: install -d -o {os.geteuid()} -m 0700 {directory}; or {other}"


def _keep(lock: Lock, tidy: ExitStack) -> None:
    """Have every process of ours hold it."""
    molds.KEPT.add(lock.descriptor)
    tidy.callback(lock.release)


def _cannot_start(refusals: Sequence[str]) -> Exit:
    for refusal in refusals:
        log.event("cannot_start", reason=refusal)
    return Exit.SYSTEM
