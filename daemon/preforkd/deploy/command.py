"""``preforkd deploy``: print or write the files for a service manager or Prometheus, as they are shipped, or fitted to
settings. Never runs the target's code, and never overwrites a file without being told to.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

import preforkd
import preforkd_workers
from preforkd.addresses import Address, AddressError, parse
from preforkd.cli import FLAGS, flag_of
from preforkd.deploy import shipped
from preforkd.deploy.facts import Facts, Site, facts_of, modules_of
from preforkd.deploy.programs import fit_programs
from preforkd.deploy.scrape import fit_scraping
from preforkd.deploy.shipped import Fitted
from preforkd.deploy.units import fit_units
from preforkd.exits import Exit
from preforkd.sources import Checked, Faults, from_environment

_FIT: dict[str, Callable[[Mapping[str, str], Facts], Fitted]] = {
    "systemd": fit_units,
    "supervisor": fit_programs,
    "prometheus": fit_scraping,
}
_HELP = {
    "systemd": "units of systemd, with the user and the directories that they want",
    "supervisor": "a program of supervisord",
    "prometheus": "a scrape config of Prometheus, recording rules and alerts",
}

# Options of ``serve`` that say a setting, in the order in which a command line has them, and where argparse puts them.
_OPTIONS = {"-c": "config", "--listen": "listen", **{flag_of(key): key for key in FLAGS}, "--set": "pairs"}
_OWN = {"--user": "user", "--socket": "sockets"}


class Exists(Exception):
    """There are files of these names already."""


class Misused(Exception):
    """The command line makes no sense; the message says why."""


def add_commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Have a parser for every kind of file; they are returned to be given the options of ``serve``."""
    kinds = parser.add_subparsers(dest="manager", required=True, metavar="|".join(_FIT))
    commands = [kinds.add_parser(manager, help=_HELP[manager]) for manager in _FIT]
    for command in commands:
        add = command.add_argument
        add("--user", metavar="NAME", help="who runs the daemon (default: preforkd)")
        add(
            "--socket",
            action="append",
            metavar="NAME=URL",
            default=[],
            dest="sockets",
            help="where fd:NAME of the settings listens (repeatable)",
        )
        add("--output", metavar="DIR", help="write the files there, instead of printing them")
        add("--force", action="store_true", help="overwrite files that are there")
    return commands


def deploy(options: argparse.Namespace, read: Callable[[], Checked]) -> Exit:
    """Do what the command line says; ``read`` gives the settings that it names."""
    try:
        found = _files(options, read)
    except Faults as faults:
        _complain(faults.lines)
        return Exit.SETTINGS
    except Misused as reason:
        _complain([str(reason)])
        return Exit.USAGE
    _complain([f"note: {note}" for note in found.notes])
    if options.output is None:
        sys.stdout.write(shown(found.files))
        return Exit.STOPPED
    try:
        write(found, options.output, force=options.force)
    except Exists as exist:
        _complain([f"{path}: is there already; --force overwrites it. Nothing was written" for path in exist.args])
        return Exit.SYSTEM
    except OSError as error:
        _complain([f"{error.filename2 or error.filename or options.output}: {error.strerror}. Nothing was written"])
        return Exit.SYSTEM
    return Exit.STOPPED


def _files(options: argparse.Namespace, read: Callable[[], Checked]) -> Fitted:
    texts = shipped.read(options.manager)
    if not (options.config or options.target):
        if said := [flag for flag, key in (_OPTIONS | _OWN).items() if getattr(options, key)]:
            raise Misused(f"{', '.join(said)}: of which daemon? Give -c FILE, or TARGET")
        return Fitted(texts)
    checked = read()
    return _FIT[options.manager](texts, facts_of(checked, site_of(options, checked)))


def shown(files: Mapping[str, str]) -> str:
    """One file as it is; several below their names, as systemctl cat has it."""
    if len(files) == 1:
        return "".join(files.values())
    return "\n".join(f"# {name}\n{text}" for name, text in files.items())


def _complain(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"preforkd: {line}", file=sys.stderr)  # noqa: T201 - what the command is for


# Where the daemon is to run.


