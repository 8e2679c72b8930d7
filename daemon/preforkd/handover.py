"""What a master hands over to its successor under the same pid: the state of everything that is served, in a memfd.

Descriptors stay open across the ``execv`` under their numbers, and children stay ours: what has to be told is which is
which. A state of another version is refused before the ``execv``, by ``preforkd check --takes-state``.
"""

import os
import selectors
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from preforkd import __version__, limits, settings
from preforkd.children import Child
from preforkd.generations import Generation
from preforkd.listeners import Address, Bound, Rules, parse
from preforkd.molds import Mold
from preforkd.notify import Manager
from preforkd.plan import State, Wanted
from preforkd.pool import Pool
from preforkd.roster import Roster, rules_of
from preforkd.service import Service
from preforkd.sources import EXPORTER, Checked
from preforkd.takeover import Lock
from preforkd_workers.scoreboard import Scoreboard
from preforkd_workers.spec import Listener

# To be raised with every change of what follows, of the scoreboard's layout, or of the protocol with molds and workers.
STATE_VERSION = 1


class _Listener(Struct):
    fd: int
    listener_url: str
    address: str
    service: str  # whose rules it was opened by
    path: str
    inode: tuple[int, int]
    name: str
    is_kept: bool


class _Child(Struct):
    serial: int
    slot: int
    generation: int
    row_at: int
    fd: int
    pid: int | None
    state: State
    since: float
    born: float
    cause: str | None
    failure: list[str] | None
    is_leaving: bool
    is_mute: bool
    unfinished_line: bytes
    before: tuple[int, int]


class _Mold(Struct):
    pid: int
    fd: int
    is_ready: bool
    born: float


class _Generation(Struct):
    number: int
    settings: settings.Service
    listeners: list[int]  # of the state's list
    is_needed: bool
    mold: _Mold | None
    leaving: list[int]


class _Service(Struct):
    name: str
    is_leaving: bool
    current: int | None
    block_on_close: bool
    next_serial: int
    size: int
    generation: int
    max_surge: int
    max_unavailable: int
    hurried: frozenset[int]
    generations: list[_Generation]
    children: list[_Child]


class Inheritance(Struct):
    """The state as it is written."""

    version: int
    release: str  # of the preforkd that has written it
    started: float
    board: int
    generation: int
    settings: settings.Settings
    listeners: list[_Listener]
    services: list[_Service]
    control: _Listener | None
    lock: tuple[int, str] | None  # descriptor and path
    stored: list[str]  # names of what the service manager keeps
    sizes_before_drain: dict[str, int]
    nofile: tuple[int, int]  # the limit that the daemon was started with, soft and hard


@dataclass(frozen=True)
class Surroundings:
    """What a master has beside its roster."""

    started: float
    sizes_before_drain: dict[str, int]
    control: Bound | None
    lock: Lock | None
    stored: Collection[str]


def hand_over(roster: Roster, around: Surroundings) -> tuple[int, list[int]]:
    """Write the state to a memfd. Returns its descriptor, and those that the successor needs, it among them."""
    listeners = [_listener(bound, _service_of(roster, bound)) for bound in roster.bound]
    places = {id(bound): place for place, bound in enumerate(roster.bound)}
    services = [_service(service, service in roster.leaving, places) for service in roster]
    state = Inheritance(
        STATE_VERSION,
        __version__,
        around.started,
        roster.board.fd,
        roster.generation,
        roster.checked.settings,
        listeners,
        services,
        _listener(around.control, "") if around.control else None,
        (around.lock.descriptor, around.lock.path) if around.lock else None,
        [*around.stored],
        around.sizes_before_drain,
        limits.inherited(),
    )
    fd = os.memfd_create("preforkd-state")
    os.pwrite(fd, msgspec.json.encode(state), 0)
    needed = [fd, state.board, *(each.fd for each in listeners), *_descriptors(services)]
    needed += [state.control.fd] if state.control else []
    needed += [state.lock[0]] if state.lock else []
    return fd, needed


def _listener(bound: Bound, service: str) -> _Listener:
    number, url = bound.listener.socket.fileno(), bound.listener.url
    return _Listener(number, url, bound.address.url, service, bound.path, bound.inode, bound.name, bound.is_kept)


def _descriptors(services: list[_Service]) -> Iterator[int]:
    for service in services:
        yield from (child.fd for child in service.children)
        yield from (each.mold.fd for each in service.generations if each.mold is not None)


def _service_of(roster: Roster, bound: Bound) -> str:
    return next((service.name for service in roster if bound in service.listeners), "")


def _service(service: Service, is_leaving: bool, places: dict[int, int]) -> _Service:
    wanted = service.pool.wanted
    return _Service(
        service.name,
        is_leaving,
        service.current.number if service.current else None,
        service.block_on_close,
        next(service.pool.serials),
        wanted.size,
        wanted.generation,
        wanted.max_surge,
        wanted.max_unavailable,
        wanted.hurried,
        [_generation(generation, places) for generation in service.generations.values()],
        [_child(child) for child in service.pool.children.values()],
    )


