"""What a master hands over to its successor under the same pid: the state of everything that is served, in a memfd.

Descriptors stay open across the ``execv`` under their numbers, and children stay ours: what has to be told is which is
which. A state of another version is refused before the ``execv``, by ``preforkd check --takes-state``.
"""

import os
import selectors
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from preforkd import settings
from preforkd.children import Child
from preforkd.generations import Generation
from preforkd.listeners import Bound, parse
from preforkd.molds import Mold
from preforkd.plan import State, Wanted
from preforkd.pool import Pool
from preforkd.roster import Roster, rules_of
from preforkd.service import Service
from preforkd.sources import EXPORTER, Checked
from preforkd.succession import STATE_VERSION, refusal
from preforkd_workers.scoreboard import Scoreboard
from preforkd_workers.spec import Listener


class _Listener(Struct):
    fd: int
    listener_url: str
    address: str
    service: str  # whose rules it was opened by
    path: str
    inode: tuple[int, int]


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
    hurried: int
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
    extras: dict[str, Any]  # of the daemon around the roster: descriptors by name, the manager's environment, …


def hand_over(roster: Roster, release: str, started: float, extras: dict[str, Any]) -> tuple[int, list[int]]:
    """Write the state to a memfd. Returns its descriptor, and those that the successor needs, it among them."""
    listeners = [
        _Listener(
            bound.listener.socket.fileno(),
            bound.listener.url,
            bound.address.url,
            _service_of(roster, bound),
            bound.path,
            bound.inode,
        )
        for bound in roster.bound
    ]
    places = {id(bound): place for place, bound in enumerate(roster.bound)}
    services = [_service(service, service in roster.leaving, places) for service in roster]
    state = Inheritance(
        STATE_VERSION,
        release,
        started,
        roster.board.fd,
        roster.generation,
        roster.checked.settings,
        listeners,
        services,
        extras,
    )
    fd = os.memfd_create("preforkd-state")
    os.pwrite(fd, msgspec.json.encode(state), 0)
    needed = [fd, state.board, *(each.fd for each in listeners), *_descriptors(services)]
    return fd, needed


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


def read(fd: int) -> Inheritance:
    """The state in this descriptor. Raises ValueError when it is of another version, or none at all."""
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    version = msgspec.json.decode(text).get("version")
    if version != STATE_VERSION:
        raise ValueError(refusal(version))
    return msgspec.json.decode(text, type=Inheritance)


def take_over(state: Inheritance, selector: selectors.BaseSelector) -> Roster:
    """Everything that is served, as the predecessor has left it."""
    addresses = {name: [parse(url) for url in each.listen] for name, each in state.settings.services.items()}
    if state.settings.metrics:
        addresses[EXPORTER] = [parse(state.settings.metrics)]
    board = Scoreboard.attach(state.board)
    roster = Roster(Checked(state.settings, addresses), board, selector)
    roster.generation = state.generation
    roster.bound = [_bound(each, state) for each in state.listeners]
    for told in state.services:
        service = _restored(told, roster)
        if told.is_leaving:
            roster.leaving.append(service)
        else:
            roster.services[told.name] = service
    return roster


def _bound(told: _Listener, state: Inheritance) -> Bound:
    os.set_inheritable(told.fd, False)
    made = socket.socket(fileno=told.fd)
    wanted = state.settings.services.get(told.service)
    bound = Bound(Listener(told.listener_url, made), told.path, told.inode, parse(told.address))
    return bound if wanted is None else Bound(bound.listener, told.path, told.inode, bound.address, rules_of(wanted))


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
