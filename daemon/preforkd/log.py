"""The log: one line an event, on standard error or in a file, in the format and from the level on that is wanted.

Before ``begin``, and where the master is not, in a library's process say, it is text on ``sys.stderr``. The last events
are kept as records as well, for whoever asks over the control socket; those who follow get every record as it is made,
whatever its level.
"""

import os
import sys
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from preforkd.formats import Format, Text
from preforkd.formats import line as line  # for whoever shows an event
from preforkd.outlet import Outlet, calm, fault_of, format_of
from preforkd.priorities import Priority, priority_of, priority_of_text
from preforkd_workers.copies import undo_in_copies
from preforkd_workers.sink import Losses
from preforkd_workers.spec import Log

Record = dict[str, object]


class Journal(Protocol):
    """Where a pool says what it does: this module is one."""

    def event(self, name: str, /, **fields: object) -> None: ...
    def text(self, prefix: str, lines: str) -> None: ...


# The events of late, oldest first.
recent: deque[Record] = deque(maxlen=1000)

# Called with every record: {"event": name, "at": time, …}, and for text {"event": "text", "at": …, "of": …, "text": …}.
# They must not raise, and may log.
followers: list[Callable[[Record], None]] = []

# Lines that were dropped because nobody took them.
losses = Losses()

# What tells of lines that were dropped, ours or a worker's.
LOSS_EVENTS = frozenset({"log_dropped", "access_log_dropped"})


def event(name: str, /, **fields: object) -> None:
    """Log an event. None is left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    if name in LOSS_EVENTS:
        return _tell_of_losses(name, known)
    at, priority = _now(), priority_of(name, known)
    if priority <= _state.threshold:
        _write(_state.format.event(priority, at, name, known))
    return _keep(name, at, known)


def text(prefix: str, lines: str) -> None:
    """Log text of many lines, a stack or a traceback, each line behind the prefix."""
    at, priority = _now(), priority_of_text(lines)
    if priority <= _state.threshold:
        _write(_state.format.text(priority, at, prefix, lines))
    _publish({"event": "text", "at": at, "of": prefix, "text": lines})


def set_level(name: str) -> None:
    """Write nothing that matters less than this: critical, error, warning, info, or debug, which is everything."""
    _state.threshold = Priority[name.upper()]


def summary(reason: str) -> str:
    """A reason of many lines in one: of a traceback what was raised, of anything else how it begins."""
    lines = [line for line in reason.splitlines() if line and not line.startswith("(")] or [""]
    head = f"{lines.pop(0)} " if lines[0].endswith(":") and lines[1:] else ""  # whose it is
    is_stack = "(most recent call first)" in reason
    if not is_stack and ("Traceback (" in reason or '  File "' in reason):
        return head + lines[-1]
    return head + lines[0] + (f"; and {len(lines) - 1} more" if lines[1:] and not head else "")


# Where it goes, and how.


class _State:
    """``format``, ``outlet`` and ``threshold`` are the master's; ``children`` is what molds are told. ``is_aloud``:
    whoever has started us is told, too, where the log is a file."""

    def __init__(self) -> None:
        self.is_aloud = True
        self.format: Format = Text()
        self.outlet: Outlet | None = None
        self.threshold = Priority.DEBUG
        self.children = Log()
        self.untold: dict[tuple[str, object], int] = {}  # lines dropped, by event and service, not told of yet
        self.times = 0  # how often the file was another one when we looked last


_state = _State()


def begin(format_name: str, path: str) -> None:
    """Write in this format to this file from now on, or to standard error. Raises OSError; then nothing has changed."""
    before, path = _state.outlet, os.path.abspath(path) if path else ""
    if before is None:
        calm()
    outlet = Outlet(path, losses) if before is None or before.path != path else before
    set_format(format_name, path)
    _state.outlet = outlet
    _state.times = outlet.file.times if outlet.file else 0
    losses.tell = _tell_of_ours
    if before is not None and before is not outlet:
        before.close()


def set_format(format_name: str, path: str) -> None:
    """Write in this format from now on, meant for this file."""
    name, _state.format = format_of(format_name, path, os.environ)
    _state.children = Log(name, path)


def be_quiet() -> None:
    """From now on, what is written to a file is written there only."""
    _state.is_aloud = False


def adopt(format_name: str, path: str) -> None:
    """As ``begin``, but where the file cannot be opened any more, go on with the one before."""
    try:
        begin(format_name, path)
    except OSError as error:
        event("log_file_lost", path=path, reason=error.strerror)


def fault(path: str) -> str | None:
    """Why a log could not be written to this file, if it could not; empty: standard error."""
    return fault_of(os.path.abspath(path)) if path else None


def expect(format_name: str, path: str) -> None:
    """Molds are told this from now on, while it is not in effect yet."""
    path = os.path.abspath(path) if path else ""
    _state.children = Log(format_of(format_name, path, os.environ)[0], path)


def of_children() -> Log:
    """What a mold that is forked now is to know."""
    return _state.children


def count_dropped(lines: int) -> None:
    """Count what somebody has lost who has no count."""
    if losses.count is not None:
        losses.count(lines)


def look_after() -> bool:
    """Follow the file, if it was moved away; whether it is another one than at the last look, so molds and workers
    should look, too. And say what was dropped, if there is room now."""
    outlet = _state.outlet
    if outlet is None:
        return False
    reason = outlet.file.look_after() if outlet.file else None
    if reason is not None:
        fields = {"path": outlet.path, "reason": reason}
        event("log_file_lost", **fields)
        outlet.write_to_stderr(line("log_file_lost", fields))  # for that file is one nobody sees
    if outlet.has_room:
        _tell_again()
    before, _state.times = _state.times, outlet.file.times if outlet.file else 0
    return _state.times != before


def _tell_of_losses(name: str, fields: dict[str, object]) -> None:
    """An event, unless that would be lost as well, as in a full pipe, or on a full disk, which is seen by nothing else:
    then later, in one for each service."""
    service, lines = fields.get("service"), int(str(fields["lines"]))
    before = _state.untold.pop((name, service), 0)
    if before:  # then it is not one worker's
        lines += before
        fields = {**({"service": service} if service else {}), "lines": lines}
    at, priority, outlet = _now(), priority_of(name, fields), _state.outlet
    if priority <= _state.threshold:
        text = _state.format.event(priority, at, name, fields)
        if outlet is None:
            _write(text)
        elif not outlet.takes(text):
            _state.untold[name, service] = lines
            return
    _keep(name, at, fields)


def _tell_of_ours(lines: int) -> None:
    event("log_dropped", lines=lines)


def _tell_again() -> None:
    """Tell of the losses that nobody was told of, now that there is room."""
    losses.say()
    for name, service in [*_state.untold]:
        event(name, service=service, lines=_state.untold.pop((name, service)))


def _in_child() -> None:
    """What is the master's is not its child's: the connections of the followers, and what was lost."""
    followers.clear()
    losses.begin_anew()
    _state.untold.clear()
    _state.outlet = None


undo_in_copies(_in_child)


def _keep(name: str, at: str, fields: dict[str, object]) -> None:
    record: Record = {"event": name, "at": at, **fields}
    recent.append(record)
    _publish(record)


def _publish(record: Record) -> None:
    for follower in [*followers]:
        follower(record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _write(lines: str) -> None:
    if _state.outlet is not None:
        if _state.outlet.file is not None and _state.is_aloud:
            _state.outlet.write_to_stderr(lines)
        return _state.outlet.write(lines)
    try:
        sys.stderr.write(f"{lines}\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads the log: no reason to stop serving
        pass
    return None