def _generation(generation: Generation, places: dict[int, int]) -> _Generation:
    mold = generation.mold
    listeners = [places[id(bound)] for bound in generation.listeners if id(bound) in places]
    told = None if mold is None else _Mold(mold.pid, mold.channel.fileno(), mold.ready, mold.born)
    return _Generation(
        generation.number, generation.settings, listeners, generation.is_needed, told, [*generation.leaving]
    )


def _child(child: Child) -> _Child:
    return _Child(
        child.serial,
        child.slot,
        child.generation,
        child.row_at,
        child.lifeline.fileno(),
        child.pid,
        child.state,
        child.since,
        child.born,
        child.cause,
        child.failure,
        child.is_leaving,
        child.is_mute,
        child._unfinished_line,
        (child.ended_before, child.errors_before),
    )


# The other side.


def refusal(version: object) -> str:
    """What is said of a state that we cannot take over."""
    return f"the daemon that runs hands over a state of version {version}, and this takes over version {STATE_VERSION}"


def rehearse(fd: int) -> str | None:
    """Why we could not take over the state in this descriptor, if so: asked before anything is at stake."""
    try:
        for listener in (state := read(fd)).listeners:
            _address(listener)
        _addresses(state)
    except ValueError as fault:
        return str(fault)
    return None


def read(fd: int) -> Inheritance:
    """The state in this descriptor. Raises ValueError when it is of another version, or none at all."""
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    version = msgspec.json.decode(text).get("version")
    if version != STATE_VERSION:
        raise ValueError(refusal(version))
    return msgspec.json.decode(text, type=Inheritance)


def take_over(state: Inheritance, selector: selectors.BaseSelector, manager: Manager) -> Roster:
    """Everything that is served, as the predecessor has left it."""
    board = Scoreboard.attach(state.board)
    roster = Roster(Checked(state.settings, _addresses(state)), board, selector, manager)
    roster.generation = state.generation
    roster.bound = [_bound(each, state) for each in state.listeners]
    for told in state.services:
        service = _restored(told, roster)
        if told.is_leaving:
            roster.leaving.append(service)
        else:
            roster.services[told.name] = service
    return roster


def _addresses(state: Inheritance) -> dict[str, list[Address]]:
    addresses = {name: [parse(url) for url in each.listen] for name, each in state.settings.services.items()}
    if state.settings.metrics:
        addresses[EXPORTER] = [parse(state.settings.metrics)]
    return addresses


def surroundings(state: Inheritance) -> Surroundings:
    """What the predecessor had beside its roster."""
    control = _bound(state.control, state) if state.control else None
    lock = Lock.inherited(*state.lock) if state.lock else None
    return Surroundings(state.started, state.sizes_before_drain, control, lock, state.stored)


def _bound(told: _Listener, state: Inheritance) -> Bound:
    os.set_inheritable(told.fd, False)
    made = socket.socket(fileno=told.fd)
    wanted = state.settings.services.get(told.service)
    address, rules = _address(told), rules_of(wanted) if wanted else Rules()
    listener = Listener(told.listener_url, made)
    return Bound(listener, told.path, told.inode, address, rules, told.name, told.is_kept)


def _address(told: _Listener) -> Address:
    return parse(told.address) if told.address else Address("", "")  # the control socket is not asked for by an address


def _restored(told: _Service, roster: Roster) -> Service:
    service = Service(told.name, roster.board, roster.selector)
    service.block_on_close = told.block_on_close
    for each in told.generations:
        generation = service.restore(each.number, each.settings, [roster.bound[place] for place in each.listeners])
        generation.is_needed, generation.leaving = each.is_needed, set(each.leaving)
        if each.mold is not None:
            generation.attend(_grown_mold(each.mold, each.settings.boot_timeout))
        if each.number == told.current:
            service.current = generation
            service.pool.timeouts = generation.timeouts
    service.pool.want(
        Wanted(
            told.size,
            told.generation,
            max_surge=told.max_surge,
            max_unavailable=told.max_unavailable,
            hurried=told.hurried,
        )
    )
    for child in told.children:
        service.pool.adopt(_grown(child, service.pool), told.next_serial)
    return service


def _grown_mold(told: _Mold, boot_timeout: float) -> Mold:
    mold = Mold(told.pid, _socket(told.fd), told.born, float("inf") if told.is_ready else told.born + boot_timeout)
    mold.ready = told.is_ready
    return mold


def _grown(told: _Child, pool: Pool) -> Child:
    row = pool.board.board.row_at(told.row_at)
    child = Child(told.serial, told.slot, told.generation, told.row_at, row, _socket(told.fd))
    child.pid, child.state, child.since, child.born = told.pid, told.state, told.since, told.born
    child.cause, child.failure, child.is_leaving, child.is_mute = (
        told.cause,
        told.failure,
        told.is_leaving,
        told.is_mute,
    )
    child._unfinished_line = told.unfinished_line
    child.ended_before, child.errors_before = told.before
    return child


def _socket(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    made = socket.socket(fileno=fd)
    made.setblocking(False)
    return made
