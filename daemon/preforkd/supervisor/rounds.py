"""What is done on every tick: see what supervisord has, ask the daemons among it, have those restarted that are deaf.

A restart is a SIGKILL for the master: its workers finish what they hold, and supervisord starts it again, as it does
when a program dies. So there is no moment between a stop and a start in which our own end would leave it stopped.
Nothing is ever killed but the master of a preforkd.
"""

import os
from collections.abc import Mapping
from time import monotonic

from preforkd import log
from preforkd.supervisor.healthchecks import ask
from preforkd.supervisor.metrics import CHECKS, FAILURES, HELD_BACK, RESTARTS, Ledger
from preforkd.supervisor.restarts import History, Rules, Verdict, is_to_be_asked, judged, seen
from preforkd.supervisor.supervised import NoControl, control_named, control_of, name_of
from preforkd.supervisor.supervisord import Program, Supervisord, Unreachable


class Rounds:
    """``named`` are programs whose daemons were pointed out: the path of a control socket, a daemon's name, or nothing.

    ``patience`` is for an answer, in seconds.
    """

    def __init__(
        self, supervisord: Supervisord, ledger: Ledger, rules: Rules, named: Mapping[str, str], patience: float
    ) -> None:
        self._supervisord, self._ledger, self._rules = supervisord, ledger, rules
        self._named, self._patience = named, patience
        self._histories: dict[str, History] = {}
        self._controls: dict[str, tuple[int, str]] = {}  # pid and path
        self._killed: dict[str, int] = {}  # pids
        self._said: dict[str, tuple[object, ...]] = {}  # of each program what was last said, lest it is repeated

    def look(self) -> list[Program]:
        """See what supervisord has; nothing when it does not answer."""
        try:
            programs = self._supervisord.programs()
        except Unreachable as reason:
            self._ledger.lost()
            self._say("", "supervisord_unreachable", reason=str(reason))
            return []
        self._ledger.saw(programs)
        self._say("", "supervisord_reached", programs=len(programs))
        return programs

    def go(self) -> None:
        """See, ask, and do what is to be done."""
        programs = self.look()
        if not programs:
            return
        now = monotonic()
        known = {each.namespec: self._histories.get(each.namespec, History()) for each in programs}
        self._histories = {each.namespec: seen(known[each.namespec], each.pid, each.age, now) for each in programs}
        for program in programs:
            self._start_again(program)
        asked = {program: path for program in programs if (path := self._control_of(program, now)) is not None}
        faults = ask({program.namespec: path for program, path in asked.items()}, self._patience)
        for program in asked:
            self._judge(program, faults[program.namespec])

    def _control_of(self, program: Program, now: float) -> str | None:
        """Where it is to be asked; None if it is not."""
        if program.state != "RUNNING" or not is_to_be_asked(self._rules, self._histories[program.namespec], now):
            return None
        try:
            control = self._found(program)
        except NoControl as reason:
            self._say(program.namespec, "unwatched", program=program.namespec, pid=program.pid, reason=str(reason))
            return None
        if control is not None:
            self._say(program.namespec, "watched", program=program.namespec, pid=program.pid, control=control)
        return control

    def _found(self, program: Program) -> str | None:
        """Its control socket; None when it is none of our business. Looked for once, as long as it is there."""
        pid, control = self._controls.get(program.namespec, (0, ""))
        if pid == program.pid and os.path.exists(control):
            return control
        pointed_out, name = self._named.get(program.namespec), name_of(program.pid)
        if pointed_out == "" or (name is None and pointed_out is None):
            return None
        if name is None:
            raise NoControl("its process is no master of preforkd's; have its command begin with exec")
        control = _pointed_out(pointed_out) if pointed_out else control_of(program.pid, name)
        self._controls[program.namespec] = program.pid, control
        return control

    def _judge(self, program: Program, fault: str | None) -> None:
        before = self._histories[program.namespec]
        history, verdict = judged(self._rules, before, fault is None, monotonic())
        self._histories[program.namespec] = history
        self._ledger.count(CHECKS, program)
        about: dict[str, object] = {"program": program.namespec, "pid": program.pid}
        if fault is not None:
            self._ledger.count(FAILURES, program)
            if before.missed < self._rules.failures:  # it goes without saying from then on
                log.event("missed", **about, missed=before.missed + 1, reason=fault)
        elif before.missed:
            log.event("answered", **about, missed=before.missed)
        match verdict:
            case Verdict.RESTART:
                self._restart(program, len(history.restarts))
            case Verdict.HELD_BACK:
                self._ledger.count(HELD_BACK, program)
                if before.missed < self._rules.failures:
                    limits = {"max_restarts": self._rules.max_restarts, "window": f"{self._rules.window:g}s"}
                    log.event("held_back", **about, **limits)

    def _restart(self, program: Program, number: int) -> None:
        log.event("restart", program=program.namespec, pid=program.pid, in_window=number)
        try:
            is_done = self._supervisord.kill(program)
        except Unreachable as reason:
            return log.event("restart_failed", program=program.namespec, pid=program.pid, reason=str(reason))
        if not is_done:
            return log.event("restart_needless", program=program.namespec, reason="it has changed meanwhile")
        self._ledger.count(RESTARTS, program)
        self._killed[program.namespec] = program.pid
        return None

    def _start_again(self, program: Program) -> None:
        """Start what we have killed and supervisord has not started, because of ``autorestart=false``."""
        if self._killed.get(program.namespec, program.pid) == program.pid:
            return
        del self._killed[program.namespec]
        if program.state == "EXITED":
            log.event("start", program=program.namespec, reason="supervisord does not, after it was killed")
            try:
                self._supervisord.start(program)
            except Unreachable as reason:
                log.event("start_failed", program=program.namespec, reason=str(reason))

    def _say(self, about: str, event: str, **fields: object) -> None:
        """Log what is so, once as long as it is."""
        what = (event, *fields.values()) if about else (event,)
        if self._said.get(about) != what:
            self._said[about] = what
            log.event(event, **fields)


def _pointed_out(named: str) -> str:
    """The control socket at this path, or of the daemon of this name. Raises NoControl."""
    if "/" not in named:
        return control_named(named, os.environ)
    if not os.path.exists(named):
        raise NoControl(f"there is no {named}")
    return named
