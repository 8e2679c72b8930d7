"""From checked settings to a running master: bind, lay out the scoreboard, serve, and tidy up."""

import os
import selectors
import socket
from collections.abc import Mapping
from contextlib import ExitStack

from preforkd import log, settings
from preforkd.control import listen
from preforkd.exits import Exit
from preforkd.limits import use_all_descriptors
from preforkd.listeners import Bound, ListenError, Rules, bind
from preforkd.master import SIGNALS, Master
from preforkd.runtime import control_place, make_directory
from preforkd.service import Service, section
from preforkd.sources import EXPORTER, Checked
from preforkd.wakeup import release
from preforkd_workers.scoreboard import Scoreboard

EXPORTER_SERVICE = settings.Service(
    target="preforkd.exporter:Exporter", max_children=1, graceful_timeout=1.0, eof_timeout=1.0
)


def serve(checked: Checked) -> Exit:
    """Serve until stopped. Call with the master's signals held, so that none is lost before the loop runs."""
    name = checked.settings.name
    wanted = dict(checked.settings.services)
    if checked.settings.metrics:
        wanted[EXPORTER] = EXPORTER_SERVICE
    with ExitStack() as tidy:
        # Before we open anything under a number that was meant to be inherited.
        missing = _not_passed(checked)
        bound, refusals = ({}, missing) if missing else _bind(checked, wanted, tidy)
        control, unwilling = _control(checked.settings, tidy)
        refusals += unwilling
        for refusal in refusals:
            log.event("cannot_start", reason=refusal)
        if refusals:
            return Exit.SYSTEM
        board = Scoreboard.create(name, [section(each, wanted[each], bound[each]) for each in wanted])
        selector = tidy.enter_context(selectors.DefaultSelector())
        use_all_descriptors()
        services = {each: Service(each, wanted[each], bound[each], board, selector) for each in wanted}
        exporter = services.pop(EXPORTER, None)
        master = Master(name, [*services.values()], exporter, board, selector, checked.settings.ready_fd, control)
        for service in master.everyone:
            for each in service.listeners:
                log.event("listening", service=service.name, url=each.listener.url)
        release(SIGNALS)
        return master.serve_forever()


def _control(wanted: settings.Settings, tidy: ExitStack) -> tuple[socket.socket | None, list[str]]:
    """The control socket, and why it could not be had although it was asked for."""
    place = control_place(wanted.name, wanted.control, os.environ)
    try:
        if not place.is_configured:
            make_directory(os.path.dirname(place.path))
        made = listen(place.path)
    except (ListenError, OSError) as error:
        reason = str(error) if isinstance(error, ListenError) else f"{error.filename}: {error.strerror}"
        if place.is_configured:
            return None, [f"control: {reason}"]
        log.event("no_control", reason=reason, advice="say where: --control PATH")
        return None, []
    tidy.callback(made.close)
    log.event("control", path=place.path)
    return made.listener.socket, []


def _not_passed(checked: Checked) -> list[str]:
    """What is wrong with the descriptors that should have been inherited."""
    asked = [
        (f"services.{name}.listen: {address.url}", address.number)
        for name, addresses in checked.addresses.items()
        for address in addresses
        if address.scheme == "fd"
    ]
    if checked.settings.ready_fd:
        asked.append((f"ready_fd: {checked.settings.ready_fd}", checked.settings.ready_fd))
    return [
        f"{where}: no such descriptor is open; have whoever starts this pass it"
        for where, number in asked
        if not os.path.exists(f"/proc/self/fd/{number}")
    ]


def _bind(
    checked: Checked, wanted: Mapping[str, settings.Service], tidy: ExitStack
) -> tuple[dict[str, list[Bound]], list[str]]:
    """Every listener by service, and what the system refused."""
    bound: dict[str, list[Bound]] = {name: [] for name in wanted}
    refusals = []
    for name, service in wanted.items():
        rules = Rules(service.request_queue_size, service.allow_reuse_address, service.allow_reuse_port)
        for address in checked.addresses[name]:
            try:
                made = bind(address, rules)
            except ListenError as refusal:
                where = name if name == EXPORTER else f"services.{name}.listen"
                refusals.append(f"{where}: {refusal}")
                continue
            tidy.callback(made.close)
            bound[name].append(made)
    return bound, refusals
