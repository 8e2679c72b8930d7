"""The kind ``thread``: many lanes in one process, each a thread, beside a main thread that serves nobody.

Threads are started as they are needed, up to as many as there are rows, and stay until the worker leaves: what a worker
needs of memory is bounded. Never a thread per request.
"""

import faulthandler
import select
import threading
import traceback
from collections.abc import Callable
from socketserver import BaseServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any

from preforkd_workers.lane import Lane
from preforkd_workers.protocol import STACK_OF_THE_DEAF
from preforkd_workers.scoreboard import SINCE

if TYPE_CHECKING:
    from preforkd_workers.process import Worker


class Threads:
    """The threads of a worker."""

    def __init__(self, worker: "Worker") -> None:
        self.worker = worker
        self.started: list[threading.Thread] = []
        self._one_at_a_time = threading.Lock()
        # The main thread only waits: if it is deaf, another one holds the GIL, and all of them stand still.
        faulthandler.register(STACK_OF_THE_DEAF, worker.lifeline.fileno(), all_threads=True)
        for server in worker.servers:
            serve_in_place(server)
        for lane in worker.lanes[:-1]:
            lane.tally.begin = self._and_grow(lane.tally.begin)  # type: ignore[assignment, method-assign]

    def run(self, poll_interval: float | None) -> None:
        """Have lanes serve until they are told to drain, and wait for what they hold."""
        self.start()
        actions = self.worker.actions
        lifeline, wakeup = self.worker.lifeline.fileno(), self.worker.wakeup.fileno()
        while not self.worker.lanes[0].draining:
            ready, _, _ = select.select([lifeline, wakeup], [], [], poll_interval if actions else None)
            if wakeup in ready:
                self.worker.wakeup.clear()
            if lifeline in ready:
                self.worker.lanes[0].drain()
            for act in actions:
                act()
        self.worker.close_the_doors()  # a lane may have been quicker to hear, but a hook is for this thread
        self._join()

    def _join(self) -> None:
        """Wait for the lanes. Those past their hard deadline are not waited for: without them the worker leaves."""
        with self._one_at_a_time:
            lanes = [*zip(self.started, self.worker.tallies, strict=False)]
        while lanes := [(thread, tally) for thread, tally in lanes if thread.is_alive()]:
            left = {thread: self.worker.seconds_left(tally) for thread, tally in lanes}
            waited_for = next((thread for thread in left if left[thread] != 0.0), None)
            if waited_for is None:
                self.worker.abandon()
            waited_for.join(left[waited_for])

    def start(self) -> None:
        """Have one thread more, if it is needed and may be. Raises RuntimeError when the system refuses."""
        with self._one_at_a_time:
            lanes = self.worker.lanes
            if self._is_enough() or (self.started and lanes[0].draining):
                return
            number = len(self.started)
            thread = threading.Thread(target=self._be, args=[lanes[number]], name=f"lane {number}")
            thread.start()
            self.started.append(thread)

    def _be(self, lane: Lane) -> None:
        """What ends a thread of ThreadingMixIn, sys.exit() say, ends the request here, and the lane goes on."""
        while not lane.draining:
            try:
                lane.run(None)
            except SystemExit:
                pass  # as threads have it
            except BaseException:
                traceback.print_exc()

    def _and_grow(self, begin: Callable[[object, object, int], None]) -> Callable[[object, object, int], None]:
        """A lane that has just taken a request sees to it that another one can take the next."""

        def begin_and_grow(request: object, address: object, listener: int) -> None:
            begin(request, address, listener)
            if not self._is_enough():
                try:
                    self.start()
                except RuntimeError as error:  # asked again at the next request
                    self.worker.lanes[0].complain(
                        str(error), "check RLIMIT_NPROC (ulimit -u) and the cgroup's pids.max"
                    )

        return begin_and_grow

    def _is_enough(self) -> bool:
        number = len(self.started)
        return number == len(self.worker.lanes) or 0 in self.worker.rows.column(SINCE)[:number]


def serve_in_place(server: Any) -> None:
    """A server that would start a thread for each request serves in the one that has taken it."""
    if not isinstance(server, ThreadingMixIn):
        return
    if type(server).process_request is ThreadingMixIn.process_request:
        own = type(server).process_request_thread is not ThreadingMixIn.process_request_thread
        server.process_request = (  # type: ignore[method-assign]
            server.process_request_thread if own else BaseServer.process_request.__get__(server)
        )
