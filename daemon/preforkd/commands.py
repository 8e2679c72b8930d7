"""The commands of the control socket, declared once. The table in docs/operating.md, preforkctl and its
completion are made from here.

Each is a function of the master and the request, and never waits: what takes time is answered later.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from preforkd import log
from preforkd.command import WAIT, Argument, Command
from preforkd.levels import DEFAULT, LEVELS, OWN
from preforkd.plan import KILL_TIMEOUT, Haste, State

if TYPE_CHECKING:
    from preforkd.children import Child
    from preforkd.control import Request
    from preforkd.master import Master
    from preforkd.renewals import Outcome, Tell
    from preforkd.service import Service

    Worker = tuple[Service, Child]

# For all stacks to arrive, and how long the workers must have been quiet to have said all; seconds.
STACKS_TIMEOUT = 2.0
QUIET = 0.2

# For the last worker to be buried when it should have been killed already; seconds.
BURIAL = 5.0


def answer(master: "Master", request: "Request") -> None:
    """Do what is asked for."""
    command = COMMANDS.get(request.do)
    if command is None:
        return request.fail(f"no command {request.do!r}; there are {', '.join(COMMANDS)}")
    try:
        request.arguments = command.checked(request.arguments)
    except ValueError as fault:
        return request.fail(str(fault))
    if command.changes:
        log.event("command", do=request.do, **request.arguments, uid=request.peer.uid, client=request.peer.pid)
    return command.act(master, request)


# What is told.


def ping(master: "Master", request: "Request") -> None:
    request.reply(**master.identity())


def status(master: "Master", request: "Request") -> None:
    from preforkd.status import report

    request.reply(**report(master))


def events(master: "Master", request: "Request") -> None:
    for record in [*log.recent]:
        _tell(request, record)
    if request.arguments["follow"]:
        _follow(request, partial(_tell, request))
    else:
        request.reply()


def _tell(request: "Request", record: log.Record) -> None:
    request.tell(**record)  # type: ignore[arg-type]


def _follow(request: "Request", hear: Callable[[log.Record], None]) -> None:
    """Hear every record that is logged until the request is over."""
    if not request.is_over:
        log.followers.append(hear)
        request.at_end(partial(log.followers.remove, hear))


def stacks(master: "Master", request: "Request") -> None:
    """The workers answer by their lifelines, without end mark: it is over when all have spoken and then been quiet."""
    slot = request.arguments["slot"]
    try:
        found = [_worker(master, slot)] if slot is not None else [*_workers(master)]
    except LookupError as fault:
        return request.fail(str(fault.args[0]))
    asked = [(service, child) for service, child in found if child.state is not State.BOOTING]
    silent = {f"{service.name}#{child.slot}" for service, child in asked}
    latest = monotonic() + STACKS_TIMEOUT

    def hear(record: log.Record) -> None:
        of = record.get("of")
        if record["event"] != "text" or of not in names:
            return
        silent.discard(str(of))
        request.tell("stack", of=of, text=record["text"])
        request.until = latest if silent else min(monotonic() + QUIET, latest)

    names = frozenset(silent)
    _follow(request, hear)
    for service, child in asked:
        service.pool.ask_for_stacks(child)
    return request.wait(_nothing, latest if names else 0.0, lambda: request.reply(silent=sorted(silent)))


def _nothing() -> None:
    pass


# What is changed.


def reload(master: "Master", request: "Request") -> None:
    _renew(master, request, partial(master.renewals.ask_for_reload, request.arguments["service"]))


def upgrade(master: "Master", request: "Request") -> None:
    """Who waits loses the connection when it succeeds, and asks the successor for the outcome."""
    python = request.arguments["python"] or ""
    if python and not os.path.isabs(python):
        return request.fail(f"python: want an absolute path, not {python!r}")
    return _renew(master, request, partial(master.renewals.ask_for_upgrade, python))


def _renew(master: "Master", request: "Request", ask: "Callable[[Tell | None], None]") -> None:
    if master.is_stopping:
        return request.fail("the daemon is stopping")
    if request.arguments["wait"]:
        return ask(partial(_tell_outcome, request))
    ask(None)
    return request.reply()


def _tell_outcome(request: "Request", outcome: "Outcome") -> None:
    if outcome.is_done:
        request.reply(what=outcome.what, result=outcome.result, **outcome.details)
    else:
        request.fail(f"{outcome.what} {outcome.result.replace('_', ' ')}: {outcome.error}")


def outcome(master: "Master", request: "Request") -> None:
    def look() -> None:
        if not master.renewals.is_idle:
            return
        if master.renewals.last is None:
            request.reply(result="none yet")
        else:
            _tell_outcome(request, master.renewals.last)

    request.wait(look, float("inf"), _nothing)


def scale(master: "Master", request: "Request") -> None:
    name, workers = request.arguments["service"], request.arguments["workers"]
    services = [each for each in master.roster.targets if name in (None, each.name)]
    if len(services) != 1:
        return request.fail(_no_service(master, name) if name is not None else _which_service(master))
    (service,) = services
    if master.is_stopping or master.is_drained:
        return request.fail("the daemon is stopping" if master.is_stopping else "the workers are drained; refill first")
    service.scale(to=workers)
    return _answer_when_full(master, request, [service])


def roll(master: "Master", request: "Request") -> None:
    """From their molds: what the files say now is for ``reload``."""
    name = request.arguments["service"]
    services = [each for each in master.roster.targets if name in (None, each.name)]
    if not services:
        return request.fail(_no_service(master, name))
    if master.is_stopping or master.is_drained:
        return request.fail("the daemon is stopping" if master.is_stopping else "the workers are drained; refill first")
    replaced = [(service, child) for service in services for child in service.pool.replace_all()]
    return _answer_when_full(master, request, services, replaced)


def _answer_when_full(
    master: "Master", request: "Request", services: "list[Service]", replaced: "Sequence[Worker]" = ()
) -> None:
    """Answer when each of these pools has as many workers as it wants within the limit that it has now been given.

    ``replaced``: and when none of these takes anything new. Each that leaves gets the others new patience.
    """
    if not request.arguments["wait"]:
        return request.reply()
    limits = {service.name: service.breathing.bounds.most for service in services}
    patience = max(service.newest.settings.boot_timeout for service in services)
    troubles = _Troubles(limits)
    _follow(request, troubles.hear)
    left = [*replaced]

    def look() -> None:
        if gone := [each for each in left if not each[0].pool.may_accept(each[1])]:
            left[:] = [each for each in left if each not in gone]
            request.until = monotonic() + patience
        if master.is_stopping:
            request.fail("the daemon is stopping")
        elif any(service.is_drained or service.breathing.bounds.most != limits[service.name] for service in services):
            request.fail("meanwhile somebody else has asked for another size")
        elif troubles.failure:
            request.fail(troubles.failure.rstrip())
        elif not left and all(service.pool.is_full for service in services):
            sizes = {service.name: service.pool.size for service in services}
            request.reply(workers=sizes, draining=sum(map(_leaving, services)))

    def give_up() -> None:
        lacking = [service for service in services if not service.pool.is_full]
        counts = ", ".join(f"{each.name} has {_ready(each)} of {each.pool.size} workers" for each in lacking)
        counts = counts or f"{len(left)} workers are still to be replaced"
        reason = f" ({troubles.reason})" if troubles.reason else ""
        request.fail(f"after {patience:g} s {counts}{reason}; it goes on trying")

    return request.wait(look, monotonic() + patience, give_up)


class _Troubles:
    """What the log says of why workers of these services could not be started."""

    def __init__(self, services: Mapping[str, int]) -> None:
        self.services = services
        self.reason = ""  # why it is tried again
        self.failure = ""  # why it is not, with the traceback if there is one
        self._failing = ""

    def hear(self, record: log.Record) -> None:
        match record:
            case {"event": "boot_failed", "service": str(name)} if name in self.services:
                self._failing = name
                self.failure = f"{name}: its target could not be started; it goes on trying\n"
            case {"event": "text", "of": of, "text": text} if of == self._failing:
                self.failure += f"{text}\n"
            case {"event": "spawn_refused" | "mold_refused", "service": str(name), "reason": reason} if (
                name in self.services
            ):
                self.reason = str(reason)


def _ready(service: "Service") -> int:
    return sum(child.state is State.READY for child in service.pool.children.values())


def _leaving(service: "Service") -> int:
    return len(service.pool.children) - _ready(service)


def drain(master: "Master", request: "Request") -> None:
    if master.is_stopping or not master.is_ready:
        return request.fail(f"the daemon is {'stopping' if master.is_stopping else 'not ready yet'}")
    master.drain_workers()
    if not request.arguments["wait"]:
        return request.reply()

    def look() -> None:
        if master.is_stopping or not master.is_drained:
            request.fail("the daemon is stopping" if master.is_stopping else "meanwhile somebody else asked to refill")
        elif not any(service.pool.children for service in master.roster.targets):
            request.reply()

    def give_up() -> None:
        left = [f"{service.name}#{slot}" for service in master.roster.targets for slot in service.pool.children]
        request.fail(f"still there: {', '.join(left)}")

    timeouts = [service.pool.timeouts for service in master.roster.targets]
    patience = max(each.graceful + each.eof for each in timeouts)
    return request.wait(look, monotonic() + patience + 2 * KILL_TIMEOUT + BURIAL, give_up)


def refill(master: "Master", request: "Request") -> None:
    if master.is_stopping or not master.is_drained:
        return request.fail("the daemon is stopping" if master.is_stopping else "the workers are not drained")
    master.refill()
    return _answer_when_full(master, request, [*master.roster.targets])


def stop(master: "Master", request: "Request") -> None:
    """Who waits is answered by the end of the connection: nobody else can say that we are gone."""
    master.stop(Haste.KILL if request.arguments["now"] else Haste.NONE)
    if not request.arguments["wait"]:
        return request.reply()
    return request.tell("stopping")


def log_level(master: "Master", request: "Request") -> None:
    levels, logger, level = master.roster.levels, request.arguments["logger"], request.arguments["level"]
    if level is not None:
        before = levels.in_effect.get(logger)
        try:
            levels.choose(logger, level)
        except ValueError as fault:
            return request.fail(f"level: {fault}")
        now = levels.in_effect.get(logger)
        log.event("log_level", logger=logger, now=now or DEFAULT, before=before or DEFAULT, uid=request.peer.uid)
        master.roster.tell_levels()
    names = dict.fromkeys([OWN, *sorted(levels.in_effect)]) if logger is None else [logger]
    told = {name: {"level": levels.in_effect.get(name), "settings": levels.declared.get(name)} for name in names}
    return request.reply(levels=told)


def kill(master: "Master", request: "Request") -> None:
    try:
        service, child = _worker(master, request.arguments["slot"])
    except LookupError as fault:
        return request.fail(str(fault.args[0]))
    service.pool.kill(child, "operator")
    if not request.arguments["wait"]:
        return request.reply(pid=child.pid)

    def look() -> None:
        if service.pool.children.get(child.slot) is not child:
            request.reply(pid=child.pid)

    return request.wait(look, monotonic() + KILL_TIMEOUT + BURIAL, lambda: request.fail(f"{child.pid} is still there"))


# Whom is meant.


def _workers(master: "Master") -> "Iterator[Worker]":
    for service in master.roster:
        for slot in sorted(service.pool.children):
            yield service, service.pool.children[slot]


def _worker(master: "Master", slot: str) -> "Worker":
    """The worker that is called so. Raises LookupError with what there is instead."""
    name, mark, number = slot.rpartition("#")
    if not mark and len(master.roster.targets) == 1:
        name = master.roster.targets[0].name
    if not name or not number.isdecimal():
        raise LookupError(f"slot: want {_SLOT.help}, not {slot!r}")
    services = [each for each in master.roster if each.name == name]
    if not services:
        raise LookupError(_no_service(master, name))
    child = services[0].pool.children.get(int(number))
    if child is None:
        there = ", ".join(map(str, sorted(services[0].pool.children))) or "none"
        raise LookupError(f"{name} has no worker in slot {number}; there are {there}")
    return services[0], child


def _which_service(master: "Master") -> str:
    return f"service: which? There are {', '.join(each.name for each in master.roster.targets)}"


def _no_service(master: "Master", name: str) -> str:
    return f"no service {name!r}; there are {', '.join(each.name for each in master.roster.targets)}"


_SLOT = Argument("slot", str, "a worker, as service#3; or 3, where there is one service", is_required=True)
_NOW = Argument("now", bool, "kill the workers that hold requests", flags=("--now",), default=False)
_FOLLOW = Argument("follow", bool, "go on with those to come", flags=("-f", "--follow"), default=False)
_WORKERS = Argument("workers", int, "how many", is_required=True, bounds=(1, 4096))
_PYTHON = Argument("python", str, "the absolute path of another interpreter")
_SERVICE = Argument("service", str, "its name; may be left out where there is one")
_INTERVAL = Argument("interval", int, "seconds between two screens; 2", bounds=(1, 3600))
_ANY_SERVICE = Argument("service", str, "this one only")
_ANY_SLOT = Argument("slot", str, _SLOT.help)
_LOGGER = Argument("logger", str, "such as app.mail or root; preforkd for the daemon's own events")
_LEVEL = Argument("level", str, f"{', '.join(LEVELS)}; or {DEFAULT}, to take it back")

COMMANDS = {
    command.name: command
    for command in (
        Command("ping", "Say which daemon answers.", ping),
        Command("status", "Show services, listeners and workers.", status),
        Command("top", "Show them again and again, with rates, the busiest first; `q` quits.", status, (_INTERVAL,)),
        Command("events", "Show what has happened of late: the last 1000 events.", events, (_FOLLOW,)),
        Command("stacks", "Show the stacks of a worker, or of all; they are in the log as well.", stacks, (_ANY_SLOT,)),
        Command(
            "reload", "Read settings and code anew; roll back if they fail.", reload, (_ANY_SERVICE, WAIT), changes=True
        ),
        Command(
            "upgrade", "Run the new version of preforkd under the same pid.", upgrade, (_PYTHON, WAIT), changes=True
        ),
        Command("outcome", "Wait for a reload or upgrade that runs, and tell how the last one ended.", outcome),
        Command(
            "scale",
            "Change how many workers a service has; an elastic one, at most.",
            scale,
            (_SERVICE, _WORKERS, WAIT),
            changes=True,
        ),
        Command(
            "roll", "Replace all workers by fresh ones of the same code.", roll, (_ANY_SERVICE, WAIT), changes=True
        ),
        Command(
            "drain", "Have all workers finish and leave, but stay; the backlog fills.", drain, (WAIT,), changes=True
        ),
        Command("refill", "Have workers again after a drain.", refill, (WAIT,), changes=True),
        Command(
            "kill", "Kill a worker, with its stacks in the log; it is replaced.", kill, (_SLOT, WAIT), changes=True
        ),
        Command(
            "log-level",
            "Show the levels of loggers, or change one, in all workers and for those to come.",
            log_level,
            (_LOGGER, _LEVEL),
        ),
        Command("stop", "Stop the daemon when its workers have finished.", stop, (_NOW, WAIT), changes=True),
    )
}


def reference() -> str:
    """The table of commands as docs/operating.md shows it."""
    rows = [f"| `{command.usage}` | {command.help} |" for command in COMMANDS.values()]
    return "\n".join(["| command | |", "| --- | --- |", *rows])
