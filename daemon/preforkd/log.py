"""The log: one line an event, ``event key=value …``, on standard error.

The time comes last, and only where nobody else adds one: not on a terminal, not in systemd's journal. The last events
are kept as records as well, for whoever asks over the control socket; those who follow get every record as it is made.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

Record = dict[str, object]

# The events of late, oldest first.
recent: deque[Record] = deque(maxlen=1000)

# Called with every record: {"event": name, "at": time, …}, and for text {"event": "text", "at": …, "of": …, "text": …}.
# They must not raise, and may log.
followers: list[Callable[[Record], None]] = []

os.register_at_fork(after_in_child=followers.clear)  # theirs are the master's connections


def event(name: str, /, **fields: object) -> None:
    """Log an event. Values that contain blanks or quotes are quoted; None is left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    at = _now()
    _write(line(name, {**known, "at": at} if _wants_time() else known))
    record = {"event": name, "at": at, **known}
    recent.append(record)
    _publish(record)


def text(prefix: str, lines: str) -> None:
    """Log text of many lines, a stack or a traceback, each line behind the prefix."""
    _write("\n".join(f"{prefix}| {line}" for line in lines.splitlines()))
    _publish({"event": "text", "at": _now(), "of": prefix, "text": lines})


def summary(reason: str) -> str:
    """A reason of many lines in one: of a traceback what was raised, of anything else how it begins."""
    lines = [line for line in reason.splitlines() if line and not line.startswith("(")] or [""]
    head = f"{lines.pop(0)} " if lines[0].endswith(":") and lines[1:] else ""  # whose it is
    is_stack = "(most recent call first)" in reason
    if not is_stack and ("Traceback (" in reason or '  File "' in reason):
        return head + lines[-1]
    return head + lines[0] + (f"; and {len(lines) - 1} more" if lines[1:] and not head else "")


def line(name: str, fields: Mapping[str, object]) -> str:
    """An event as the log shows it."""
    return " ".join((name, *(f"{key}={_quoted(str(value))}" for key, value in fields.items())))


def _publish(record: Record) -> None:
    for follower in [*followers]:
        follower(record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _write(line: str) -> None:
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads the log: no reason to stop serving
        pass


def _wants_time() -> bool:
    return "JOURNAL_STREAM" not in os.environ and not sys.stderr.isatty()


def _quoted(value: str) -> str:
    if value and not any(character in value for character in ' "\n\t='):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
