"""Where settings come from: file, environment and command line, laid over each other and checked as a whole.

A value keeps the name of the place it came from, so that a fault can say where to mend it; and checking goes on after
the first fault, so that all are said at once.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from preforkd import wear
from preforkd.addresses import Address, AddressError, parse
from preforkd.setting import Setting
from preforkd.settings import DAEMON, SERVICE, Service, Settings
from preforkd.sizing import Bounds
from preforkd_workers.scoreboard import MOST_LANES
from preforkd_workers.spec import is_script
from preforkd_workers.spelling import hint

ENVIRONMENT = "PREFORKD_"
# What Kubernetes sets in every container beside a Service that is called preforkd: not meant for us.
_KUBERNETES = ("PREFORKD_SERVICE_HOST", "PREFORKD_SERVICE_PORT", "PREFORKD_PORT")
EXPORTER = "metrics"  # the service of the exporter; no other may have the name


class Value(Struct, frozen=True):
    """A value and its origin. ``service``: of which one; None: of the daemon, or else of every service."""

    where: str
    service: str | None
    key: str
    raw: object
    is_text: bool = False  # from a place where everything is text


class Faults(Exception):
    """Everything that is wrong with the settings, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


class Checked(Struct, frozen=True):
    """Settings without a fault, and their addresses understood."""

    settings: Settings
    addresses: Mapping[str, Sequence[Address]]  # by service, the exporter's included


