"""A keeper: what a worker is where each request has a process of its own (``max_requests = 1``).

It is the master's child, and has the slot, its row and its lifeline. It serves nobody: one after the other it forks
*fresh* processes, each ahead of the one request that it takes, and nobody else is asked for that. What the master
signals it passes on; and what its fresh process dies of, it dies of too, so that both are one worker to the master.
"""

import faulthandler
import os
import posix  # for waitpid as it is: gevent has its own in os
import resource
import select
import signal
import socket
from _signal import pthread_sigmask, sigwait  # type: ignore[import-not-found]  # those of signal make enums of what they return
from collections.abc import Callable
from contextlib import suppress
from socketserver import BaseServer, StreamRequestHandler, TCPServer, UDPServer
from typing import Any, NoReturn

from preforkd_workers import streams
from preforkd_workers.copies import fork
from preforkd_workers.lifeline import Lifeline
from preforkd_workers.prctl import signal_on_parent_death
from preforkd_workers.process import Worker, flush
from preforkd_workers.protocol import DRAIN, END_OF_FILE, LOOK, STACK_OF_THE_DEAF, STACKS
from preforkd_workers.scoreboard import OK, PEER, Rows, ended, write_text
from preforkd_workers.tally import Tally, precede
from preforkd_workers.turns import overrides, see_through, take_of

# What it waits for: what is to be passed on, and the end of the fresh process. Plain numbers, like those below: what a
# process touches after a fork is copied.
_HEARD = tuple(map(int, (DRAIN, END_OF_FILE, LOOK, STACKS, STACK_OF_THE_DEAF, signal.SIGABRT, signal.SIGCHLD)))
_SIGKILL, _SIG_UNBLOCK = int(signal.SIGKILL), int(signal.SIG_UNBLOCK)


def keep(lifeline: Lifeline, row: memoryview, look: Callable[[], None], after: Callable[[], object]) -> None:
    """Have a fresh process for each request until the lifeline is cut. Returns in these only.

    ``look``: done on LOOK, so that those to come begin with what has changed. ``after``: done after each.
    """
    pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    keeper, before = os.getpid(), ended(row)
    while not lifeline.is_cut:
        try:
            fresh = fork()
        except OSError as error:
            lifeline.notice("fork_refused", reason=error.strerror)
            os._exit(1)  # and the master holds back if it is refused the same
        if fresh == 0:
            return _begin(keeper)
        status = _attend(fresh, lifeline, look)
        now = ended(row)
        if status or (now == before and not lifeline.is_cut):
            _end_as(status)
        before, lifeline.is_ready = now, True
        after()
    lifeline.leaving()
    os._exit(0)


def _begin(keeper: int) -> None:
    """A fresh process has no life beyond that of its keeper. What it is signalled it hears itself."""
    signal_on_parent_death(_SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)
    pthread_sigmask(_SIG_UNBLOCK, _HEARD)


def _attend(fresh: int, lifeline: Lifeline, look: Callable[[], None]) -> int:
    """Pass on what is signalled until the fresh process has died; of what, as waitpid(2) says it. If it was told to
    drain while it was made, and so has died of that, it has ended well."""
    was_told = False
    while True:
        number = sigwait(_HEARD)
        if number == signal.SIGCHLD:
            pid, status = posix.waitpid(fresh, os.WNOHANG)
            if pid:
                return 0 if was_told and status == DRAIN else status
            continue  # it was stopped, say
        if number == DRAIN:
            was_told = True
            lifeline.let_go()  # for it may have died already
        elif number == LOOK:
            look()
        os.kill(fresh, number)
        if number == signal.SIGABRT:  # the master wants an end, and kills us if it does not come
            return posix.waitpid(fresh, 0)[1] or signal.SIGABRT


def _end_as(status: int) -> NoReturn:
    """Die of the same: an exit with this status, or this signal, of which the fresh process has left the core."""
    exitcode = os.waitstatus_to_exitcode(status)
    if exitcode < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        faulthandler.disable()
        with suppress(OSError):  # nothing withstands SIGKILL anyway
            signal.signal(-exitcode, signal.SIG_DFL)
        pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), -exitcode)
    os._exit(exitcode)


# What makes a worker one for a single request.


def be_fresh(worker: Worker) -> None:
    """Whoever has taken a request takes no other: the lane is over when it is back, and with it the worker.

    Already as it begins, for a server's own threads may still be at it when the lane is back.
    """
    (lane,), (tally,) = worker.lanes, worker.tallies

    def close() -> None:
        lane.draining = True

    precede(tally, "begin", close)
    precede(tally, "refuse", close)
    _belong_to_keeper(worker)
    if worker.lifeline.is_cut:  # while it was made
        lane.draining = True


def is_plain(server: BaseServer) -> bool:
    """Whether nothing of this server but its handler does anything before, during or after a request."""
    is_stream = isinstance(server, TCPServer) and not isinstance(server, UDPServer)
    has_own = overrides(server, BaseServer, "serve_forever", "service_actions")
    return (
        is_stream and not has_own and not overrides(server, TCPServer, "server_close") and take_of(server) is not None
    )


def be_plain(worker: Worker) -> None:
    """For plain servers: whoever has seen a request through has nothing left to do."""
    (lane,), (tally,) = worker.lanes, worker.tallies
    end = tally.end

    def end_and_leave(outcome: int) -> None:
        end(outcome)
        if outcome == OK:
            flush()
            streams.finish()
            os._exit(0)
        lane.draining = True  # and an exit that was asked for has its status

    tally.end = end_and_leave  # type: ignore[method-assign]
    _belong_to_keeper(worker)


def _belong_to_keeper(worker: Worker) -> None:
    worker.is_deserted = lambda: worker.lifeline.is_broken  # the parent is the keeper
    _warm_up(worker)


class _Echo(StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class _Nobody(TCPServer):
    """Serves whatever it is given, and does nothing with it."""

    def __init__(self) -> None:
        """No socket."""


def _warm_up(worker: Worker) -> None:
    """Have a lane that has to wait see a request through that is none: what its request will touch is copied now, while
    nobody waits for it."""
    lane, wait = worker.lanes[0], worker.lanes[0].wait

    def warm_up_and_wait(epoll: select.epoll, patience: float | None) -> bool:
        lane.wait = wait  # type: ignore[method-assign]
        for server in worker.servers:
            with suppress(OSError):  # out of descriptors (rlimits, say): the request is slower, and that is all
                _rehearse(server, worker.rows[0])
        return wait(epoll, patience)

    lane.wait = warm_up_and_wait  # type: ignore[method-assign]


def _rehearse(server: Any, row: memoryview) -> None:
    """The code of the target is not run, but its handler's is touched."""
    is_plain = take_of(server) is not None and not overrides(server, TCPServer, "shutdown_request", "close_request")
    stage, handler = server if is_plain else _Nobody(), server.RequestHandlerClass
    touched = [getattr(each, "__code__", None) for each in vars(handler).values()]
    server.socket.getsockname()
    write_text(row, PEER, "")
    tally = Tally(Rows.blank()[0])
    stage.RequestHandlerClass = _Echo
    try:
        request, client = socket.socketpair()
        with client:
            client.sendall(b"\n")
            client.shutdown(socket.SHUT_WR)
            tally.begin(request, ("127.0.0.1", len(touched)), 0)
            see_through(stage, tally, request, ("", 0))
    finally:
        stage.RequestHandlerClass = handler
