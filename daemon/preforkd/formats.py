"""How the log writes an event, and a text of many lines: as text, for systemd's journal, or in JSON. Pure.

``text``: ``event key=value …``, with the time last where nobody else adds one. ``journal``: the same, each line behind
its priority (sd-daemon(3)) and without a time. ``json``: an object a line, whatever the values are.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from preforkd.priorities import Priority


class Format(Protocol):
    """What is written is one line or several, without the last one's end."""

    def event(self, priority: Priority, at: str, name: str, fields: Mapping[str, object]) -> str: ...
    def text(self, priority: Priority, at: str, prefix: str, lines: str) -> str: ...


class Text:
    """``has_time``: whether we add it."""

    def __init__(self, has_time: bool = True) -> None:
        self.has_time = has_time

    def event(self, priority: Priority, at: str, name: str, fields: Mapping[str, object]) -> str:
        return line(name, {**fields, "at": at} if self.has_time else fields)

    def text(self, priority: Priority, at: str, prefix: str, lines: str) -> str:
        return "\n".join(f"{prefix}| {each}" for each in lines.splitlines())


class Journal:
    """Without a priority a line would have that of the unit, so each has one."""

    def event(self, priority: Priority, at: str, name: str, fields: Mapping[str, object]) -> str:
        return f"<{priority:d}>{line(name, fields)}"

    def text(self, priority: Priority, at: str, prefix: str, lines: str) -> str:
        return "\n".join(f"<{priority:d}>{prefix}| {each}" for each in lines.splitlines())


class Json:
    """A text is one object with all its lines."""

    def event(self, priority: Priority, at: str, name: str, fields: Mapping[str, object]) -> str:
        head = {"at": at, "level": priority.name.lower(), "event": name}
        return _json({**head, **{f"{key}_" if key in head else key: value for key, value in fields.items()}})

    def text(self, priority: Priority, at: str, prefix: str, lines: str) -> str:
        return _json({"at": at, "level": priority.name.lower(), "event": "text", "of": prefix, "text": lines})


def line(name: str, fields: Mapping[str, object]) -> str:
    """An event as text. Values that contain blanks, quotes or controls are quoted."""
    return " ".join((name, *(f"{key}={_quoted(str(value))}" for key, value in fields.items())))


def _quoted(value: str) -> str:
    if value and value.isprintable() and not any(character in value for character in ' "='):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def printable(value: str) -> str:
    """Without what a terminal would take for a command: a mark, or a peer's path, may be a client's."""
    if value.isprintable():
        return value
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in value)


def _json(record: Mapping[str, object]) -> str:
    try:
        return msgspec.json.encode(record, enc_hook=str).decode()
    except (UnicodeEncodeError, OverflowError, TypeError):  # bytes that are no text; a number beyond 64 bits
        known = {_plain(str(key)): _plain(value) for key, value in record.items()}
        return msgspec.json.encode(known).decode()


def _plain(value: object) -> object:
    if isinstance(value, bool | float | None):
        return value
    return str(value).encode(errors="backslashreplace").decode()
