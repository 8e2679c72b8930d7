"""The log: one line an event, ``event key=value …``, on standard error.

The time comes last, and only where nobody else adds one: not on a terminal, not in systemd's journal.
"""

import os
import sys
from datetime import UTC, datetime


def event(name: str, /, **fields: object) -> None:
    """Log an event. Values that contain blanks or quotes are quoted; None is left out."""
    if _wants_time():
        fields["at"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    pairs = (f"{key}={_quoted(str(value))}" for key, value in fields.items() if value is not None)
    _write(" ".join((name, *pairs)))


def text(prefix: str, lines: str) -> None:
    """Log text of many lines, a stack or a traceback, each line behind the prefix."""
    _write("\n".join(f"{prefix}| {line}" for line in lines.splitlines()))


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
