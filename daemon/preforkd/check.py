"""``preforkd check``: import every target in a child and say what was found. Nothing is bound, nothing
serves, and no hook is run."""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from time import monotonic

from msgspec import Struct, field
from msgspec.structs import replace

from preforkd import log, settings
from preforkd.addresses import Address, parse
from preforkd.exits import Exit
from preforkd.generations import spec_of
from preforkd.listeners import Bound, ListenError, is_yet_to_be_passed, unbound
from preforkd.molds import Mold
from preforkd.outlet import doubt_of
from preforkd.scripts import is_named, name_of
from preforkd.sources import Checked
from preforkd_workers import protocol
from preforkd_workers.scoreboard import Scoreboard


def check_targets(checked: Checked) -> Exit:
    """Print what every service would serve, on standard output, and every fault, on standard error."""
    faults = []
    path = checked.settings.log_file
    if path and (doubt := doubt_of(os.path.abspath(path))) is not None:
        faults.append(f"log_file: {doubt}")
    for name, service in checked.settings.services.items():
        fault = _check(name, service, checked.addresses[name], checked.settings.services)
        if fault is not None:
            faults.append(f"services.{name}: {fault}")
    for fault in faults:
        print(f"preforkd: {fault}", file=sys.stderr)  # noqa: T201 - what the command is for
    return Exit.SETTINGS if faults else Exit.STOPPED


def _check(
    name: str,
    wanted: settings.Service,
    addresses: Sequence[Address],
    services: Mapping[str, settings.Service],
) -> str | None:
    """What is wrong with a service, or None after printing what it is.

    What systemd or supervisord will pass is not known here: it is good if the target could serve streams or datagrams.
    """
    kinds = socket.SOCK_STREAM, socket.SOCK_DGRAM
    first = None
    for kind in kinds if any(map(is_yet_to_be_passed, addresses)) else kinds[:1]:
        with ExitStack() as tidy:
            fault = _try(name, wanted, addresses, services, kind, tidy)
        if fault is None:
            return None
        first = first or fault
    return first


def _try(
    name: str,
    wanted: settings.Service,
    addresses: Sequence[Address],
    services: Mapping[str, settings.Service],
    of_passed: int,
    tidy: ExitStack,
) -> str | None:
    listeners: list[Bound] = []
    try:
        for address in addresses:
            listeners.append(Bound(unbound(address, of_passed)))
            tidy.callback(listeners[-1].close)
    except ListenError as error:
        return str(error)
    board = Scoreboard.create(name)
    tidy.callback(os.close, board.fd)
    tried = replace(wanted, preload=True, fork_safety=wanted.fork_safety if wanted.preload else "warn")
    spec = spec_of(name, 1, tried, listeners, board, is_rehearsal=True)
    found = _import(Mold.fork(spec, wanted.boot_timeout))
    if found.fault is None:
        print(f"service={name} target={wanted.target} is a {found.kind}")  # noqa: T201
        for address, bound in zip(addresses, listeners, strict=True):
            _print(name, bound, is_known=not is_yet_to_be_passed(address))
        for service, url in _by_service(name, wanted, found.urls, services):
            bound = Bound(unbound(parse(url)))
            tidy.callback(bound.close)
            _print(service, bound)
        for event, fields in found.notices if wanted.preload else ():
            print(log.line(f"service={name} warning={event}", fields))  # noqa: T201
    return found.fault


def _by_service(
    name: str, wanted: settings.Service, urls: Sequence[str], services: Mapping[str, settings.Service]
) -> Iterator[tuple[str, str]]:
    """What a script binds for a service, and for those that come with it."""
    for number, url in enumerate(urls, 1):
        if number == wanted.server and not wanted.listen:
            yield name, url
        elif wanted.server == 1 and number > 1 and not is_named(services, wanted, number):
            yield name_of(name, number), url


def _print(name: str, bound: Bound, *, is_known: bool = True) -> None:
    family, type_ = bound.listener.socket.family.name, bound.listener.socket.type.name
    what = f" family={family} type={type_}" if is_known else ""
    print(f"service={name} listen={bound.listener.url}{what}")  # noqa: T201


class _Found(Struct):
    """What a mold has said of a target."""

    kind: str = ""
    urls: list[str] = field(default_factory=list)  # of a script's servers
    notices: list[tuple[str, dict[str, object]]] = field(default_factory=list)  # events, and their fields
    fault: str | None = None  # what went wrong, if something did


def _import(mold: Mold) -> _Found:
    try:
        return _verdict(mold)
    finally:
        mold.kill(signal.SIGKILL)
        mold.close()
        os.waitpid(mold.pid, 0)


def _verdict(mold: Mold) -> _Found:
    found = _Found()
    while not mold.is_mute:
        readable, _, _ = select.select([mold.channel], [], [], max(0.0, mold.deadline - monotonic()))
        if not readable:
            found.fault = "the import takes longer than boot_timeout"
            return found
        for word, rest in mold.hear():
            match word:
                case protocol.SERVES:
                    found.urls = json.loads(rest)
                case protocol.NOTICE:
                    found.notices.append(json.loads(rest))
                case protocol.READY:
                    found.kind = rest
                    return found
                case protocol.FAILED:
                    found.fault = rest
                    return found
    found.fault = "the import ended the process"
    return found
