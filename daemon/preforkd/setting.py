"""One setting, as it is declared by a type and its notes: what a value of it may be, and how the reference shows it.

Which settings there are is in ``settings.py``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import NODEFAULT, Meta, Struct, inspect

_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def duration(help_text: str, at_least: float = 0.0, at_most: float = 86400.0) -> Meta:
    """The notes of a time in seconds, which may be written with a suffix."""
    return Meta(ge=at_least, le=at_most, description=help_text, extra={"unit": "s", "suffixes": _DURATIONS})


def size(help_text: str, at_most: int) -> Meta:
    """The notes of a number of bytes, which may be written with a suffix."""
    return Meta(ge=0, le=at_most, description=help_text, extra={"unit": "bytes", "suffixes": _SIZES})


def whole_number(raw: object) -> int:
    """A number, or text of one, with the suffix of a size perhaps. Raises ValueError."""
    value = _scaled(raw, _SIZES)
    if not isinstance(value, int | str):
        raise ValueError(f"{value} is no whole number")
    return int(value)


class Setting(Struct, frozen=True):
    """One declaration, in the form that conversion and the reference need."""

    key: str
    type: Any
    default: object
    help: str
    unit: str
    suffixes: dict[str, float]
    needs_restart: bool
    read: Callable[[object], object] | None = None  # what reads it, where a type alone cannot say what is allowed

    def convert(self, raw: object, *, is_text: bool) -> Any:
        """The value of the declared type. ``is_text``: from a place where everything is text.

        Raises ValueError with what is wanted instead.
        """
        if self.read is not None:
            return self.read(raw)
        info = inspect.type_info(self.type)
        value = _scaled(raw, self.suffixes)
        if is_text and isinstance(raw, str) and isinstance(_plain(info), inspect.ListType):
            value = raw.replace(",", " ").split()
        try:
            return msgspec.convert(value, self.type, strict=not is_text)
        except msgspec.ValidationError:
            raise ValueError(f"{_wanted(info, value, self.suffixes)}, not {shown(raw)}") from None


def declared_in(struct: type[Struct]) -> Iterator[Setting]:
    """The settings that a struct declares, in its order."""
    for declared in msgspec.structs.fields(struct):
        meta = next((note for note in getattr(declared.type, "__metadata__", ()) if isinstance(note, Meta)), None)
        if meta is not None:
            default = declared.default if declared.default_factory is NODEFAULT else declared.default_factory()
            extra = meta.extra or {}
            help_text = meta.description or ""
            yield Setting(
                declared.name,
                declared.type,
                default,
                help_text,
                extra.get("unit", ""),
                extra.get("suffixes", {}),
                extra.get("needs_restart", False),
                extra.get("read"),
            )


def _scaled(raw: Any, suffixes: Mapping[str, float]) -> Any:
    """``"30s"`` as seconds, ``"512M"`` as bytes; anything else unchanged."""
    match = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", raw) if suffixes and isinstance(raw, str) else None
    if match is None or match[2] not in suffixes:
        return raw
    try:
        scaled = float(match[1]) * suffixes[match[2]]
    except ValueError:
        return raw
    return int(scaled) if suffixes is _SIZES else scaled


def _plain(info: inspect.Type) -> inspect.Type:
    """The type that was declared, without its annotations."""
    return info.type if isinstance(info, inspect.Metadata) else info


def _wanted(info: inspect.Type, value: object, suffixes: dict[str, float]) -> str:
    """What a value should have been: the bound that it broke, or the type."""
    plain = _plain(info)
    match plain:
        case inspect.LiteralType():
            return f"one of {', '.join(map(str, plain.values))}"
        case inspect.BoolType():
            return "true or false"
        case inspect.ListType():
            return "a list of strings"
        case inspect.StrType():
            if not isinstance(value, str):
                return "a string"
            return f"text that matches {plain.pattern}" if plain.pattern else "text that is not empty"
        case inspect.IntType() | inspect.FloatType():
            number = _number(value)
            if number is not None and plain.ge is not None and number < plain.ge:
                return f"at least {_bound(plain.ge, suffixes)}"
            if number is not None and plain.le is not None and number > plain.le:
                return f"at most {_bound(plain.le, suffixes)}"
            kind = "a whole number" if isinstance(plain, inspect.IntType) else "a number"
            return f"{kind} or text such as {_EXAMPLES[next(iter(suffixes))]}" if suffixes else kind
    return f"a {plain}"


_EXAMPLES = {"ms": '"30s" or "2m"', "K": '"64K" or "512M"'}


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        return None


def shown(raw: object) -> str:
    """A value as a message shows it."""
    return {True: "true", False: "false"}[raw] if isinstance(raw, bool) else repr(raw)


def table(whose: str, settings: Mapping[str, Setting]) -> str:
    """The reference of settings of the daemon, say."""
    lines = [f"| setting {whose} | default | from … to | meaning |", "| --- | --- | --- | --- |"]
    for setting in settings.values():
        help_text = f"{setting.help}; needs a restart" if setting.needs_restart else setting.help
        lines.append(f"| `{setting.key}` | {_default_of(setting)} | {_bounds_of(setting)} | {help_text} |")
    return "\n".join(lines)


def _default_of(setting: Setting) -> str:
    match setting.default:
        case value if value is NODEFAULT:
            return "required"
        case None | "" | []:
            return ""
        case dict():
            return ""
        case bool():
            return str(setting.default).lower()
        case float() | int():
            return f"{setting.default:g} {setting.unit}".rstrip()
    return str(setting.default)


def _bounds_of(setting: Setting) -> str:
    plain = _plain(inspect.type_info(setting.type))
    if isinstance(plain, inspect.IntType | inspect.FloatType):
        least, most = (_bound(bound or 0, setting.suffixes) for bound in (plain.ge, plain.le))
        return f"{least} … {most}"  # in the unit of the default
    return ""


def _bound(value: float, suffixes: Mapping[str, float]) -> str:
    """A bound as it may be written: a size with its greatest suffix."""
    fitting = [name for name, factor in suffixes.items() if suffixes is _SIZES and value and value % factor == 0]
    return f"{value / _SIZES[fitting[-1]]:g}{fitting[-1]}" if fitting else f"{value:.15g}"
