"""Descriptors that outlive us: passed to us by name at the start, and given to the service manager for our successor.

``Inherited`` is what has been passed (sd_listen_fds(3)): the sockets of a socket unit, and what an earlier instance of
ours has put into the manager's store. ``Store`` is the other direction.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from time import monotonic_ns
from typing import Self
from urllib.parse import quote

from msgspec import Struct
from msgspec.structs import replace

from preforkd import log
from preforkd.addresses import Address
from preforkd.deaths import Obituary, held_by
from preforkd.listeners import Bound, ListenError, Rules, bind, file_of, taken_back
from preforkd.notify import Manager
from preforkd_workers.scoreboard import CAUSES, EMPTY, EXITS, KILLED, PID, ROW_GENERATION, STATE, Scoreboard

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_FIRST = 3  # SD_LISTEN_FDS_START

# The scoreboard's name in the store; no listener's, for those have a colon in their address.
SCOREBOARD = "preforkd-scoreboard"

_LONGEST_NAME = 255  # bytes, sd_notify(3)


def listener_name(url: str, number: int = 1, inode: tuple[int, int] | None = None) -> str:
    """What a listener is called in the store: ASCII without control characters and colons.

    The address as it was given, percent-encoded. Then what tells apart those that look alike: which one it is of those
    with the same address (port 0), and the socket file, for one that was removed meanwhile leads nowhere.
    """
    name = quote(url, safe="/[]@?=&,")
    if number > 1:
        name += f"#{number}"
    if inode is not None:
        name += f"#{inode[0]:x}.{inode[1]:x}"
    return name


class Inherited:
    """What has been passed to us. Whoever uses a descriptor takes it; what nobody has taken is let go of."""

    def __init__(self, passed: Iterable[tuple[str, int]] = ()) -> None:
        self._passed = list(passed)
        self.taken: set[str] = set()  # the names of what was taken by name

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self:
        """What the environment of this process tells of, which is taken out of it."""
        pid, number, names = (environment.pop(variable, "") for variable in _VARIABLES)
        if pid != str(os.getpid()) or not number.isdecimal():
            return cls()
        numbers = range(_FIRST, _FIRST + int(number))
        called = [*(names.split(":") if names else ()), *len(numbers) * ["unknown"]]
        return cls((name, each) for name, each in zip(called, numbers, strict=False) if _keep_from_programs(each))

    def numbers(self, name: str) -> list[int]:
        """The descriptors of this name."""
        return [number for called, number in self._passed if called == name]

    def take_number(self, number: int) -> None:
        """This descriptor is used, whatever its name."""
        self._passed = [each for each in self._passed if each[1] != number]

    def take_name(self, name: str) -> int | None:
        """One descriptor of this name, which is the caller's from now on; None when there is none."""
        number = next(iter(self.numbers(name)), None)
        if number is not None:
            self.take_number(number)
            self.taken.add(name)
        return number

    def let_go(self, manager: Manager) -> None:
        """Close what nobody has taken, and wait until the store has let go of it as well: its address is free then.

        All but the scoreboard, which is taken when the listeners are known.
        """
        unused = [each for each in self._passed if each[0] != SCOREBOARD]
        for name, number in unused:
            log.event("descriptor_unused", name=name, fd=number)
            os.close(number)
            manager.forget(name)
        if unused:
            manager.barrier()
        self._passed = [each for each in self._passed if each not in unused]


def _keep_from_programs(number: int) -> bool:
    """Keep a descriptor from the programs that we or a handler run; whether it is open at all."""
    try:
        os.set_inheritable(number, False)
    except OSError:
        return False
    return True


