"""From checked settings to a running master: bind, lay out the scoreboard, serve, and tidy up."""

import os
import selectors
from collections.abc import Mapping
from contextlib import ExitStack

from preforkd import log, settings
from preforkd.descriptors import Inherited, Store, places, scoreboard
from preforkd.exits import Exit
from preforkd.limits import use_all_descriptors
from preforkd.listeners import Bound, ListenError, Rules
from preforkd.master import SIGNALS, Master
from preforkd.notify import Manager
from preforkd.service import Service, section
from preforkd.sources import EXPORTER, Checked
from preforkd.takeover import Held, Lock, Namesake, Stopped, control_path, take_over
from preforkd.wakeup import release

EXPORTER_SERVICE = settings.Service(
    target="preforkd.exporter:Exporter", max_children=1, graceful_timeout=1.0, eof_timeout=1.0
)


def serve(checked: Checked) -> Exit:
    """Serve until stopped. Call with the master's signals held, so that none is lost before the loop runs."""
    name = checked.settings.name
    wanted = dict(checked.settings.services)
    if checked.settings.metrics:
        wanted[EXPORTER] = EXPORTER_SERVICE
    manager, inherited = Manager.take(os.environ), Inherited.take(os.environ)
    with ExitStack() as tidy:
        try:
            lock = _take_over(checked.settings, manager, tidy)
        except Held as held:
            log.event("cannot_start", reason=held)
            return Exit.SYSTEM
        except Stopped:
            log.event("stopped", status=Exit.STOPPED.value)
            return Exit.STOPPED
        # Before we open anything under a number that was meant to be inherited.
        missing = _not_passed(checked)
        bound, refusals = ({}, missing) if missing else _bind(checked, wanted, inherited, manager, tidy)
        for refusal in refusals:
            log.event("cannot_start", reason=refusal)
        if refusals:
            return Exit.SYSTEM
        board = scoreboard(name, [section(each, wanted[each], bound[each]) for each in wanted], inherited)
        selector = tidy.enter_context(selectors.DefaultSelector())
        manager.attend(selector)
        tidy.callback(manager.close)
        store = Store(manager, inherited.taken)
        use_all_descriptors()
        services = {each: Service(each, wanted[each], bound[each], board, selector, lock) for each in wanted}
        exporter = services.pop(EXPORTER, None)
        master = Master(
            name, [*services.values()], exporter, board, selector, checked.settings.ready_fd, manager, store
        )
        for service in master.everyone:
            for each in service.listeners:
                log.event("listening", service=service.name, url=each.listener.url)
        release(SIGNALS)
        return master.serve_forever()


def _take_over(wanted: settings.Settings, manager: Manager, tidy: ExitStack) -> int:
    """Wait until nobody of an earlier instance is left; the descriptor of the lock, -1 when we do without.

    Raises Held and Stopped.
    """
    path, is_default = control_path(wanted.control, wanted.name, os.environ)
    lock = Lock(f"{path}.lock")
    try:
        if is_default:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        take_over(lock, wanted.takeover_timeout, manager, is_default=is_default)
    except (OSError, Namesake) as refusal:
        if not is_default:
            raise Held(f"{lock.path}: {refusal}") from refusal
        log.event("no_lock", reason=refusal, path=lock.path, advice="give this daemon a name or a control socket")
        return -1
    tidy.callback(lock.release)
    return lock.descriptor


def _not_passed(checked: Checked) -> list[str]:
    """What is wrong with the descriptors that should have been inherited."""
    asked = [
        (f"services.{name}.listen: {address.url}", address.number)
        for name, addresses in checked.addresses.items()
        for address in addresses
        if address.number >= 0
    ]
    if checked.settings.ready_fd:
        asked.append((f"ready_fd: {checked.settings.ready_fd}", checked.settings.ready_fd))
    return [
        f"{where}: no such descriptor is open; have whoever starts this pass it"
        for where, number in asked
        if not os.path.exists(f"/proc/self/fd/{number}")
    ]


def _bind(
    checked: Checked,
    wanted: Mapping[str, settings.Service],
    inherited: Inherited,
    manager: Manager,
    tidy: ExitStack,
) -> tuple[dict[str, list[Bound]], list[str]]:
    """Every listener by service, and what the system refused."""
    bound: dict[str, list[Bound]] = {name: [] for name in wanted}
    try:
        found = places({name: checked.addresses[name] for name in wanted}, inherited)
    except ListenError as refusal:
        return bound, [str(refusal)]
    inherited.let_go(manager)
    refusals = []
    for place in found:
        service = wanted[place.service]
        rules = Rules(service.request_queue_size, service.allow_reuse_address, service.allow_reuse_port)
        try:
            made = place.open(rules)
        except ListenError as refusal:
            where = EXPORTER if place.service == EXPORTER else f"services.{place.service}.listen"
            refusals.append(f"{where}: {refusal}")
            continue
        tidy.callback(made.close)
        bound[place.service].append(made)
    return bound, refusals
