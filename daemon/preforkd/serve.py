"""From checked settings to a running master: bind, lay out the scoreboard, serve, and tidy up."""

import os
import selectors
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from preforkd import handover, limits, log
from preforkd.exits import Exit
from preforkd.master import SIGNALS, Master
from preforkd.roster import Roster, not_passed
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
    board = Scoreboard.create(checked.settings.name)
    with selectors.DefaultSelector() as selector:
        roster = Roster(checked, board, selector)
        try:
            change = roster.examine(checked)
        except Faults as faults:
            return _cannot_start(faults.lines)
        try:
            limits.use_all_descriptors()
            for service in roster.load(change):
                service.roll(checked.settings.max_old_generations)
            roster.commit(change)
            return _run(Master(roster, selector, read), watched)
        finally:
            roster.close()


def resume(state: int, read: Callable[[], Checked], watched: Sequence[str] | None = None) -> Exit:
    """Go on where a master before us under the same pid has handed over, and reload. Signals as for ``serve``."""
    inherited = handover.read(state)
    os.close(state)
    with selectors.DefaultSelector() as selector:
        roster = handover.take_over(inherited, selector)
        try:
            limits.use_all_descriptors(inherited.extras["nofile"])
            master = Master(roster, selector, read)
            master.resume(inherited.release, inherited.started)
            return _run(master, watched)
        finally:
            roster.close()


def _run(master: Master, watched: Sequence[str] | None) -> Exit:
    with ExitStack() as tidy:
        if watched is not None:
            from preforkd.dev import Watcher

            master.watcher = Watcher(watched)
            tidy.callback(master.watcher.stop)
        release(SIGNALS)
        return master.serve_forever()


def _cannot_start(refusals: list[str]) -> Exit:
    for refusal in refusals:
        log.event("cannot_start", reason=refusal)
    return Exit.SYSTEM
