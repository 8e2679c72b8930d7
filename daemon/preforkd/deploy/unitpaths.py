"""What ``preforkd@.service`` is to see and to write to, fitted to a daemon. Pure: it knows paths, and opens nothing."""

import os
import re
from collections.abc import Iterator, Sequence

from preforkd.deploy.facts import Facts
from preforkd.deploy.sections import Sections
from preforkd.deploy.shipped import Fitted
from preforkd.deploy.unitwords import quoted
from preforkd.runtime import safe

# Where systemd makes directories for a service and gives them to its user, and how it is asked to (systemd.exec(5)).
_MADE = {
    "/run": "RuntimeDirectory",
    "/var/lib": "StateDirectory",
    "/var/cache": "CacheDirectory",
    "/var/log": "LogsDirectory",
}
_HOMES = ("/home", "/root", "/run/user")
_TEMPORARY = ("/tmp", "/var/tmp")
_CODE = "Python, code or settings are there."


def see_code(unit: Sections, facts: Facts, fitted: Fitted) -> None:
    """Have whatever is read be readable."""
    user = facts.site.user
    for path in facts.code if user != "root" else ():
        if _below(path, ["/root"]):
            fitted.notes.append(f"{path}: {user} must be allowed to read there, and /root is root's alone as a rule")
    hides_homes = unit.value("Service", "ProtectHome") not in ("", "no", "false", "read-only")
    if hides_homes and any(_below(path, _HOMES) for path in facts.code):
        unit.set("Service", "ProtectHome", "read-only", _CODE)
    hidden = [path for path in facts.code if _below(path, _TEMPORARY)]
    if hidden and unit.value("Service", "PrivateTmp") in ("yes", "true"):
        highest = [
            path for path in hidden if not _below(os.path.dirname(path), [each for each in hidden if each != path])
        ]
        why = f"{_CODE} They had better be elsewhere."
        unit.add("Service", "BindReadOnlyPaths", " ".join(map(quoted, highest)), why, "PrivateTmp")


def make_places(unit: Sections, facts: Facts, fitted: Fitted) -> None:
    """Have whatever is written to be writable."""
    for path, what in facts.written.items():
        directory = re.sub(r"^/var/run/", "/run/", os.path.dirname(path))
        if not _below(directory, [*_made(unit, safe(facts.name))]):
            _make(unit, directory, what, facts, fitted)


def _made(unit: Sections, name: str) -> Iterator[str]:
    """The directories that systemd makes for the unit as it is."""
    for parent, key in _MADE.items():
        for value in unit.values("Service", key):
            yield from (f"{parent}/{each.replace('%i', name)}" for each in value.split())


def _make(unit: Sections, directory: str, what: str, facts: Facts, fitted: Fitted) -> None:
    user, why = facts.site.user, f"For {what}."
    parent = next((each for each in _MADE if directory.startswith(f"{each}/")), None)
    if parent is not None and not _below(directory, _HOMES):
        unit.add("Service", _MADE[parent], quoted(directory.removeprefix(f"{parent}/")), why, "RuntimeDirectory")
    elif directory in _MADE and user != "root":
        own = f"{directory}/{safe(facts.name)}"
        fitted.notes.append(f"{directory}: {user} cannot make {what} there; say a directory of its own, {own}")
    else:
        if _below(directory, _TEMPORARY):
            unit.set("Service", "PrivateTmp", "no", f"{why} Others are to find it.")
        if user != "root":
            fitted.notes.append(f"{directory}: {user} must be allowed to write there, for {what}")
        unit.add("Service", "ReadWritePaths", quoted(f"-{directory}"), why, "ProtectSystem")


def _below(path: str, directories: Sequence[str]) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in directories)