class Place(Struct, frozen=True):
    """Where a service is to listen, and the descriptor of the listener that is there already, if there is one."""

    service: str
    address: Address
    count: int = 1  # of those that have the same address so far, for port 0
    descriptor: int | None = None

    def open(self, rules: Rules) -> Bound:
        """Take the listener back, or bind it. Raises ListenError."""
        if self.descriptor is None:
            bound = bind(self.address, rules)
        else:
            bound = taken_back(self.address, rules, self.descriptor)
        if self.address.scheme != "fd":  # those are whoever's who has opened them
            bound.name = listener_name(self.address.url, self.count, bound.inode if bound.path else None)
        return bound


def places(addresses: Mapping[str, Sequence[Address]], inherited: Inherited, used: Collection[str] = ()) -> list[Place]:
    """Where the services are to listen; what was inherited for it is taken. One name may be that of many descriptors.

    ``used``: the names in the store of listeners that are open already.
    Raises ListenError when a descriptor was not passed.
    """
    found = []
    counts: Counter[str] = Counter()
    for service, address in ((service, each) for service, some in addresses.items() for each in some):
        if address.scheme == "fd":
            numbers = inherited.numbers(address.name) if address.name else [address.number]
            if not numbers:
                advice = "have FileDescriptorName= of the socket unit say so"
                raise ListenError(f"{address.url}: no descriptor of this name was passed; {advice}")
            for number in numbers:
                inherited.take_number(number)
                found.append(Place(service, replace(address, number=number)))
            continue
        counts[address.url] += 1
        while listener_name(address.url, counts[address.url]) in used:
            counts[address.url] += 1
        name = listener_name(address.url, counts[address.url], file_of(address))
        found.append(Place(service, address, counts[address.url], inherited.take_name(name)))
    return found


class Store:
    """What the service manager keeps for our successor."""

    def __init__(self, manager: Manager, names: Iterable[str] = ()) -> None:
        self.manager = manager
        self.names = set(names)  # of what it keeps

    def sync(self, bounds: Sequence[Bound], board: Scoreboard) -> None:
        """Have it keep these listeners and the scoreboard, and nothing else. The socket file of a listener stays, too.

        Call when the daemon serves, and again when its listeners have changed.
        """
        if not self.manager.is_there:
            return
        wanted = {bound.name: bound for bound in bounds if bound.name and len(bound.name) <= _LONGEST_NAME}
        descriptors = {name: bound.listener.socket.fileno() for name, bound in wanted.items()} | {SCOREBOARD: board.fd}
        for bound in bounds:
            bound.is_kept = bound.name in wanted
        for name in sorted(self.names ^ descriptors.keys()):  # what it keeps under a new name is another's leavings
            self.manager.forget(name)
        for name in sorted(descriptors.keys() - self.names):
            self.manager.keep(name, descriptors[name])
        self.names = {*descriptors}


def scoreboard(name: str, inherited: Inherited) -> Scoreboard:
    """The scoreboard that was passed to us, with nobody in its rows, if we can read it; else a new one."""
    descriptor = inherited.take_name(SCOREBOARD)
    if descriptor is not None:
        try:
            board = Scoreboard.attach(descriptor)
            _settle(board)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.event("scoreboard_replaced", reason=str(error))
            os.close(descriptor)
            inherited.taken.remove(SCOREBOARD)
        else:
            return board
    return Scoreboard.create(name)


def _settle(board: Scoreboard) -> None:
    """Nobody of those who wrote it is alive: empty their rows, count what died with them, and go on counting."""
    for name, service in [*board.services.items()]:
        for slot, rows in service.slots():
            first = rows[0]
            is_orphans, gen, pid = first[STATE] != EMPTY, first[ROW_GENERATION], first[PID]
            held = held_by(rows, [*service.listeners()], monotonic_ns())
            lost = rows.settle()
            service.words[KILLED] += lost
            service.words[EXITS + CAUSES.index("orphaned")] += is_orphans
            if is_orphans:
                death = Obituary("orphaned", None, None, lost=lost, held=held)
                log.event("worker_exit", service=name, slot=slot, gen=gen, pid=pid, **death.fields())
        board.remove(name)  # until the settings name it again
