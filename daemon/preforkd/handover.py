"""What a master hands over to its successor under the same pid: the state of everything that is served, in a memfd.

Descriptors stay open across the ``execv`` under their numbers, and children stay ours: what has to be told is which is
which. A state of another version is refused before the ``execv``, by ``preforkd check --state-fd``.
"""

import os
import selectors
import socket
from collections.abc import Collection, Iterator
from itertools import count

import msgspec
from msgspec import Struct

from preforkd import __version__, nofile, settings
from preforkd.addresses import Address, parse
from preforkd.children import Child
from preforkd.generations import Generation
from preforkd.levels import Levels
from preforkd.listeners import Bound, Rules
from preforkd.molds import Mold
from preforkd.notify import Manager
from preforkd.plan import State, Timeouts, Wanted
from preforkd.pool import Pool
from preforkd.roster import Roster
from preforkd.service import Service
from preforkd.sizing import Bounds, Breath
from preforkd.sources import Checked
from preforkd.takeover import Lock
from preforkd.wear import Endurance, Weight
from preforkd_workers.scoreboard import Scoreboard
from preforkd_workers.spec import Limits, Listener

# To be raised with every change of what follows and of what it is made of, of the scoreboard's layout, or of the
# protocol with molds and workers.
STATE_VERSION = 3


class _Listener(Struct):
    fd: int
    url: str
    path: str
    inode: tuple[int, int]
    address: Address
    rules: Rules
    name: str
    is_kept: bool


class _Child(Struct):
    """A descriptor, and what is called so in a Child."""

    fd: int
    serial: int
    slot: int
    generation: int
    rows_at: int
    lanes: int
    limits: Limits
    endurance: Endurance
    urls: list[str]
    weight: Weight
    worn: str | None
    retires_first: bool
    reason: str
    pid: int | None
    state: State
    since: float
    born: float
    cause: str | None
    failure: list[str] | None
    is_leaving: bool
    must_look: bool
    was_cut: bool
    is_mute: bool
    unfinished_line: bytes
    ended_before: int
    errors_before: int


class _Mold(Struct):
    """A descriptor, and what is called so in a Mold."""

    fd: int
    pid: int
    born: float
    deadline: float
    ready: bool
    cause: str | None


class _Generation(Struct):
    number: int
    settings: settings.Service
    scaled_to: int | None
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
    wanted: Wanted
    bounds: Bounds
    breath: Breath
    is_drained: bool
    timeouts: Timeouts
    generations: list[_Generation]
    children: list[_Child]


class Inheritance(Struct):
    """The state as it is written."""

    version: int
    release: str  # of the preforkd that has written it
    started: float
    board: int
    generation: int
    checked: Checked
    chosen_levels: dict[str, str]
    listeners: list[_Listener]
    services: list[_Service]
    control: _Listener | None
    lock: tuple[int, str] | None  # descriptor and path
    stored: list[str]  # names of what the service manager keeps
    next_upgrade: str | None
    nofile: tuple[int, int]  # the limit that the daemon was started with, soft and hard


class Surroundings(Struct, frozen=True):
    """What a master has beside its roster."""

    started: float
    control: Bound | None
    lock: Lock | None
    stored: Collection[str]
    next_upgrade: str | None = None  # if another one is wanted: the interpreter, empty for that of who does it


def hand_over(roster: Roster, around: Surroundings) -> tuple[int, list[int]]:
    """Write the state to a memfd. Returns its descriptor, and those that the successor needs, it among them.

    Raises OSError when the system refuses, ValueError when there is a name in it that is no text.
    """
    places = {id(bound): place for place, bound in enumerate(roster.bound)}
    state = Inheritance(
        STATE_VERSION,
        __version__,
        around.started,
        roster.board.fd,
        roster.generation,
        roster.checked,
        roster.levels.chosen,
        [*map(_listener, roster.bound)],
        [_service(service, service in roster.leaving, places) for service in roster],
        _listener(around.control) if around.control else None,
        (around.lock.descriptor, around.lock.path) if around.lock else None,
        [*around.stored],
        around.next_upgrade,
        nofile.inherited(),
    )
    text = msgspec.msgpack.encode(state)
    fd = os.memfd_create("preforkd-state")
    os.pwrite(fd, text, 0)
    return fd, [fd, *_descriptors(state)]


def _descriptors(state: Inheritance) -> Iterator[int]:
    yield state.board
    yield from (each.fd for each in state.listeners)
    for service in state.services:
        yield from (child.fd for child in service.children)
        yield from (each.mold.fd for each in service.generations if each.mold is not None)
    if state.control is not None:
        yield state.control.fd
    if state.lock is not None:
        yield state.lock[0]


def _listener(bound: Bound) -> _Listener:
    number, url = bound.listener.socket.fileno(), bound.listener.url
    return _Listener(number, url, bound.path, bound.inode, bound.address, bound.rules, bound.name, bound.is_kept)


