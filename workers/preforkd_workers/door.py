"""The door of a service: asked after every accept whether the connection may stay, across all workers.

Nobody is asked and nothing is locked: whoever has accepted writes into its own row since when, and of which client, and
then counts who was there before. Whoever finds too many closes the connection, and no handler hears of it.

That never lets in one too many, however the lanes interleave (Lamport's bakery, where who still draws a number counts
as before us). The time is noted twice: whose row shows nothing yet when we look will note a later time than ours, and
has to count us. It may turn away one too many at the moment that another leaves.
"""

import _socket
import posix  # for close as it is: gevent has its own in os, which does it later
import socket
import struct
import threading
from _blake2 import blake2b  # not by hashlib, which loads OpenSSL into every worker
from collections.abc import Callable, Iterable, Iterator
from time import monotonic_ns
from typing import Any

from msgspec import Struct

from preforkd_workers.scoreboard import (
    CAPACITY,
    CLIENT,
    DRAINING,
    FULL,
    LAYOUT,
    LIMITED,
    ROW_WORDS,
    SINCE,
    STATE,
    Scoreboard,
)
from preforkd_workers.spec import Limits, Spec
from preforkd_workers.tally import Tally, here

_IPV4_IN_IPV6 = bytes(10) + b"\xff\xff"
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)


def before(since: int, others: Iterable[int]) -> int:
    """How many of the others were there before, or may have been. ``others``: since when; 0: nothing is held."""
    return sum([0 < other <= since for other in others])


def client_of(descriptor: int, family: int, address: Any, limits: Limits) -> int:
    """Who is at the other end, as a word that is not 0: a network, or a user of this machine."""
    try:
        if family == socket.AF_UNIX:
            return 2 << 32 | _uid_of(descriptor)
        packed = socket.inet_pton(family, address[0].partition("%")[0])
    except (OSError, LookupError, TypeError, AttributeError):  # of a family without networks: all are one
        return 3 << 32
    if packed.startswith(_IPV4_IN_IPV6):  # of a listener for both
        packed = packed[len(_IPV4_IN_IPV6) :]
    if len(packed) == 4:
        return 1 << 32 | int.from_bytes(packed) >> (32 - limits.ipv4_prefix)
    network = int.from_bytes(packed) >> (128 - limits.ipv6_prefix)
    if limits.ipv6_prefix > 64:
        network = int.from_bytes(blake2b(network.to_bytes(16), digest_size=8).digest())
    return network or 1


def _uid_of(descriptor: int) -> int:
    connection = _socket.socket(fileno=descriptor)
    try:
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    finally:
        connection.detach()
    uid: int = _CREDENTIALS.unpack(told)[1]
    return uid


class _Block(Struct, frozen=True):
    """Neighbouring slots with as many lanes each: words of all lanes, and the state of each slot's worker."""

    lanes: int
    clients: memoryview
    sinces: memoryview
    states: memoryview

    def sinces_of(self, client: int) -> list[int]:
        """Since when lanes hold what this client has sent."""
        clients = self.clients.tolist()
        return [since for since, whose in zip(self.sinces.tolist(), clients, strict=True) if whose == client]

    def sinces_of_servers(self) -> list[int]:
        """Since when lanes hold what they hold, but for those of workers that drain: others are there instead."""
        sinces, states = self.sinces.tolist(), self.states.tolist()
        if DRAINING not in states:
            return sinces
        return [since for index, since in enumerate(sinces) if states[index // self.lanes] != DRAINING]


class Neighbours:
    """The rows of all lanes of a service, of whichever worker."""

    def __init__(self, board: Scoreboard, service: str) -> None:
        self.board = board
        self.service = service
        self._blocks: list[_Block] = []
        self._layout = -1
        self._changing = threading.Lock()

    @property
    def capacity(self) -> int:
        """How many requests the service may hold at a time; 0: the master has not said."""
        service = self.board.services.get(self.service)
        return int(service.words[CAPACITY]) if service is not None else 0

    def blocks(self) -> list[_Block]:
        if self.board.daemon[LAYOUT] != self._layout:
            with self._changing:
                layout = self.board.daemon[LAYOUT]
                self.board.refresh()
                if service := self.board.services.get(self.service):  # or else it has gone, and we are about to
                    self._blocks = [*_blocks(self.board.words, service.entry.rows)]
                self._layout = layout
        return self._blocks


def _blocks(words: memoryview, rows: Iterable[tuple[int, int, int]]) -> Iterator[_Block]:
    for at, slots, lanes in rows:
        end = at + slots * lanes * ROW_WORDS
        states = words[at + STATE : end : lanes * ROW_WORDS]
        yield _Block(lanes, words[at + CLIENT : end : ROW_WORDS], words[at + SINCE : end : ROW_WORDS], states)


class Door:
    """Stands between the accept of a worker's listeners and its lanes.

    ``barrier``: a lock whose release is an atomic operation of the processor, as that of every real lock is.
    """

    def __init__(self, spec: Spec, next_tally: Callable[[], Tally], barrier: threading.Lock) -> None:
        self.limits = spec.limits
        self.neighbours = Neighbours(spec.scoreboard, spec.service)
        self.next_tally = next_tally  # of the lane that is about to hold what is accepted
        self.barrier = barrier

    def guard(self, listener: Any) -> None:
        """Have whoever accepts from this socket be told ECONNABORTED of a connection that may not stay."""
        accept, family = listener._accept, listener.family

        def guarded_accept() -> tuple[int, Any]:
            here.claimed = None
            descriptor, address = accept()
            tally = self.next_tally()
            client = client_of(descriptor, family, address, self.limits) if self.limits.max_per_client else 0
            word = self._refusal(tally.row, client)
            if word is None:
                here.claimed = tally
                return descriptor, address
            tally.row[word] += 1
            tally.row[SINCE] = 0
            posix.close(descriptor)
            raise ConnectionAbortedError("turned away at the door")

        listener._accept = guarded_accept

    def _refusal(self, row: memoryview, client: int) -> int | None:
        """Claim the row for a request of this client, and say in which word it counts if it may not stay."""
        since = self._claim(row, client)
        limit, blocks = self.limits.max_per_client, self.neighbours.blocks()
        if limit and sum(before(since, block.sinces_of(client)) for block in blocks) > limit:  # we are among them
            return LIMITED
        capacity = self.neighbours.capacity if self.limits.closes_when_full else 0
        if capacity and sum(before(since, block.sinces_of_servers()) for block in blocks) > capacity:
            return FULL
        return None

    def _claim(self, row: memoryview, client: int) -> int:
        """Show that a request is held, of whom, and since when, in ns."""
        row[CLIENT] = client
        self._show_since(row)
        return self._show_since(row)

    def _show_since(self, row: memoryview) -> int:
        with self.barrier:  # of this process: when it is released, whatever was written before is for others to see
            row[SINCE] = since = monotonic_ns()
        return since
