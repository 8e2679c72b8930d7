"""The programs of supervisord, fitted to a daemon: ``[program:x]``, or ``[fcgi-program:x]`` where a listener of the
settings is passed to it, for supervisord then binds that. Pure: text to text.
"""

import os
import re
import shlex
from collections.abc import Mapping
from math import ceil

from preforkd.addresses import Address
from preforkd.deploy.facts import Facts, Passed
from preforkd.deploy.sections import Sections
from preforkd.deploy.shipped import Fitted
from preforkd.runtime import safe
from preforkd.sources import Faults

_NAME = "%(program_name)s"
_NUMBER = "%(process_num)d"
_STANDARD_INPUT = "0"  # as which supervisord passes a socket
_RUNTIME = "/run/preforkd"

# The limit on open descriptors that supervisord sees to unless ``minfds`` says otherwise.
ORDINARY_DESCRIPTORS = 1024


def fit_programs(shipped: Mapping[str, str], facts: Facts) -> Fitted:
    """Fit the program that suits the settings. Raises Faults where supervisord cannot pass what they ask for."""
    fitted = Fitted()
    if facts.passed:
        _fit_fcgi_program(shipped["preforkd-fcgi.conf"], facts, fitted)
    else:
        _fit_program(shipped["preforkd.conf"], facts, fitted)
    return fitted


def _fit_program(text: str, facts: Facts, fitted: Fitted) -> None:
    """A daemon that binds for itself."""
    config = Sections(text, mark=";")
    section = _rename(config, facts)
    _start(config, section, facts, [])
    _end(config, section, facts)
    _tell(facts, fitted, [safe(facts.name)])
    fitted.add(f"{_program(facts)}.conf", config.text)


def _fit_fcgi_program(text: str, facts: Facts, fitted: Fitted) -> None:
    """Two daemons that share a socket of supervisord's."""
    passed = _passed(facts)
    config = Sections(text, mark=";")
    section = _rename(config, facts)
    _bind(config, section, passed, fitted)
    if len(facts.addresses) - bool(facts.metrics) > 1:
        config.set(section, "numprocs", "1", "Two cannot have the other listeners of the settings.")
    number = int(config.value(section, "numprocs") or 1)
    others = _apart(facts, fitted) if number > 1 else []
    _start(config, section, facts, ["--set", f"name={_literal(facts.name)}-{_NUMBER}", *others])
    _end(config, section, facts)
    _tell(facts, fitted, [f"{safe(facts.name)}-{each}" for each in range(number)])
    fitted.add(f"{_program(facts)}.conf", config.text)


def _passed(facts: Facts) -> Passed:
    first, *others = facts.passed
    faults = [f"{each.url}: supervisord passes one socket, as fd:0" for each in others]
    if first.key != _STANDARD_INPUT:
        faults.insert(0, f"{first.url}: supervisord passes its socket as fd:0")
    if first.address is not None and first.address.scheme not in ("tcp", "unix"):
        faults.append(f"--socket {first.key}: supervisord opens tcp:// and unix: only")
    if faults:
        raise Faults(faults)
    return first


def _program(facts: Facts) -> str:
    """The name of the daemon as that of a program: supervisord's protocols have no other way to end one."""
    return re.sub(r"[ :/]", "_", facts.name)


def _rename(config: Sections, facts: Facts) -> str:
    """Give the section its name, and return that."""
    before = config.names()[0]
    after = f"{before.partition(':')[0]}:{_program(facts)}"
    config.rename(before, after)
    return after


def _bind(config: Sections, section: str, passed: Passed, fitted: Fitted) -> None:
    config.set(section, "socket_backlog", str(passed.backlog))
    if passed.address is None:
        fitted.notes.append(f"{passed.url}: its address is not in the settings: --socket {passed.key}=tcp://0.0.0.0:80")
        config.close(section, "socket", f"The address of {passed.url}, which is not in the settings.")
        return
    config.set(section, "socket", _socket(passed.address))
    options = passed.address.options
    if "user" in options or "group" in options:
        owner = ":".join(filter(None, [options.get("user", "root"), options.get("group", "")]))
        config.set(section, "socket_owner", owner)
    if "mode" in options:
        config.set(section, "socket_mode", options["mode"])