def _service(service: Service, is_leaving: bool, places: dict[int, int]) -> _Service:
    return _Service(
        service.name,
        is_leaving,
        service.current.number if service.current else None,
        service.block_on_close,
        next(service.pool.serials),
        service.pool.wanted,
        service.breathing.bounds,
        service.breathing.breath,
        service.breathing.is_drained,
        service.pool.timeouts,
        [_generation(generation, places) for generation in service.generations.values()],
        [_child(child) for child in service.pool.children.values()],
    )


def _generation(generation: Generation, places: dict[int, int]) -> _Generation:
    mold = generation.mold
    listeners = [places[id(bound)] for bound in generation.listeners if id(bound) in places]
    told = None if mold is None else _Mold(mold.channel.fileno(), *(getattr(mold, name) for name in _OF_MOLD))
    return _Generation(
        generation.number,
        generation.settings,
        generation.scaled_to,
        listeners,
        generation.is_needed,
        told,
        [*generation.leaving],
    )


def _child(child: Child) -> _Child:
    return _Child(child.lifeline.fileno(), *(getattr(child, name) for name in _OF_CHILD))


_OF_MOLD, _OF_CHILD = _Mold.__struct_fields__[1:], _Child.__struct_fields__[1:]


# The other side.


def refusal(version: object) -> str:
    """What is said of a state that we cannot take over."""
    return f"the daemon that runs hands over a state of version {version}, and this takes over version {STATE_VERSION}"


def read(fd: int) -> Inheritance:
    """The state in this descriptor. Raises ValueError when it is of another version, or none at all."""
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    version = msgspec.msgpack.decode(text).get("version")
    if version != STATE_VERSION:
        raise ValueError(refusal(version))
    return msgspec.msgpack.decode(text, type=Inheritance)


def with_stand_ins(checked: Checked, state: Inheritance) -> Checked:
    """These settings with addresses of the same kind for the descriptors that were passed to the daemon, not to us."""
    passed = [(listener.address.place, parse(listener.url)) for listener in state.listeners]

    def stand_ins(address: Address) -> list[Address]:
        found = [other for place, other in passed if address.scheme == "fd" and address.place == place]
        return found or [address]

    addresses = {name: [each for one in some for each in stand_ins(one)] for name, some in checked.addresses.items()}
    return Checked(checked.settings, addresses)


def take_over(state: Inheritance, selector: selectors.BaseSelector, manager: Manager) -> Roster:
    """Everything that is served, as the predecessor has left it."""
    os.set_inheritable(state.board, False)
    roster = Roster(state.checked, Scoreboard.attach(state.board), selector, manager)
    roster.generation = state.generation
    roster.levels = Levels(state.checked.settings.log_levels, state.chosen_levels)
    roster.tell_levels()
    roster.bound = [_bound(each) for each in state.listeners]
    for told in state.services:
        service = _restored(told, roster)
        if told.is_leaving:
            roster.leaving.append(service)
        else:
            roster.services[told.name] = service
    return roster


def surroundings(state: Inheritance) -> Surroundings:
    """What the predecessor had beside its roster."""
    control = _bound(state.control) if state.control else None
    lock = Lock.inherited(*state.lock) if state.lock else None
    return Surroundings(state.started, control, lock, state.stored, state.next_upgrade)


def _bound(told: _Listener) -> Bound:
    os.set_inheritable(told.fd, False)
    made = socket.socket(fileno=told.fd)
    if made.type == socket.SOCK_STREAM:
        made.setblocking(False)  # as it is; but the object would not know, and a target's copy of it not be
    listener = Listener(told.url, made)
    return Bound(listener, told.path, told.inode, told.address, told.rules, told.name, told.is_kept)


def _restored(told: _Service, roster: Roster) -> Service:
    service = Service(told.name, roster.board, roster.selector, roster.scripts)
    service.block_on_close = told.block_on_close
    for each in told.generations:
        generation = service.restore(each.number, each.settings, [roster.bound[place] for place in each.listeners])
        generation.is_needed, generation.leaving = each.is_needed, set(each.leaving)
        generation.scaled_to = each.scaled_to
        if each.mold is not None:
            generation.attend(_grown_mold(each.mold))
        if each.number == told.current:
            service.current = generation
    pool = service.pool
    pool.timeouts, pool.serials = told.timeouts, count(told.next_serial)
    pool.want(told.wanted)
    service.breathing.resume(told.breath, told.bounds, is_drained=told.is_drained)
    for child in told.children:
        pool.adopt(_grown(child, pool))
    return service


def _grown_mold(told: _Mold) -> Mold:
    mold = Mold(told.pid, _socket(told.fd), told.born, told.deadline)
    for name in _OF_MOLD:
        setattr(mold, name, getattr(told, name))
    return mold


def _grown(told: _Child, pool: Pool) -> Child:
    rows = pool.board.board.rows_at(told.rows_at, told.lanes)
    child = Child(told.serial, told.slot, told.generation, told.rows_at, rows, _socket(told.fd))
    for name in _OF_CHILD:
        if name != "lanes":  # those of its rows
            setattr(child, name, getattr(told, name))
    return child


def _socket(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    made = socket.socket(fileno=fd)
    made.setblocking(False)
    return made
