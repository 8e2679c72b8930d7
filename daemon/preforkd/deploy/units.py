"""The files of systemd, fitted to a daemon: the shipped ones with values replaced and lines added. Pure: text to text.

What may stay as it is stays, so that who reads a fitted unit sees the shipped one; what is changed says why.
"""

import re
from collections.abc import Iterator, Mapping
from math import ceil
from resource import RLIM_INFINITY

from preforkd.deploy.facts import Facts
from preforkd.deploy.sections import Sections
from preforkd.deploy.shipped import Fitted
from preforkd.deploy.socketunits import fit_sockets, names_of
from preforkd.deploy.unitpaths import make_places, see_code
from preforkd.deploy.unitwords import command, escaped, instance_of, quoted
from preforkd.runtime import safe

# What systemd gives a service that says nothing of it: the soft limit on open descriptors (systemd.exec(5)), and tasks
# on a machine with an ordinary kernel.pid_max (systemd-system.conf(5), DefaultTasksMax).
ORDINARY_DESCRIPTORS = 1024
ORDINARY_TASKS = 4096

# The hard limits that are not infinite then, or may not be; 0: that depends on the machine.
_HARD = {"memlock": 65_536, "msgqueue": 819_200, "rtprio": 0, "nproc": 0, "sigpending": 0}
_MOST_DESCRIPTORS = 524_288

_ROOM = "OOMPolicy"  # behind what else is said of resources


def fit_units(shipped: Mapping[str, str], facts: Facts) -> Fitted:
    """Fit the units and what goes with them. The service's is that of an instance, in place of the template.

    Raises Faults where systemd cannot pass what the settings ask for.
    """
    fitted, user = Fitted(), facts.site.user
    instance = instance_of(facts.name)
    _fit_service(shipped["preforkd@.service"], facts, instance, fitted)
    fit_sockets(shipped["preforkd@.socket"], facts, instance, fitted)
    if user != "root":
        users = re.sub(r"(?m)^(u\s+)\S+", lambda found: found[1] + user, shipped["preforkd.sysusers"])
        fitted.add("preforkd.sysusers", users, is_shared=True)
    directories = re.sub(r"(?m)^(\w\s+\S+\s+\d+\s+\w+\s+)preforkd\b", rf"\g<1>{user}", shipped["preforkd.tmpfiles"])
    fitted.add("preforkd.tmpfiles", directories, is_shared=True)
    return fitted


def _fit_service(text: str, facts: Facts, instance: str, fitted: Fitted) -> None:
    unit = Sections(text if instance == safe(facts.name) else _without_specifier(text, safe(facts.name)))
    _who(unit, facts)
    _patience(unit, facts)
    _room(unit, facts)
    _rights(unit, facts)
    see_code(unit, facts, fitted)
    make_places(unit, facts, fitted)
    if facts.leaves_workers:
        unit.set("Service", "KillMode", "process", "block_on_close = false: workers are left to finish alone.")
        unit.set("Service", "ExitType", "main")
    if sockets := names_of(facts, instance):
        unit.set("Service", "Sockets", " ".join(sockets), "What the settings have as fd: in listen.", "Group")
    for service in facts.scripts:
        fitted.notes.append(
            f"services.{service}: what its script binds is not known here; for a port below 1024 say listen"
        )
    fitted.add(f"preforkd@{instance}.service", unit.text)


def _without_specifier(text: str, name: str) -> str:
    """With the name of the directories of a daemon that is escaped in another way as an instance."""
    replaced = escaped(name)
    return re.sub(r"(?m)^((?:Runtime|State|Working)Directory=.*)%i", lambda found: f"{found[1]}{replaced}", text)


def _who(unit: Sections, facts: Facts) -> None:
    site = facts.site
    for key in ("User", "Group"):
        unit.set("Service", key, escaped(site.user))
    if facts.is_relative:
        unit.set("Service", "WorkingDirectory", escaped(site.directory), "Where relative paths and modules begin.")
    for name, value in site.environment.items():
        unit.add("Service", "Environment", quoted(f"{name}={value}"), near="WorkingDirectory")
    for key, verb in ("ExecStartPre", "check"), ("ExecStart", "serve"):
        prefix = re.match(r"[-@:+!|]*", unit.value("Service", key))  # systemd.service(5), special executable prefixes
        words = command(*site.serve, verb, *site.options, *site.target)
        unit.set("Service", key, f"{prefix[0] if prefix else ''}{words}")
    asked = command("-s", facts.control) if facts.control else "%i" if _is_plain(facts.name) else command(facts.name)
    unit.set("Service", "ExecReload", f"{command(*site.control)} {asked} reload")


