"""``handle_request()`` in a worker: one turn of the lane, for classes whose own loop calls it again and again.

What CPython's does (``BaseServer.handle_request``), with three differences that come from sharing the listeners: the
wait hears the lifeline; a request that another worker was quicker to take has not been one; and with several listeners
it is a request of any of them, for nobody else would take those of the others.

Never for threads of a class's own: what counts is made for one.
"""

import select
import socket
from time import monotonic
from typing import Any

from preforkd_workers.lane import BUSY_TURNS, Lane
from preforkd_workers.turns import Starved


class Drained(SystemExit):
    """Ends a loop over ``handle_request()``: nothing will be taken any more."""


class Single:
    """One request at a time, by the turns of a lane."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._epoll: select.epoll | None = None
        self._socket_timeouts: dict[int, float | None] = {}
        self._busy_turns = 0
        self._has_told = False  # the class, by a call that has returned, that the worker drains

    def handle_request(self, server: Any) -> None:
        """Handle one request, or call ``handle_timeout`` of ``server`` when there is none within its ``timeout``.

        Returns without either when the worker is told to drain meanwhile, so that a loop may end in its own way.
        Raises Drained, a SystemExit of status 0, when it is called once more; ValueError when ``server`` is closed.
        """
        lane = self._lane
        if server.fileno() < 0:
            raise ValueError(f"Invalid file descriptor: {server.fileno()}")  # what selectors would say
        timeout = self._timeout_of(server)
        end = float("inf") if timeout is None else monotonic() + timeout
        if self._epoll is None:
            self._epoll = lane.watch()
        if self._busy_turns >= BUSY_TURNS:
            self._wait(0.0)
        if self._has_told:
            lane.take_remainder()
            raise Drained(0)
        lane.is_taking = True
        try:
            self._handle_one(server, end)
        finally:
            lane.leave()
            self._has_told = lane.draining

    def _handle_one(self, server: Any, end: float) -> None:
        """``end``: of the wait for a request, monotonic."""
        lane, is_woken = self._lane, False
        while not lane.draining:
            try:
                if self._take():
                    return
            except Starved as error:
                lane.hold_back(error)
            if (patience := end - monotonic()) < 0:
                server.handle_timeout()
                return
            is_woken = self._wait(patience)
        if is_woken:
            lane.take_last()
        lane.take_remainder()

    def _take(self) -> bool:
        """One request of whichever server has one, each being the first to be asked in its turn."""
        turns = self._lane.turns()
        self._busy_turns += 1
        turns.append(turns.pop(0))
        return any(turn() for turn in turns)

    def _wait(self, patience: float) -> bool:
        assert self._epoll is not None
        self._busy_turns = 0
        return self._lane.wait(self._epoll, None if patience == float("inf") else patience)

    def _timeout_of(self, server: Any) -> float | None:
        """The lesser of the socket's time-out and the server's, in seconds.

        A time-out that a class has given its socket is for us to keep: the socket itself must not wait when another
        worker was quicker.
        """
        for each in self._lane.servers:
            given, ours = each.socket.gettimeout(), 0.0 if each.socket.type == socket.SOCK_STREAM else None
            if given != ours:
                self._socket_timeouts[id(each)] = given
                each.socket.settimeout(ours)
        timeouts = (self._socket_timeouts.get(id(server)), server.timeout)
        return min((timeout for timeout in timeouts if timeout is not None), default=None)
