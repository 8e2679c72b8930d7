"""Everything that is served: settings, listeners and services, changed as a whole and only as a whole."""

import os
import selectors
from collections.abc import Iterator, Sequence

from msgspec import Struct, field
from msgspec.structs import replace

from preforkd import datagrams, log, settings
from preforkd.addresses import Address
from preforkd.descriptors import Inherited, Place, places
from preforkd.levels import WHOLE, Levels
from preforkd.listeners import Bound, ListenError, Rules
from preforkd.notify import Manager
from preforkd.scripts import Scripts, binds_for_itself
from preforkd.service import Service
from preforkd.sources import EXPORTER, Checked, Faults, changes_that_need_a_restart
from preforkd_workers.scoreboard import Scoreboard

EXPORTER_SERVICE = settings.Service(
    target="preforkd.exporter:Exporter", max_children=1, graceful_timeout=1.0, eof_timeout=1.0, probation=0.0
)


class Change(Struct):
    """What is to be served from now on, and what that changes. The listeners for it are open."""

    checked: Checked
    loaded: dict[str, list[Bound]]  # the services to be loaded, with their listeners
    removed: list[str]
    opened: list[Bound] = field(default_factory=list)
    held: list[tuple[Bound, Address, Rules]] = field(default_factory=list)  # open already, and what they are to become

    def settings_of(self, name: str) -> settings.Service:
        return EXPORTER_SERVICE if name == EXPORTER else self.checked.settings.services[name]

    def take_up(self, name: str) -> None:
        """Have a service that no setting names: a script has made a server more."""
        self.loaded[name] = []
        if name in self.removed:
            self.removed.remove(name)


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
        self.scripts = Scripts(self)
        self.change: Change | None = None  # that is loaded, and not in effect yet
        self.levels = Levels(checked.settings.log_levels)

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
        if (reason := log.fault(checked.settings.log_file)) is not None:
            faults.append(f"log_file: {reason}")
        removed = [
            name for name in self.services if name not in _names(checked) and not self._stays(name, checked, names)
        ]
        change = Change(checked, {name: [] for name in names}, removed)
        missing = {name: self._hold(change, name) for name in names}
        for bound, address, _ in change.held:
            faults += [f"{_where(_service_of(change, bound))}: {why}" for why in [bound.cannot_become(address)] if why]
        try:
            found = places(missing, self.inherited, {bound.name for bound in self.bound})
            if not any(binds_for_itself(change.settings_of(name)) for name in names):  # or else it may be for them
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

    def _stays(self, name: str, checked: Checked, loaded: Sequence[str]) -> bool:
        """Whether a service that no setting names stays as it is, as does the one that it is part of."""
        whole = self.services[name].newest.settings.part_of
        return whole in _names(checked) and whole not in loaded

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
        self.change = change
        log.expect(change.checked.settings.log_format, change.checked.settings.log_file)
        for name, listeners in change.loaded.items():
            service = self.found(name)
            service.load(self.generation, change.settings_of(name), listeners)
        for made in change.opened:
            log.event("listening", service=_service_of(change, made), url=made.listener.url)
            datagrams.tell_receive_buffer(made.listener.socket, made.listener.url, made.rules.receive_buffer)
        self.bound += change.opened
        return self.loading(change)

    def loading(self, change: Change) -> list[Service]:
        """The services that are loaded by now."""
        return [self.services[name] for name in change.loaded]

    def found(self, name: str) -> Service:
        """The service of this name: one that is there, that was leaving, or that is new."""
        was_leaving = next((service for service in self.leaving if service.name == name), None)
        if was_leaving is not None:
            self.leaving.remove(was_leaving)
        if name not in self.services:
            self.services[name] = was_leaving or Service(name, self.board, self.selector, self.scripts)
        return self.services[name]

    def commit(self, change: Change) -> None:
        """The change is in effect: let go of what it has replaced."""
        self.checked = change.checked
        self.change = None
        log.adopt(self.checked.settings.log_format, self.checked.settings.log_file)
        self.levels.declare(self.checked.settings.log_levels)
        self.tell_levels()
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
        self.close_listeners([bound for bound in self.bound if bound not in wanted])

    def roll_back(self, change: Change) -> None:
        """Have everything again as it was before the change."""
        self.change = None
        log.expect(self.checked.settings.log_format, self.checked.settings.log_file)
        for name in change.loaded:
            self.services[name].roll_back(change.checked.settings.max_old_generations)
            if self.services[name].current is None:
                self._remove(name)
        self.close_listeners(change.opened)

    def _remove(self, name: str) -> None:
        self.services[name].stop()
        self.leaving.append(self.services.pop(name))

    def close_listeners(self, listeners: Sequence[Bound]) -> None:
        """Have them no more, and nobody of ours."""
        for bound in listeners:
            log.event("closed", url=bound.listener.url)
            bound.retire()
        self.bound = [bound for bound in self.bound if bound not in listeners]

    def tell_levels(self) -> None:
        """Have the log, and every worker, those to come included, know the levels, if they are not as they were."""
        log.set_level(self.levels.own or WHOLE)
        if self.board.log_levels != self.levels.of_targets:
            self.board.keep_log_levels(self.levels.of_targets)
            for service in self:
                service.pool.have_all_look()

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
            if bound.is_ours_alone:
                datagrams.tell_what_is_left(bound.listener.socket, bound.listener.url)
            bound.close()


def rules_of(wanted: settings.Service) -> Rules:
    return Rules(wanted.request_queue_size, wanted.allow_reuse_address, wanted.allow_reuse_port, wanted.receive_buffer)


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