def _is_plain(name: str) -> bool:
    return name == instance_of(name)


def _patience(unit: Sections, facts: Facts) -> None:
    start = ceil(max(facts.check_time, facts.takeover_time + facts.boot_time))
    _at_least(unit, "TimeoutStartSec", start, "Longer than takeover_timeout and every boot_timeout of the settings.")
    why = "Longer than graceful_timeout + eof_timeout of the settings, the kill, and the exporter's end."
    _at_least(unit, "TimeoutStopSec", ceil(facts.stop_time), why)
    why = "Longer than graceful_timeout + eof_timeout of the settings."
    _at_least(unit, "WatchdogSec", ceil(facts.orphan_time), why)


def _at_least(unit: Sections, key: str, seconds: int, why: str) -> None:
    said = re.fullmatch(r"(\d+)s?", unit.value("Service", key))
    if said is None or int(said[1]) < seconds:
        unit.set("Service", key, f"{seconds}s", why)


def _room(unit: Sections, facts: Facts) -> None:
    if 2 * facts.tasks > ORDINARY_TASKS:
        why = f"Processes and threads: {facts.tasks} at most; twice that, for handlers run programs as well."
        unit.set("Service", "TasksMax", str(2 * facts.tasks), why, _ROOM)
    kept = 2 * facts.listeners + 1
    if kept > int(unit.value("Service", "FileDescriptorStoreMax") or 0):
        unit.set("Service", "FileDescriptorStoreMax", str(kept), "All listeners twice: a reload may change them all.")
    for name, limit in _limits(facts):
        unit.set("Service", f"Limit{name}", limit, "Workers want as much of it.", _ROOM)


def _limits(facts: Facts) -> Iterator[tuple[str, str]]:
    """What is to be inherited, where that is more than systemd gives anybody."""
    _, hard = facts.limits.get("nofile", facts.limits.get("ofile", (0, 0)))
    if facts.descriptors > ORDINARY_DESCRIPTORS or _is_more(hard, _MOST_DESCRIPTORS):
        yield "NOFILE", _limit(hard if _is_more(hard, facts.descriptors) else facts.descriptors)
    for name, usual in _HARD.items():
        hard = facts.limits.get(name, (0, 0))[1]
        if _is_more(hard, usual):
            yield name.upper(), _limit(hard)
    wanted = 20 - facts.nice if facts.nice < 0 else 0  # as getrlimit(2) counts
    hard = facts.limits.get("nice", (0, 0))[1]
    if raw := min(40, max(wanted, 40 if hard == RLIM_INFINITY else hard)):
        yield "NICE", f"{20 - raw:+d}"


def _is_more(limit: int, than: int) -> bool:
    return limit == RLIM_INFINITY or limit > than


def _limit(value: int) -> str:
    return "infinity" if value == RLIM_INFINITY else str(value)


def _rights(unit: Sections, facts: Facts) -> None:
    if facts.privileges:
        why = "\n".join(f"{name}: {reason}." for name, reason in facts.privileges.items())
        unit.set("Service", "CapabilityBoundingSet", " ".join(facts.privileges), why)
        unit.set("Service", "AmbientCapabilities", " ".join(facts.privileges), near="CapabilityBoundingSet")
    if facts.privileges or facts.owners or facts.groups or facts.asks_for_users:
        unit.set("Service", "PrivateUsers", "no", _why_users(facts))
    filters = " ".join(unit.values("Service", "SystemCallFilter"))
    if (facts.owners or facts.groups) and filters:
        unit.add("Service", "SystemCallFilter", "@chown", "Socket files are given to others.")
    if facts.is_resourceful and re.search(r"~[^~]*@resources", filters):
        unit.add("Service", "SystemCallFilter", "@resources", "Workers change their priority, CPUs or limits.")
    if facts.groups:
        unit.set("Service", "SupplementaryGroups", " ".join(map(escaped, facts.groups)), "Of socket files.", "Group")


def _why_users(facts: Facts) -> str:
    if facts.privileges:
        return "Capabilities."
    return "Socket files of others." if facts.groups else "max_per_client of a Unix socket."
