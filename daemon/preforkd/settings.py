"""Every setting, declared once: type, default, bounds, unit and help. Whatever else needs them is made from here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import NODEFAULT, Meta, Struct, field, inspect

_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _duration(help_text: str, at_least: float = 0.0, at_most: float = 86400.0) -> Meta:
    return Meta(ge=at_least, le=at_most, description=help_text, extra={"unit": "s", "suffixes": _DURATIONS})


_NEEDS_RESTART = {"needs_restart": True}  # a reload that finds it changed is refused


def _size(help_text: str, at_most: int) -> Meta:
    return Meta(ge=0, le=at_most, description=help_text, extra={"unit": "bytes", "suffixes": _SIZES})


_WORKERS = {"unit": "workers"}
MOST_CHILDREN = 4096


class Service(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be said of one service."""

    target: Annotated[
        str,
        Meta(
            min_length=1,
            description="`module:name` or `file.py:name`: handler class, server class, instance or factory",
        ),
    ]
    handler: Annotated[
        str, Meta(description="the handler of a server class that does not bring its own, as `module:name`")
    ] = ""
    listen: Annotated[
        list[str],
        Meta(
            description="addresses, as `tcp://host:port`, `udp://…`, `unix:path`, `unix-dgram:path`, `fd:3`, `fd:NAME`"
        ),
    ] = field(default_factory=list)
    kind: Annotated[Literal["process"], Meta(description="kind of worker: `process` handles one request at a time")] = (
        "process"
    )
    max_children: Annotated[int, Meta(ge=1, le=MOST_CHILDREN, description="workers", extra=_WORKERS)] = 4
    preload: Annotated[
        bool, Meta(description="import the target once and fork workers from there; false: each worker imports it")
    ] = True
    request_queue_size: Annotated[
        int, Meta(ge=1, le=65535, description="connections that may wait, listen(2)", extra={"unit": "connections"})
    ] = 1024
    allow_reuse_address: Annotated[
        bool, Meta(description="bind a TCP port although old connections linger on it", extra=_NEEDS_RESTART)
    ] = True
    allow_reuse_port: Annotated[
        bool, Meta(description="share the port with other masters (SO_REUSEPORT)", extra=_NEEDS_RESTART)
    ] = False
    max_packet_size: Annotated[int, _size("longest datagram; 0: what the server class says", 1 << 20)] = 0
    boot_timeout: Annotated[
        float, _duration("for importing the target, and for a worker to become ready", at_least=0.1)
    ] = 30.0
    graceful_timeout: Annotated[float, _duration("for a worker told to stop to finish what it holds")] = 30.0
    eof_timeout: Annotated[float, _duration("after that, with end-of-file for those who wait for their client")] = 5.0
    block_on_close: Annotated[
        bool, Meta(description="wait for the workers at stop; false: leave them to finish alone")
    ] = True
    max_surge: Annotated[
        int, Meta(ge=0, le=4096, description="workers more than `max_children` during a reload", extra=_WORKERS)
    ] = 1
    max_unavailable: Annotated[
        int, Meta(ge=0, le=4096, description="workers less that are ready during a reload", extra=_WORKERS)
    ] = 0
    probation: Annotated[
        float,
        _duration("how long a reload tries one worker before the others are replaced; 0: not at all", at_most=3600.0),
    ] = 5.0
    probation_requests: Annotated[
        int, Meta(ge=1, le=1_000_000, description="or until it has ended so many", extra={"unit": "requests"})
    ] = 50
    probation_max_error_ratio: Annotated[
        float,
        Meta(ge=0, le=1, description="more errors than this, and than twice the old workers', and it has failed"),
    ] = 0.1
    on_mold: Annotated[
        str, Meta(description="hook, `name` in the target's module or `module:name`: after the import, `f(server)`")
    ] = ""
    on_worker_start: Annotated[str, Meta(description="hook: in a worker before it serves, `f(server, slot)`")] = ""
    on_drain: Annotated[str, Meta(description="hook: in a worker when it is told to drain, `f(server)`")] = ""
    on_worker_stop: Annotated[str, Meta(description="hook: in a worker after its last request, `f(server)`")] = ""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be said of the daemon, and its services."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[\w.@:-]*$",
            description="the daemon's, in process titles; empty: after the file or the target",
            extra=_NEEDS_RESTART,
        ),
    ] = ""
    metrics: Annotated[
        str, Meta(description="address of the exporter, `/metrics`, `/healthz`, `/readyz`; empty: none")
    ] = ""
    control: Annotated[
        str,
        Meta(description="path of the control socket; empty: in the runtime directory", extra=_NEEDS_RESTART),
    ] = ""
    takeover_timeout: Annotated[
        float, _duration("at start, for those of an earlier instance to leave, if some still live")
    ] = 10.0
    ready_fd: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="descriptor to write a newline to when ready, as s6 wants it; 0: none",
            extra=_NEEDS_RESTART,
        ),
    ] = 0
    max_old_generations: Annotated[
        int, Meta(ge=1, le=100, description="that may be draining; the oldest beyond is hurried")
    ] = 3
    services: dict[str, Service] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One declaration, in the form that conversion and the reference need."""

    key: str
    type: Any
    default: object
    help: str
    unit: str
    suffixes: dict[str, float]
    needs_restart: bool

    def convert(self, raw: object, *, is_text: bool) -> Any:
        """The value of the declared type. ``is_text``: from a place where everything is text.

        Raises ValueError with what is wanted instead.
        """
        info = inspect.type_info(self.type)
        value = self._scale(raw)
        if is_text and isinstance(raw, str) and isinstance(_plain(info), inspect.ListType):
            value = raw.replace(",", " ").split()
        try:
            return msgspec.convert(value, self.type, strict=not is_text)
        except msgspec.ValidationError:
            raise ValueError(f"{_wanted(info, value, self.suffixes)}, not {_shown(raw)}") from None

    def _scale(self, raw: object) -> object:
        """``"30s"`` as seconds, ``"512M"`` as bytes; anything else unchanged."""
        match = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", raw) if self.suffixes and isinstance(raw, str) else None
        if match is None or match[2] not in self.suffixes:
            return raw
        try:
            scaled = float(match[1]) * self.suffixes[match[2]]
        except ValueError:
            return raw
        return int(scaled) if self.suffixes is _SIZES else scaled


def _settings(struct: type[Struct]) -> Iterator[Setting]:
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
            )


DAEMON = {setting.key: setting for setting in _settings(Settings)}
SERVICE = {setting.key: setting for setting in _settings(Service)}


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
                return f"at least {plain.ge:.15g}"
            if number is not None and plain.le is not None and number > plain.le:
                return f"at most {plain.le:.15g}"
            kind = "a whole number" if isinstance(plain, inspect.IntType) else "a number"
            return f"{kind} or text such as {_EXAMPLES[next(iter(suffixes))]}" if suffixes else kind
    return f"a {plain}"


_EXAMPLES = {"ms": '"30s" or "2m"', "K": '"64K" or "512M"'}


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        return None


def _shown(raw: object) -> str:
    return {True: "true", False: "false"}[raw] if isinstance(raw, bool) else repr(raw)


def reference() -> str:
    """The table of all settings, as ``preforkd settings`` prints it and README shows it."""
    lines = ["| setting | default | from … to | |", "| --- | --- | --- | --- |"]
    for prefix, settings in (("", DAEMON), ("services.*NAME*.", SERVICE)):
        for setting in settings.values():
            help_text = f"{setting.help}; needs a restart" if setting.needs_restart else setting.help
            lines.append(f"| {prefix}`{setting.key}` | {_default_of(setting)} | {_bounds_of(setting)} | {help_text} |")
    return "\n".join(lines)


def _default_of(setting: Setting) -> str:
    match setting.default:
        case value if value is NODEFAULT:
            return "required"
        case None | "" | []:
            return ""
        case bool():
            return str(setting.default).lower()
        case float() | int():
            return f"{setting.default:g} {setting.unit}".rstrip()
    return str(setting.default)


def _bounds_of(setting: Setting) -> str:
    plain = _plain(inspect.type_info(setting.type))
    if isinstance(plain, inspect.IntType | inspect.FloatType):
        return f"{plain.ge or 0:.15g} … {plain.le:.15g} {setting.unit}".rstrip()
    return ""
