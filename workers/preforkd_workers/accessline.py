"""A line of an access log: its fields, and what a format makes of them. It writes nothing.

A format is text with fields in braces, as ``str.format`` has them, or ``json``. A value can be told from what is around
it whatever a client sends: control characters, quotes and backslashes in it are escaped.
"""

import json
import re
from collections.abc import Callable
from string import Formatter
from time import gmtime, strftime, time_ns
from typing import Any

from preforkd_workers.spelling import hint

JSON = "json"

TIME = " at={at}"

# How many characters a field may be made at least.
WIDEST = 999

# The log's own style: event key=value.
DEFAULT = (
    "request service={service} slot={slot} gen={gen} pid={pid} peer={peer} listener={listener} outcome={outcome} "
    f'duration={{duration_ms}}ms mark="{{mark}}"{TIME}'
)

# Every field with one of its values. Those from ``lane`` on are of a request, the others of a worker.
FIELDS: dict[str, str | int | float] = {
    "service": "echo",
    "slot": 0,
    "gen": 1,
    "pid": 4711,
    "lane": 0,
    "peer": "192.0.2.1:50000",
    "listener": "tcp://0.0.0.0:9999",
    "outcome": "ok",  # ok, error or refused
    "duration": 0.001234,  # in seconds
    "duration_ms": 1.234,
    "mark": "",  # what the handler has said with server.mark(text)
    "at": "2026-01-01T00:00:00.000Z",  # when it ended
}

_IN_JSON = ("service", "slot", "gen", "pid", "lane", "peer", "listener", "outcome", "duration", "mark")

# A line of a request: lane, peer, listener, outcome, duration in nanoseconds, mark.
Line = Callable[[int, str, str, str, int, str], bytes]


def check_format(raw: object) -> str:
    """A format, if it is one. Raises ValueError with what is wanted instead."""
    if not isinstance(raw, str):
        raise ValueError(f"{JSON}, or text with fields such as {{peer}}, not {raw!r}")
    try:
        for name, specification in _fields(raw):
            if name not in FIELDS:
                raise ValueError(f"unknown field {name!r} of {', '.join(FIELDS)}{hint(name, FIELDS)}")
            _check_specification(name, specification)
        if "\n" in raw.format(**FIELDS):
            raise ValueError("one line, for it is that of one request")
    except (LookupError, AttributeError) as error:
        raise ValueError(f"text that str.format takes: {error}") from None
    return raw


def _fields(template: str) -> list[tuple[str, str]]:
    """The fields that a template names, each with its specification."""
    return [(name, how or "") for _, name, how, _ in Formatter().parse(template) if name is not None]


def _check_specification(name: str, specification: str) -> None:
    """What is right for one value has to be right for all that come: a line must not raise, nor be endless."""
    if "{" in specification:
        raise ValueError(f"{{{name}:…}} without another field in it")
    if re.search(f"[0-9]{{{len(str(WIDEST)) + 1}}}", specification):
        raise ValueError(f"{{{name}:…}} of at most {WIDEST} characters")
    if specification.endswith("c"):  # a number as a character, which may be the end of a line
        raise ValueError(f"Unknown format code 'c' for {name}")


def line_of(template: str, service: str, slot: int, gen: int, pid: int) -> Line:
    """What makes the lines of one worker. ``template``: a format, as ``check_format`` returns it."""
    encode = _escaped
    if template == JSON:
        encode = _quoted
        fields = ",".join(f'"{name}":{{{name}}}' for name in _IN_JSON)
        template = f'{{{{"at":{{at}},"level":"info","event":"request",{fields}}}}}'
    form = f"{template}\n".format
    worker: dict[str, Any] = {"service": encode(service), "slot": slot, "gen": gen, "pid": pid}
    clock = _Clock(encode)

    def line(lane: int, peer: str, listener: str, outcome: str, duration: int, mark: str) -> bytes:
        return form(
            lane=lane,
            peer=encode(peer),
            listener=encode(listener),
            outcome=encode(outcome),
            duration=round(duration / 1e9, 6),
            duration_ms=round(duration / 1e6, 3),
            mark=encode(mark),
            at=clock.now(),
            **worker,
        ).encode(errors="replace")

    return line


class _Clock:
    """The time as the log has it, in UTC. What a second has is made once."""

    def __init__(self, encode: Callable[[str], str]) -> None:
        self._encode = encode
        self._second, self._text = -1, ""

    def now(self) -> str:
        second, rest = divmod(time_ns(), 1_000_000_000)
        if second != self._second:
            self._second, self._text = second, self._encode(strftime("%Y-%m-%dT%H:%M:%S.%%03dZ", gmtime(second)))
        return self._text % (rest // 1_000_000)


def _quoted(value: str) -> str:
    return json.dumps(value or None)


def _escaped(value: str) -> str:
    if not value:
        return "-"
    if value.isprintable() and '"' not in value and "\\" not in value:
        return value
    return "".join(map(_escape, value))


def _escape(character: str) -> str:
    if character.isprintable() and character not in '"\\':
        return character
    return character.encode("unicode_escape").decode() if character != '"' else '\\"'
