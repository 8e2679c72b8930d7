"""From checked settings to a running master: bind, lay out the scoreboard, serve, and tidy up."""

import os
import selectors
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from preforkd import handover, limits, log, settings
from preforkd.control import listen
from preforkd.exits import Exit
from preforkd.listeners import Bound, ListenError
from preforkd.master import SIGNALS, Master
from preforkd.roster import Roster, not_passed
from preforkd.runtime import control_place, make_directory
from preforkd.sources import Checked, Faults
from preforkd.wakeup import release
from preforkd_workers.scoreboard import Scoreboard


def serve(checked: Checked, read: Callable[[], Checked], watched: Sequence[str] | None = None) -> Exit:
    """Serve until stopped. ``read`` gives the settings anew, for a reload.

    ``watched``: reload when a source of the target is saved, or one of these files; None: nobody looks.
    Call with the master's signals held, so that none is lost before the loop runs.
    """
    # Before we open anything under a number that was meant to be inherited.
    if refusals := not_passed(checked):
        return _cannot_start(refusals)
    with ExitStack() as tidy:
        selector = tidy.enter_context(selectors.DefaultSelector())
        roster = Roster(checked, Scoreboard.create(checked.settings.name), selector)
        tidy.callback(roster.close)
        change, refusals = None, list[str]()
        try:
            change = roster.examine(checked)
        except Faults as faults:
            refusals = faults.lines
        try:
            control = _control(checked.settings, tidy)
        except ListenError as refusal:
            refusals.append(f"control: {refusal}")
        if change is None or refusals:
            return _cannot_start(refusals)
        limits.use_all_descriptors()
        for service in roster.load(change):
            service.roll(checked.settings.max_old_generations)
        roster.commit(change)
        return _run(Master(roster, selector, read, control), watched)


def resume(state: int, read: Callable[[], Checked], watched: Sequence[str] | None = None) -> Exit:
    """Go on where a master before us under the same pid has handed over, and reload. Signals as for ``serve``."""
    inherited = handover.read(state)
    os.close(state)
    with ExitStack() as tidy:
        selector = tidy.enter_context(selectors.DefaultSelector())
        roster = handover.take_over(inherited, selector)
        tidy.callback(roster.close)
        control = handover.control(inherited)
        if control is not None:
            tidy.callback(control.close)
        limits.use_all_descriptors(inherited.nofile)
        master = Master(roster, selector, read, control)
        master.resume(inherited)
        return _run(master, watched)


def _run(master: Master, watched: Sequence[str] | None) -> Exit:
    with ExitStack() as tidy:
        if watched is not None:
            from preforkd.dev import Watcher

            master.watcher = Watcher(watched)
            tidy.callback(master.watcher.stop)
        release(SIGNALS)
        return master.serve_forever()


def _control(wanted: settings.Settings, tidy: ExitStack) -> Bound | None:
    """The control socket; None when it could not be had. Raises ListenError when it was asked for."""
    place = control_place(wanted.name, wanted.control, os.environ)
    try:
        if not place.is_configured:
            make_directory(os.path.dirname(place.path))
        made = listen(place.path)
    except (ListenError, OSError) as error:
        reason = str(error) if isinstance(error, ListenError) else f"{error.filename}: {error.strerror}"
        if place.is_configured:
            raise ListenError(reason) from error
        log.event("no_control", reason=reason, advice="say where: --control PATH")
        return None
    tidy.callback(made.close)
    log.event("control", path=place.path)
    return made


def _cannot_start(refusals: Sequence[str]) -> Exit:
    for refusal in refusals:
        log.event("cannot_start", reason=refusal)
    return Exit.SYSTEM