def _socket(address: Address) -> str:
    return f"unix://{_literal(address.path)}" if address.path else f"tcp://{address.host}:{address.port}"


def _start(config: Sections, section: str, facts: Facts, own: list[str]) -> None:
    """``own``: options that tell apart the daemons of one program."""
    site = facts.site
    found = re.match(r"(.*?)preforkd serve\b", config.value(section, "command"), re.DOTALL)
    before = found[1] if found else ""
    words = [*site.serve, "serve", *site.options], own, site.target
    command = " ".join([_command(words[0]), *own, _command(words[2])]).strip()
    config.set(section, "command", before + command)
    config.set(section, "directory", _literal(site.directory))
    inside = config.value(section, "environment")
    if safe(facts.name) != _program(facts):
        inside = inside.replace(f"{_RUNTIME}/{_NAME}", f"{_RUNTIME}/{_literal(safe(facts.name))}")
    home = {} if site.user == "root" else {"HOME": site.directory}  # supervisord leaves its own
    variables = [f"{name}={_value(value)}" for name, value in (home | dict(site.environment)).items()]
    config.set(section, "environment", ",".join([inside, *variables]))
    config.set(section, "user", site.user)


def _apart(facts: Facts, fitted: Fitted) -> list[str]:
    """What two daemons cannot both have, with the number of each."""
    words = ["--control", f"{_literal(facts.control)}-{_NUMBER}"] if facts.control else []
    metrics = facts.metrics
    if metrics is None:
        return words
    if not metrics.port:
        return [*words, "--metrics", f"{_literal(metrics.url)}-{_NUMBER}"]
    tens = str(metrics.port // 10 or "")
    fitted.notes.append(f"metrics: each daemon has its own, on port {tens}0, {tens}1 …")
    return [*words, "--metrics", f"{metrics.url.rpartition(':')[0]}:{tens}{_NUMBER}"]


def _end(config: Sections, section: str, facts: Facts) -> None:
    if int(config.value(section, "stopwaitsecs") or 0) < facts.stop_time:
        why = "Longer than graceful_timeout + eof_timeout of the settings, the kill, and the exporter's end."
        config.set(section, "stopwaitsecs", str(ceil(facts.stop_time)), why)


def _tell(facts: Facts, fitted: Fitted, runtime: list[str]) -> None:
    """What supervisord does for nobody."""
    user = facts.site.user
    if user != "root":
        for name in runtime:
            fitted.notes.append(f"{_RUNTIME}/{name} is {user}'s: install -d -o {user} -m 0700 {_RUNTIME}/{name}")
        for path, what in facts.written.items():
            fitted.notes.append(f"{os.path.dirname(path)}: {user} must be allowed to write there, for {what}")
        for reason in facts.privileges.values():
            fitted.notes.append(f"{reason}: not for {user}; say --user root, or for a port fd:0 in listen")
        if facts.nice < 0:
            fitted.notes.append(f"nice = {facts.nice}: not for {user}; say --user root")
    if facts.descriptors > ORDINARY_DESCRIPTORS:
        fitted.notes.append(f"minfds={facts.descriptors} belongs into [supervisord], for the limit on open descriptors")


# How values are written: ConfigParser, then the % of Python, then shlex.


def _literal(text: str) -> str:
    """What is not quoted, or not by a shell's rules. Raises Faults where it would end as a comment."""
    if re.search(r"\s[;#]|\n", text):
        raise Faults([f"{text}: supervisord would take a part of it for a comment; choose another name"])
    return text.replace("%", "%%")


def _command(words: tuple[str, ...] | list[str]) -> str:
    """A command line. What is quoted ends before a ``;`` or ``#``, which after a space would begin a comment."""
    return re.sub(r"(\s)([;#])", r"\1''\2", shlex.join(words).replace("%", "%%"))


def _value(text: str) -> str:
    return f"'{_literal(text)}'" if '"' in text else f'"{_literal(text)}"'
