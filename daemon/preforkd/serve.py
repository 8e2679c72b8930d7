"""From checked settings to a running master: bind, lay out the scoreboard, serve, and tidy up."""

import selectors
from collections.abc import Callable

from preforkd import log
from preforkd.exits import Exit
from preforkd.limits import use_all_descriptors
from preforkd.master import SIGNALS, Master
from preforkd.roster import Roster, not_passed
from preforkd.sources import Checked, Faults
from preforkd.wakeup import release
from preforkd_workers.scoreboard import Scoreboard


def serve(checked: Checked, read: Callable[[], Checked]) -> Exit:
    """Serve until stopped. ``read`` gives the settings anew, for a reload.

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
            use_all_descriptors()
            for service in roster.load(change):
                service.roll(checked.settings.max_old_generations)
            roster.commit(change)
            master = Master(roster, selector, read)
            release(SIGNALS)
            return master.serve_forever()
        finally:
            roster.close()


def _cannot_start(refusals: list[str]) -> Exit:
    for refusal in refusals:
        log.event("cannot_start", reason=refusal)
    return Exit.SYSTEM
