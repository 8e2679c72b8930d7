"""The master's side of scripts: binds what they name, and has a service for each server that one makes.

A script is run in a mold, and asks while it runs (``preforkd_workers.bindings``). What is open already is found again,
so that a reload keeps the queue of a listener, and molds of one script share what it binds.
"""

import errno
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from preforkd import datagrams, log, settings
from preforkd.addresses import Address
from preforkd.descriptors import places
from preforkd.listeners import Bound, ListenError, Rules
from preforkd_workers import protocol
from preforkd_workers.spec import is_script
from preforkd_workers.urls import with_port

if TYPE_CHECKING:
    from preforkd.generations import Generation
    from preforkd.roster import Change, Roster
    from preforkd.service import Service


def binds_for_itself(wanted: settings.Service) -> bool:
    """Whether a service listens where its script says."""
    return is_script(wanted.target) and not wanted.listen


def is_same_script(one: settings.Service, other: settings.Service) -> bool:
    return is_script(one.target) and (one.target, one.args) == (other.target, other.args)


def is_named(services: Mapping[str, settings.Service], wanted: settings.Service, number: int) -> bool:
    """Whether the settings have a service for this server of a script."""
    return any(is_same_script(each, wanted) and each.server == number for each in services.values())


def name_of(service: str, number: int) -> str:
    """What the service for a further server of its script is called, when no setting names it."""
    return f"{service}-{number}"


