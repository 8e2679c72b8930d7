"""The threads of one server: never more than so many, started as needed, used again and again.

It knows the server by its requests only, so nobody who idles here keeps a server alive. One lock guards everything, and
nothing of anybody else's is called while it is held, except what Python itself may run at any point: a signal handler
or a finaliser that closes the server. Therefore the lock is reentrant, and always taken by ``with`` on the lock itself,
which an exception of a signal handler cannot leave half done, as it can that of a Condition.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakSet


class Request(NamedTuple):
    """What a thread is to finish."""

    server: Any
    request: Any
    client_address: Any

    def finish(self) -> None:
        """Finish it, in a context (contextvars) of its own, such as a new thread would have."""
        Context().run(self.server.process_request_thread, self.request, self.client_address)


class Manner(NamedTuple):
    """What a server asks of its threads at this moment."""

    max_threads: int
    idle_timeout: float  # seconds
    daemon: bool
    name: str


class Joinable(list[threading.Thread]):
    """The threads that ``server_close()`` waits for: those that live and are no daemons, as in socketserver."""

    def __init__(self, pool: "Threads") -> None:
        super().__init__()
        self.pool = pool

    def append(self, thread: threading.Thread) -> None:
        self[:] = [each for each in self if each.is_alive()]
        if not thread.daemon:
            super().append(thread)

    def join(self) -> None:
        """Wait for all, but not for ourselves: a handler may close its server, and is waited for next time.

        They are taken out first, lest two handlers that do so wait for each other.
        """
        self.pool.dismiss()
        threads, self[:] = self[:], []
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        self += [thread for thread in threads if thread.is_alive()]


class PooledThread(threading.Thread):
    """Finishes one request after the other. What is raised through it ends it, and it alone."""

    def __init__(self, pool: "Threads", number: int, manner: Manner) -> None:
        super().__init__(name=f"{manner.name}-{number}", daemon=manner.daemon)
        self.pool = pool
        self.number = number

    def run(self) -> None:
        try:
            while request := self.pool.next(self):
                request.finish()
                del request  # and with it the server, while we idle
        finally:
            self.pool.leave(self)


class Threads:
    """A pool of threads.

    A thread that has nothing to do hangs up a *bell*, a lock that is taken, and waits for it; who has something to do
    takes down the last one and rings it. That is a call to look, not a gift: who looks first, takes the request.
    """

    def __init__(self) -> None:
        self.joinable = Joinable(self)
        self._manner = Manner(0, 0.0, False, "")
        self._kept = True  # whether to idle although no loop runs, for somebody who makes one of handle_request()
        self._loops: list[threading.Thread] = []  # in which serve_forever() runs
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._freed = threading.Condition(self._lock)
        self._members: dict[int, PooledThread] = {}
        self._bells: list[threading.Lock] = []
        self._queue: deque[Request] = deque()  # longer than the bells that ring when somebody submits without room

    # For whoever accepts.

    def busy(self) -> int:
        """How many threads have something to do."""
        with self._lock:
            return len(self._members) - len(self._bells)

    def wait_for_room(self, max_threads: int, timeout: float | None) -> bool:
        """Wait until fewer are busy, for so many seconds at most; whether they are."""
        with self._lock:
            return self._freed.wait_for(lambda: self.busy() < max_threads, timeout)

    def submit(self, request: Request, manner: Manner) -> None:
        """Have the request finished, by an idle thread if there is one. Raises RuntimeError if none can be started."""
        with self._lock:
            self._manner = manner
            self._queue.append(request)
            thread = self._call()
        if thread is not None:
            self._start(thread, request)

    def keep(self) -> None:
        """Let threads idle until ``dismiss()``."""
        self._kept = True

    @contextmanager
    def loop(self) -> Iterator[None]:
        """While this thread runs a loop, let threads idle; not after it."""
        ours = threading.current_thread()
        self._loops.append(ours)
        try:
            yield
        finally:
            with suppress(ValueError):  # dismissed
                self._loops.remove(ours)
            self._kept = False
            self.call_off()

    def dismiss(self) -> None:
        """Have the idle ones leave, and the others when they have finished."""
        self._kept = False
        self._loops.clear()
        self.call_off()

    def call_off(self) -> None:
        """Have those leave who idle, if they no longer may."""
        with self._lock:
            while self._bells and not self._may_idle():
                self._bells.pop().release()

    def join(self) -> None:
        """Wait until all have left who are there now."""
        for thread in list(self._members.values()):
            thread.join()

    def forget(self) -> None:
        """In a child after a fork: none of the threads is here, and what they hold is not ours."""
        self._loops = [thread for thread in self._loops if thread is threading.current_thread()]
        self._begin()

    # For the threads.

    def next(self, thread: PooledThread) -> Request | None:
        """The next request, as soon as there is one. None: leave."""
        bell: threading.Lock | None = None
        while True:
            with self._lock:
                if self._members.get(thread.number) is not thread:  # forked, or its start has failed
                    return None
                has_rung = bell not in self._bells
                if bell is not None and not has_rung:
                    self._bells.remove(bell)
                if self._queue:
                    return self._queue.popleft()
                if not has_rung or not self._may_idle():
                    return None
                bell = threading.Lock()
                bell.acquire()
                self._bells.append(bell)
                self._freed.notify()
            bell.acquire(timeout=min(self._manner.idle_timeout, threading.TIMEOUT_MAX))

    def leave(self, thread: PooledThread) -> None:
        """Take the thread out, and have another one do what has come in meanwhile."""
        with self._lock:
            if self._members.get(thread.number) is thread:
                del self._members[thread.number]
            self._freed.notify()
            request = self._queue[0] if self._queue else None
            successor = self._call() if request else None
        if successor is not None and request is not None:
            self._start(successor, request)

    def _may_idle(self) -> bool:
        if _is_exiting:
            return any(not thread.daemon for thread in self._loops)
        return self._kept or bool(self._loops)

    def _call(self) -> PooledThread | None:
        """Call somebody for what is in the queue: an idle one, or a new one, which is returned, or nobody."""
        if self._bells:
            self._bells.pop().release()
            return None
        if len(self._members) >= self._manner.max_threads:
            return None
        number = next(number for number in count(1) if number not in self._members)
        thread = self._members[number] = PooledThread(self, number, self._manner)
        return thread

    def _start(self, thread: PooledThread, request: Request) -> None:
        try:
            thread.start()
        except BaseException:  # what a signal handler has raised, too: if it runs all the same, it leaves
            with self._lock:
                self._members.pop(thread.number, None)
                with suppress(ValueError):
                    self._queue.remove(request)
            raise
        self.joinable.append(thread)


_pools: WeakSet[Threads] = WeakSet()
_is_exiting = False


def _exit() -> None:
    """The main thread has ended: whoever idles must not keep the interpreter. A loop in another thread goes on."""
    global _is_exiting
    _is_exiting = True
    for pool in list(_pools):
        pool.call_off()


def _forget() -> None:
    for pool in list(_pools):
        pool.forget()


os.register_at_fork(after_in_child=_forget)
try:
    threading._register_atexit(_exit)  # type: ignore[attr-defined] # as concurrent.futures: atexit comes after the joins
except RuntimeError:  # imported that late
    _exit()
