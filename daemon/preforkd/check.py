"""``preforkd check``: import every target in a child and say what was found. Nothing is bound, nothing
serves, and no hook is run."""

import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from time import monotonic

from msgspec.structs import replace

from preforkd import settings
from preforkd.exits import Exit
from preforkd.generations import spec_of
from preforkd.listeners import Address, Bound, ListenError, unbound
from preforkd.molds import Mold
from preforkd.sources import Checked
from preforkd_workers.protocol import FAILED, READY
from preforkd_workers.scoreboard import Scoreboard


def check_targets(checked: Checked) -> Exit:
    """Print what every service would serve, on standard output, and every fault, on standard error."""
    faults = []
    for name, service in checked.settings.services.items():
        with ExitStack() as tidy:
            fault = _check(name, service, checked.addresses[name], tidy)
        if fault is not None:
            faults.append(f"services.{name}: {fault}")
    for fault in faults:
        print(f"preforkd: {fault}", file=sys.stderr)  # noqa: T201 - what the command is for
    return Exit.SETTINGS if faults else Exit.STOPPED


def _check(name: str, wanted: settings.Service, addresses: Sequence[Address], tidy: ExitStack) -> str | None:
    """What is wrong with a service, or None after printing what it is."""
    listeners: list[Bound] = []
    try:
        for address in addresses:
            listeners.append(Bound(unbound(address)))
            tidy.callback(listeners[-1].close)
    except ListenError as error:
        return str(error)
    board = Scoreboard.create(name)
    tidy.callback(os.close, board.fd)
    spec = spec_of(name, 1, replace(wanted, preload=True), listeners, board, is_rehearsal=True)
    kind, fault = _import(Mold.fork(spec, wanted.boot_timeout))
    if fault is None:
        print(f"service={name} target={wanted.target} is a {kind}")  # noqa: T201
        for bound in listeners:
            family, type_ = bound.listener.socket.family.name, bound.listener.socket.type.name
            print(f"service={name} listen={bound.listener.url} family={family} type={type_}")  # noqa: T201
    return fault


def _import(mold: Mold) -> tuple[str, str | None]:
    """What kind of target the mold has found, and what went wrong if something did."""
    try:
        return _verdict(mold)
    finally:
        mold.kill(signal.SIGKILL)
        mold.close()
        os.waitpid(mold.pid, 0)


def _verdict(mold: Mold) -> tuple[str, str | None]:
    while not mold.is_mute:
        readable, _, _ = select.select([mold.channel], [], [], max(0.0, mold.deadline - monotonic()))
        if not readable:
            return "", "the import takes longer than boot_timeout"
        for word, rest in mold.hear():
            if word == READY:
                return rest, None
            if word == FAILED:
                return "", rest
    return "", "the import ended the process"