def from_file(path: str) -> tuple[list[Value], list[str]]:
    """The values in a TOML file, and the faults of its shape. Raises Faults when it cannot be read at all."""
    import tomllib  # here and not above: a daemon of one handler has no file

    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise Faults([f"{path}: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Faults([f"{path}: {error}"]) from None
    services = table.pop("services", {})
    values, faults = [Value(key, None, key, raw) for key, raw in table.items()], []
    if not isinstance(services, dict):
        return values, ["services: want a table for each, [services.NAME]"]
    for name, service in services.items():
        if isinstance(service, dict):
            values += [Value(f"services.{name}.{key}", name, key, raw) for key, raw in service.items()]
        if not isinstance(service, dict) or not service:
            faults.append(f"services.{name}: want a table with a target and a listen, not {service!r}")
    return values, faults


def from_environment(environment: Mapping[str, str]) -> list[Value]:
    """``PREFORKD_KEY`` and ``PREFORKD_SERVICES__NAME__KEY``. A service's key without a name is for every service.

    In NAME case does not matter, and an underscore stands for whatever the name of a variable cannot hold.
    """
    return [
        _from_path(variable, variable.removeprefix(ENVIRONMENT).lower().split("__"), raw)
        for variable, raw in sorted(environment.items())
        if variable.startswith(ENVIRONMENT) and not variable.startswith(_KUBERNETES)
    ]


def from_pairs(pairs: Sequence[str]) -> list[Value]:
    """``KEY=VALUE`` and ``services.NAME.KEY=VALUE``, as ``--set`` takes them. Raises Faults on other shapes."""
    if wrong := [f"--set {pair}: want KEY=VALUE" for pair in pairs if not pair.partition("=")[1]]:
        raise Faults(wrong)
    parts = [pair.partition("=") for pair in pairs]
    return [_from_path(f"--set {path}", path.split("."), raw) for path, _, raw in parts]


def _from_path(where: str, path: list[str], raw: str) -> Value:
    match path:
        case ["services", service, key]:
            return Value(where, service, key, raw, is_text=True)
    return Value(where, None, ".".join(path), raw, is_text=True)


def check(values: Sequence[Value], name: str, faults: Sequence[str] = ()) -> Checked:
    """Lay the values over each other, the later over the earlier, and check everything.

    ``name`` is the daemon's unless a value says otherwise; ``faults`` are those found so far.
    Raises Faults with all there are.
    """
    laid = _Layers(name, faults)
    # Text names a service, but does not make one: that is for the file, or for the target on the command line.
    laid.services = {value.service: {} for value in values if value.service is not None and not value.is_text}
    for value in values:
        laid.lay(replace(value, service=_meant(value.service, laid.services)) if value.is_text else value)
    return laid.finish()


def _meant(name: str | None, services: Mapping[str, object]) -> str | None:
    """The service that is spelt so in the name of an environment variable, if it is no service's name as it stands."""
    alike = [service for service in services if re.sub(r"\W", "_", service).lower() == name]
    return alike[0] if name not in services and len(alike) == 1 else name


# Schemes of addresses that take datagrams; of a descriptor it is not known yet.
_DATAGRAMS = {"udp", "unix-dgram"}


class _Layers:
    """The values that have won so far, where they came from, and the faults."""

    def __init__(self, name: str, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        self.daemon: dict[str, Any] = {"name": name}
        self.services: dict[str, dict[str, Any]] = {}
        self.origins: dict[tuple[str, str], str] = {}
        self.unusable: set[tuple[str | None, str]] = set()  # given, but not a value of its type: no second fault

    def lay(self, value: Value) -> None:
        """Let a value take the place of what a layer below has said."""
        if value.service is not None and value.service not in self.services:
            return self._fault(value.where, _unknown("service", value.service, self.services))
        is_daemons = value.service is None and value.key in DAEMON
        if not is_daemons and value.key not in SERVICE:
            known = SERVICE if value.service else {**DAEMON, **SERVICE} if value.is_text else DAEMON
            return self._fault(value.where, _unknown("setting", value.key, known))
        if not is_daemons and value.service is None and not value.is_text:
            return self._fault(value.where, f"is a setting of a service: [services.NAME] {value.key} = …")
        setting = DAEMON[value.key] if is_daemons else SERVICE[value.key]
        try:
            converted = setting.convert(value.raw, is_text=value.is_text)
        except ValueError as error:
            self.unusable |= {(service, value.key) for service in ([value.service] if value.service else self.services)}
            return self._fault(value.where, str(error))
        if is_daemons:
            self.daemon[value.key] = converted
            return None
        for service in [value.service] if value.service else self.services:
            self.services[service][value.key] = converted
            self.origins[service, value.key] = value.where
        return None

    def finish(self) -> Checked:
        """Check what concerns several values, and make the settings."""
        if not self.services and not self.faults:
            self._fault("services", "none; want a table [services.NAME] for each")
        for service, values in self.services.items():
            if service == EXPORTER:
                self._fault(f"services.{service}", "the name is the exporter's; choose another")
            if "target" not in values and (service, "target") not in self.unusable:
                self._fault(f"services.{service}.target", "required: what to serve, as module:name")
            runs_script = is_script(values.get("target", ""))
            if runs_script:
                self._check_script(service, values)
            elif not values.get("listen") and (service, "listen") not in self.unusable:
                self._fault(self._origin(service, "listen"), "at least one address, such as tcp://127.0.0.1:9999")
            if values.get("kind") == "gevent" and find_spec("gevent") is None:
                self._fault(self._origin(service, "kind"), "gevent is not installed: pip install 'preforkd[gevent]'")
            self._check_lanes(service, values)
            if values.get("max_surge", 1) == values.get("max_unavailable", 0) == 0:
                self._fault(self._origin(service, "max_surge"), "at least 1, or max_unavailable at least 1")
            wanted = Service(**{"target": "", **values})
            for key, fault in (*Bounds.of(wanted).contradictions(), *wear.contradictions(wanted)):
                self._fault(self._origin(service, key), fault)
            for key in ("args", "server") if not runs_script else ():
                if key in values:
                    self._fault(
                        self._origin(service, key), "is for a script, file.py or -m module, and no other target"
                    )
        if self.daemon.get("log_format") == "json" and find_spec("pythonjsonlogger") is None:
            self._fault("log_format", "python-json-logger is not installed: pip install 'preforkd[json]'")
        lanes = sum(_lanes(values) for values in self.services.values())
        if lanes > MOST_LANES:
            self._fault("services", f"{lanes} lanes of all workers; want at most {MOST_LANES}, threads or greenlets")
        addresses = self._addresses()
        for service in self.services:
            self._check_kinds(service, {address.scheme for address in addresses.get(service, ())})
        if self.faults:
            raise Faults(self.faults)
        services = {name: Service(**values) for name, values in self.services.items()}
        return Checked(Settings(**self.daemon, services=services), addresses)

    def _check_lanes(self, service: str, values: Mapping[str, Any]) -> None:
        """Whether somebody wants many lanes, and has forgotten to say of which kind."""
        for key, kind in ("threads", "thread"), ("greenlets", "gevent"):
            if key in values and "kind" not in values and (service, "kind") not in self.unusable:
                self._fault(self._origin(service, key), f"is for another kind of worker; set kind = {kind} as well")

    def _check_script(self, service: str, values: Mapping[str, Any]) -> None:
        """What cannot be said of a script."""
        if values.get("handler"):
            self._fault(self._origin(service, "handler"), "a script brings its own")
        if not values.get("preload", True):
            self._fault(self._origin(service, "preload"), "a script runs once, in the mold, and not in each worker")
        if len(values.get("listen", ())) > 1:
            several = "one server has one socket; for a script's second: a service with server = 2 and its own listen"
            self._fault(self._origin(service, "listen"), several)
        for other, theirs in self.services.items():
            if other == service:
                return
            if _served_by(theirs) == _served_by(values):
                self._fault(
                    self._origin(service, "target"), f"server {_served_by(values)[-1]} of it is served by {other}"
                )

    def _check_kinds(self, service: str, schemes: set[str]) -> None:
        """Whether what is for connections has connections to be for."""
        values, datagrams = self.services[service], schemes & _DATAGRAMS
        for key in ("idle_timeout", "max_per_client"):
            if values.get(key) and schemes and schemes == datagrams:
                self._fault(self._origin(service, key), "is for connections, and the service has none: only datagrams")
        if values.get("when_full") == "close" and datagrams:
            self._fault(self._origin(service, "when_full"), "close is for connections; datagrams cannot be turned away")

    def _addresses(self) -> dict[str, list[Address]]:
        """Every address, understood, with no two alike."""
        urls = [(self._origin(name, "listen"), name, url) for name in self.services for url in self._listen(name)]
        if self.daemon.get("metrics"):
            urls.append((EXPORTER, EXPORTER, self.daemon["metrics"]))
        found: dict[str, list[Address]] = {service: [] for service in self.services}
        taken: dict[object, str] = {}
        for where, service, url in urls:
            try:
                address = parse(url)
            except AddressError as error:
                self._fault(where, str(error))
                continue
            if address.place in taken:
                self._fault(where, f"{url} is taken by {taken[address.place]} already")
            if address.place is not None:
                taken[address.place] = service
            found.setdefault(service, []).append(address)
        return found

    def _listen(self, service: str) -> list[str]:
        listen: list[str] = self.services[service].get("listen", [])
        return listen

    def _origin(self, service: str, key: str) -> str:
        return self.origins.get((service, key), f"services.{service}.{key}")

    def _fault(self, where: str, message: str) -> None:
        self.faults.append(f"{where}: {message}")


def changes_that_need_a_restart(before: Checked, after: Checked) -> list[str]:
    """What a reload cannot bring into effect, a line each."""
    pairs: list[tuple[str, Struct, Struct, Mapping[str, Setting]]] = [("", before.settings, after.settings, DAEMON)]
    for name, service in after.settings.services.items():
        if name in before.settings.services:
            pairs.append((f"services.{name}.", before.settings.services[name], service, SERVICE))
    return [
        f"{prefix}{key}: changed, which a reload cannot bring into effect; needs a restart"
        for prefix, old, new, declared in pairs
        for key, setting in declared.items()
        if setting.needs_restart and getattr(old, key) != getattr(new, key)
    ]


def _served_by(values: Mapping[str, Any]) -> tuple[object, ...]:
    """Which server of which script a service is for."""
    return values["target"], values.get("args", []), values.get("server", 1)


def _lanes(values: Mapping[str, Any]) -> int:
    """How many lanes a service has when all its workers are there."""
    wanted = Service(**{"target": "", **values})
    return wanted.max_children * wanted.lanes


def _unknown(what: str, name: str, known: Mapping[str, object]) -> str:
    return f"unknown {what} {name!r}{hint(name, known)}"