class Scripts:
    """What the scripts of a roster have bound, until it is known which service it is for."""

    def __init__(self, roster: "Roster") -> None:
        self.roster = roster
        self.unclaimed: list[Bound] = []  # opened for a script that has not said yet what it serves

    def socket_files(self) -> tuple[str, ...]:
        """The files that scripts must leave alone."""
        return tuple(bound.path for bound in self.roster.bound if bound.path)

    # A script binds.

    def bind(self, generation: "Generation", place: str) -> tuple[str, int | None]:
        """What to answer to the mold of this generation, and the descriptor to go with it."""
        wanted = json.loads(place)
        address, rules = _understood(wanted, generation.settings)
        try:
            bound = self._found(generation, address) or self._opened(generation, address, rules)
        except ListenError as refusal:
            cause = refusal.__cause__
            number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EADDRNOTAVAIL
            return f"{protocol.UNBOUND} {number} {refusal}", None
        generation.given.append(bound)
        change = self._change_of(generation)
        if change is not None and bound not in change.opened:
            change.held.append((bound, address, rules))
        return f"{protocol.BOUND} {bound.listener.url}", bound.listener.socket.fileno()

    def _found(self, generation: "Generation", address: Address) -> Bound | None:
        """What is open there already and may be had. Where any port will do, one that this mold has not got yet."""
        free = [bound for bound in self._free(generation) if bound not in generation.given or address.place]
        for bound in free:
            if bound.serves(address) or (address.port and bound.listener.url == address.url):
                if reason := bound.cannot_become(address):
                    raise ListenError(reason) from OSError(errno.EADDRINUSE, reason)
                return bound
        return None

    def _free(self, generation: "Generation") -> list[Bound]:
        """The listeners of the same script, and in a reload those that other services have no more."""
        change = self._change_of(generation)
        others = [each for each in self.roster.services.values() if not _is_of(each, generation)]
        taken = [bound for each in others for bound in _kept_by(each, change)]
        return [bound for bound in self.roster.bound if bound not in taken]

    def _opened(self, generation: "Generation", address: Address, rules: Rules) -> Bound:
        roster = self.roster
        names = {bound.name for bound in roster.bound}
        (place,) = places({generation.spec.service: [address]}, roster.inherited, names)
        try:
            made = place.open(rules)
        except ListenError as refusal:
            ours = [bound.listener.url for bound in roster.bound if bound.stands_in_the_way_of(address)]
            if refusal.is_taken and ours:
                raise ListenError(f"{address.url}: {ours[0]} of ours has it") from refusal.__cause__
            raise
        if reason := roster.board.lacks_room({generation.spec.service: [made.listener.url]}):
            made.close()
            raise ListenError(reason) from OSError(errno.ENOSPC, reason)
        change = self._change_of(generation)
        if change is not None:
            change.opened.append(made)
        roster.bound.append(made)
        self.unclaimed = [*(each for each in self.unclaimed if each in roster.bound), made]
        return made

    def _change_of(self, generation: "Generation") -> "Change | None":
        """The change that the generation is part of; None when it serves already, or is the first of all."""
        service = self.roster.services.get(generation.spec.service)
        return self.roster.change if service is not None and service.next is generation else None

    # A script serves.

    def serves(self, generation: "Generation", urls: Sequence[str]) -> None:
        """A script has come to where it serves, these servers: ours is one of them."""
        service = self.roster.services.get(generation.spec.service)
        if service is None or generation not in (service.current, service.next):
            return
        generation.has_served = True
        if binds_for_itself(generation.settings):
            url = urls[generation.settings.server - 1]
            known = [*generation.given, *self.roster.bound]
            generation.listeners = [bound for bound in known if bound.listener.url == url][:1]
            self._claim(service, generation.listeners)
        self._close_unserved(generation, urls)
        if generation.settings.server == 1:
            for number, url in enumerate(urls[1:], 2):
                self._add(service, generation, number, url)
        if all(each.newest.has_served for each in self.roster.targets if binds_for_itself(each.newest.settings)):
            self.roster.inherited.let_go(self.roster.manager)

    def _claim(self, service: "Service", listeners: Sequence[Bound]) -> None:
        for bound in listeners:
            if bound in self.unclaimed:
                self.unclaimed.remove(bound)
                log.event("listening", service=service.name, url=bound.listener.url)
                datagrams.tell_receive_buffer(bound.listener.socket, bound.listener.url, bound.rules.receive_buffer)
        service.list_listeners()

    def _close_unserved(self, generation: "Generation", urls: Sequence[str]) -> None:
        """Let go of what the script has bound and does not serve, so that nobody waits there."""
        unserved = [each for each in generation.given if each in self.unclaimed and each.listener.url not in urls]
        for bound in unserved:
            log.event("not_served", service=generation.spec.service, url=bound.listener.url)
            self.unclaimed.remove(bound)
        self.roster.close_listeners(unserved)

    def _add(self, service: "Service", generation: "Generation", number: int, url: str) -> None:
        """Have a service for a further server of the script, unless the settings have one."""
        roster, change = self.roster, self._change_of(generation)
        configured = (change or roster).checked.settings.services
        if is_named(configured, generation.settings, number):
            return
        name = name_of(service.name, number)
        wanted = replace(generation.settings, server=number, part_of=service.name, listen=[])
        before = roster.services.get(name)
        if name in configured:
            generation.failure = f"services.{name} is another service: this one needs the name for its server {number}"
        elif reason := roster.board.lacks_room({name: [url]}):
            generation.failure = f"services.{name}: {reason}"
        elif change is not None:
            change.take_up(name)
            roster.found(name).load(generation.number, wanted, [])
        elif before is None or before.newest.number < generation.number:
            added = roster.found(name)
            added.load(generation.number, wanted, [])
            added.roll(roster.checked.settings.max_old_generations)
            added.commit()


def _kept_by(service: "Service", change: "Change | None") -> Sequence[Bound]:
    """The listeners of a service that are not free: all of them, or in a change those that it is to have."""
    if change is not None and service.name in change.removed:
        return []
    given = [bound for each in (service.current, service.next) if each for bound in each.given]
    if change is not None and service.name in change.loaded:
        return [*change.loaded[service.name], *(service.next.listeners if service.next else ()), *given]
    return [*service.listeners, *given]


def _is_of(service: "Service", generation: "Generation") -> bool:
    return any(is_same_script(each.settings, generation.settings) for each in (service.current, service.next) if each)


def _understood(wanted: dict[str, Any], rules: settings.Service) -> tuple[Address, Rules]:
    """Where a script wants to bind, and how."""
    scheme, options = wanted["scheme"], wanted["options"]
    shares = rules.allow_reuse_port or wanted.get("shares", False)
    how = Rules(rules.request_queue_size, rules.allow_reuse_address, shares, rules.receive_buffer)
    if "path" in wanted:
        return Address(f"{scheme}:{wanted['path']}", scheme, path=wanted["path"], options=options), how
    host, port = wanted["host"], wanted["port"]
    return Address(f"{scheme}://{with_port(host, port)}", scheme, host, port, options=options), how