def site_of(options: argparse.Namespace, checked: Checked) -> Site:
    """Here, by this Python, from this directory, with these settings. Raises Faults."""
    directory = os.getcwd()
    given = Site()
    config = os.path.abspath(options.config) if options.config else ""
    modules = modules_of(checked.settings.services.values())
    return Site(
        directory=directory,
        serve=_program("preforkd", "preforkd"),
        control=_program("preforkctl", "preforkd.ctl"),
        config=config,
        options=tuple(_words(options, config)),
        target=(options.target, *options.args) if options.target else (),
        environment={value.where: str(value.raw) for value in from_environment(os.environ)},
        python=tuple(dict.fromkeys([sys.prefix, sys.base_prefix, *_packages()])),
        in_directory=frozenset(each for each in modules if _is_module(os.path.join(directory, each))),
        user=_user(options.user) or given.user,
        sockets=dict(_sockets(options.sockets, checked)),
    )


def _program(name: str, module: str) -> tuple[str, ...]:
    """The program beside this Python, or what does the same."""
    path = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), name)
    return (path,) if os.access(path, os.X_OK) else (os.path.abspath(sys.executable), "-m", module)


def _packages() -> list[str]:
    """Where our own packages are: in a checkout, not where Python has those of others."""
    return [
        os.path.dirname(os.path.dirname(os.path.abspath(str(each.__file__)))) for each in (preforkd, preforkd_workers)
    ]


def _words(options: argparse.Namespace, config: str) -> Iterator[str]:
    """The options that say a setting, as they were given; the file of settings by its whole path."""
    for flag, key in _OPTIONS.items():
        given = config if key == "config" else getattr(options, key)
        for value in given if isinstance(given, list) else [given] if given else []:
            yield from (flag, value)


def _is_module(path: str) -> bool:
    return os.path.isdir(path) or os.path.isfile(f"{path}.py")


def _user(name: str | None) -> str | None:
    """Whatever else is in it would be more lines, or other words, of the files. Raises Faults."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise Faults([f"--user: the name of a user, not {name!r}"])
    return name


def _sockets(pairs: Sequence[str], checked: Checked) -> Iterator[tuple[str, Address]]:
    faults = []
    passed = [each for addresses in checked.addresses.values() for each in addresses if each.scheme == "fd"]
    known = {each.name or str(each.number) for each in passed}
    for pair in pairs:
        name, equals, url = pair.partition("=")
        try:
            address = parse(url)
        except AddressError as error:
            faults.append(f"--socket {pair}: {error}" if equals else f"--socket {pair}: want NAME=URL")
            continue
        if address.scheme == "fd":
            faults.append(f"--socket {pair}: want an address")
        elif name.removeprefix("fd:") not in known:
            faults.append(f"--socket {pair}: no listen is fd:{name.removeprefix('fd:')}")
        yield name.removeprefix("fd:"), address
    if faults:
        raise Faults(faults)


# Writing.


def write(found: Fitted, directory: str, *, force: bool) -> None:
    """Write all files or none, and no half ones. A shared one that says the same already is left alone.

    Raises Exists with the paths of those that are there, unless they are to be overwritten, or OSError.
    """
    os.makedirs(directory, exist_ok=True)
    paths = {os.path.join(directory, name): text for name, text in found.files.items()}
    alike = {os.path.join(directory, name) for name in found.shared}
    paths = {path: text for path, text in paths.items() if path not in alike or _content(path) != text}
    if not force and (there := [path for path in paths if os.path.lexists(path)]):
        raise Exists(*there)
    with ExitStack() as tidy, ExitStack() as undo:
        made = {path: _written(directory, text, tidy) for path, text in paths.items()}
        for path, temporary in made.items():
            _put(temporary, path, undo, tidy, force=force)
        undo.pop_all()


def _written(directory: str, text: str, tidy: ExitStack) -> str:
    """A temporary file beside the others, with this text and the mode of an ordinary file."""
    descriptor, path = tempfile.mkstemp(prefix=".preforkd-", dir=directory)
    tidy.callback(_remove, path)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    return path


def _put(temporary: str, path: str, undo: ExitStack, tidy: ExitStack, *, force: bool) -> None:
    """Give a file its name. Raises Exists when somebody has made one of that name meanwhile."""
    try:
        os.link(temporary, path)
        undo.callback(os.unlink, path)
    except FileExistsError:
        if not force:
            raise Exists(path) from None
        before = f"{temporary}.before"
        os.link(path, before, follow_symlinks=False)
        tidy.callback(_remove, before)
        undo.callback(os.replace, before, path)
        os.replace(temporary, path)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _content(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None
