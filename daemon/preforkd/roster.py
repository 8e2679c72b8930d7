"""Everything that is served: settings, listeners and services, changed as a whole and only as a whole."""

import os
import selectors
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from preforkd import log, settings
from preforkd.descriptors import Inherited, Place, places
from preforkd.listeners import Address, Bound, ListenError, Rules
from preforkd.notify import Manager
from preforkd.service import Service
from preforkd.sources import EXPORTER, Checked, Faults, changes_that_need_a_restart
from preforkd_workers.scoreboard import Scoreboard

EXPORTER_SERVICE = settings.Service(
    target="preforkd.exporter:Exporter", max_children=1, graceful_timeout=1.0, eof_timeout=1.0, probation=0.0
)


@dataclass
class Change:
    """What is to be served from now on, and what that changes. The listeners for it are open."""

    checked: Checked
    loaded: dict[str, list[Bound]]  # the services to be loaded, with their listeners
    removed: list[str]
    opened: list[Bound] = field(default_factory=list)
    held: list[tuple[Bound, Address, Rules]] = field(default_factory=list)  # open already, and what they are to become

    def settings_of(self, name: str) -> settings.Service:
        return EXPORTER_SERVICE if name == EXPORTER else self.checked.settings.services[name]


class Roster:
    """The services by name, and those that are leaving."""

    def __init__(
        self,
        checked: Checked,
        board: Scoreboard,
        selector: selectors.BaseSelector,
        manager: Manager,
        inherited: Inherited | None = None,
    ) -> None:
        self.checked = checked
        self.manager = manager
        self.inherited = inherited or Inherited()
        self.board = board
        self.selector = selector
        self.generation = 0
        self.services: dict[str, Service] = {}
        self.leaving: list[Service] = []
        self.bound: list[Bound] = []

    def __iter__(self) -> Iterator[Service]:
        """Every service, the exporter and those that are leaving included."""
        return iter([*self.services.values(), *self.leaving])

    @property
    def exporter(self) -> Service | None:
        return self.services.get(EXPORTER)

    @property
    def targets(self) -> list[Service]:
        """The services that the settings name: all but the exporter."""
        return [service for name, service in self.services.items() if name != EXPORTER]

    def examine(self, checked: Checked, only: frozenset[str] | None = None) -> Change:
        """Find out what these settings change, for all services or only for some, and open what listeners they need.

        Raises Faults when they cannot be brought into effect; then nothing is open that was not before.
        """
        names = _names(checked)
        if only is not None:
            checked, names = self._narrowed(checked, only), [name for name in names if name in only]
        faults = changes_that_need_a_restart(self.checked, checked)
        removed = [name for name in self.services if name not in _names(checked)]
        change = Change(checked, {name: [] for name in names}, removed)
        missing = {name: self._hold(change, name) for name in names}
        for bound, address, _ in change.held:
            faults += [f"{_where(_service_of(change, bound))}: {why}" for why in [bound.cannot_become(address)] if why]
        try:
            found = places(missing, self.inherited, {bound.name for bound in self.bound})
            self.inherited.let_go(self.manager)
            for place in found:
                self._open(change, place, faults)
        except ListenError as refusal:
            faults.append(str(refusal))
        if not faults:
            faults += self._lacks_room(change)
        if faults:
            for made in change.opened:
                made.close()
            raise Faults(faults)
        return change

    def _lacks_room(self, change: Change) -> list[str]:
        """Whether the scoreboard cannot hold what would be there, old and new together."""
        urls = {name: {bound.listener.url for bound in service.listeners} for name, service in self.services.items()}
        for name, listeners in change.loaded.items():
            urls[name] = urls.get(name, set()) | {bound.listener.url for bound in listeners}
        reason = self.board.lacks_room({name: [*each] for name, each in urls.items()})
        return [f"services: {reason}; have fewer, or shorter names, or several daemons"] if reason else []

    def _hold(self, change: Change, name: str) -> list[Address]:
        """Have a service keep, or take over, what is open already. Returns the addresses that are not."""
        missing = []
        for address in change.checked.addresses[name]:
            found = [bound for bound in self._free(change, name, address) if bound.serves(address)]
            for bound in found if address.scheme == "fd" else found[:1]:
                change.loaded[name].append(bound)
                change.held.append((bound, address, rules_of(change.settings_of(name))))
            if not found:
                missing.append(address)
        return missing

    def _free(self, change: Change, name: str, address: Address) -> list[Bound]:
        """The listeners that the service may have: not those of one that stays as it is, nor, where any port will do,
        of any other."""
        taken = [bound for bound, _, _ in change.held]
        for other, service in self.services.items():
            stays_as_it_is = other not in change.loaded and other not in change.removed
            if other != name and (address.place is None or stays_as_it_is):
                taken += service.listeners
        return [bound for bound in self.bound if bound not in taken]

    def _open(self, change: Change, place: Place, faults: list[str]) -> None:
        where = _where(place.service)
        if place.address.scheme == "fd" and self.generation:  # by now the number may be anything of ours
            faults.append(f"{where}: {place.address.url}: is passed at the start; needs a restart")
            return
        try:
            made = place.open(rules_of(change.settings_of(place.service)))
        except ListenError as refusal:
            ours = [bound.listener.url for bound in self.bound if bound.stands_in_the_way_of(place.address)]
            if refusal.is_taken and ours:
                refusal = ListenError(f"{place.address.url}: {ours[0]} of ours has the port; needs a restart")
            faults.append(f"{where}: {refusal}")
            return
        change.loaded[place.service].append(made)
        change.opened.append(made)

    def _narrowed(self, checked: Checked, only: frozenset[str]) -> Checked:
        """The settings that are in effect, but for these services."""
        before = self.checked
        if unknown := [name for name in sorted(only) if name not in _names(checked)]:
            known = ", ".join(_names(checked))
            raise Faults([f"there is no service {name}; the settings name {known}" for name in unknown])
        services = {**before.settings.services}
        services.update({name: checked.settings.services[name] for name in only if name != EXPORTER})
        addresses = {**before.addresses, **{name: checked.addresses[name] for name in only}}
        metrics = checked.settings.metrics if EXPORTER in only else before.settings.metrics
        return Checked(replace(before.settings, services=services, metrics=metrics), addresses)

    # What becomes of a change.

    def load(self, change: Change) -> list[Service]:
        """Begin with a generation more of the services concerned."""
        self.generation += 1
        for name, listeners in change.loaded.items():
            service = self.services[name] = self.services.get(name) or self._found(name)
            service.load(self.generation, change.settings_of(name), listeners)
        for made in change.opened:
            log.event("listening", service=_service_of(change, made), url=made.listener.url)
        self.bound += change.opened
        return [self.services[name] for name in change.loaded]

    def _found(self, name: str) -> Service:
        """A service that is new, or that was leaving."""
        for service in self.leaving:
            if service.name == name:
                self.leaving.remove(service)
                return service
        return Service(name, self.board, self.selector)

    def commit(self, change: Change) -> None:
        """The change is in effect: let go of what it has replaced."""
        self.checked = change.checked
        for name in change.loaded:
            self.services[name].commit()
        for bound, address, rules in change.held:
            try:
                bound.become(address, rules)
            except OSError as error:
                log.event("listener_unchanged", url=bound.listener.url, reason=error.strerror)
        for name in change.removed:
            self._remove(name)
        wanted = [bound for service in self.services.values() for bound in service.listeners]
        self._close([bound for bound in self.bound if bound not in wanted])

    def roll_back(self, change: Change) -> None:
        """Have everything again as it was before the change."""
        for name in change.loaded:
            self.services[name].roll_back(change.checked.settings.max_old_generations)
            if self.services[name].current is None:
                self._remove(name)
        self._close(change.opened)

    def _remove(self, name: str) -> None:
        self.services[name].stop()
        self.leaving.append(self.services.pop(name))

    def _close(self, listeners: Sequence[Bound]) -> None:
        for bound in listeners:
            log.event("closed", url=bound.listener.url)
            bound.retire()
        self.bound = [bound for bound in self.bound if bound not in listeners]

    def settle(self) -> None:
        """Settle every service, and forget those that are gone."""
        for service in self:
            service.settle()
        for service in [each for each in self.leaving if each.is_gone]:
            self.leaving.remove(service)
            self.board.remove(service.name)

    def close(self) -> None:
        """Close every listener that we have opened."""
        for bound in self.bound:
            bound.close()


def rules_of(wanted: settings.Service) -> Rules:
    return Rules(wanted.request_queue_size, wanted.allow_reuse_address, wanted.allow_reuse_port)


def not_passed(checked: Checked) -> list[str]:
    """What is wrong with the descriptors that should have been inherited."""
    asked: list[tuple[str, int]] = [
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


def _names(checked: Checked) -> list[str]:
    return [*checked.settings.services, *([EXPORTER] if checked.settings.metrics else [])]


def _service_of(change: Change, bound: Bound) -> str:
    return next(name for name, listeners in change.loaded.items() if bound in listeners)


def _where(name: str) -> str:
    """The setting that a fault of a listener of this service belongs to."""
    return EXPORTER if name == EXPORTER else f"services.{name}.listen"
