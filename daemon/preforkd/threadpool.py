"""The library: servers with a bounded pool of threads, in place of socketserver's threading ones.

In the user's own process, and nothing else: no child, no signal handler, no descriptor.
"""

import socketserver
from socket import socket as Socket  # noqa: N812 - servers have an attribute of the name
from typing import Any, Self

from preforkd.threads import Manner, Request, Threads

__all__ = [
    "ThreadPoolMixIn",
    "ThreadPoolTCPServer",
    "ThreadPoolUDPServer",
    "ThreadPoolUnixDatagramServer",
    "ThreadPoolUnixStreamServer",
]


class ThreadPoolMixIn(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Handle requests in at most ``max_threads`` threads, which are used again: ThreadingMixIn with a bound.

    With all of them busy, a connection or datagram waits in the backlog, and the loop goes on: ``service_actions()``
    is called and ``shutdown()`` heard every ``poll_interval``, as ever.

    Attributes, read when used: ``max_threads``; ``idle_thread_timeout`` in seconds, after which a thread that has had
    nothing to do ends. ``daemon_threads`` and ``block_on_close`` are ThreadingMixIn's; the former is read when a thread
    is started, which is not for every request here. Threads idle only while somebody serves, and never keep the
    interpreter from its exit.

    ``process_request_thread()`` is called in the thread, in a new context (contextvars) for each request. What a
    handler leaves in a ``threading.local`` is there for the next one. A ``process_request()`` of one's own making, from
    elsewhere than the loop, is not held back: with all threads busy the request waits in a queue.
    """

    max_threads = 32
    idle_thread_timeout = 10.0

    socket: Socket
    _pool: Threads
    _poll_interval: float | None = 0.5

    def __new__(cls, *_: object, **__: object) -> Self:
        """Here and not in ``__init__``, which subclasses are seen to pass over."""
        server = super().__new__(cls)
        server._pool = Threads()
        return server

    def serve_forever(self, poll_interval: float | None = 0.5) -> None:
        """Serve until ``shutdown()``. ``poll_interval`` is in seconds."""
        self._poll_interval = poll_interval
        with self._pool.loop():
            super().serve_forever(poll_interval)  # type: ignore[arg-type] # None works, here as there: for ever
        if vars(self).get("draining"):  # in a worker of preforkd's, which ends with us
            self._pool.join()

    def handle_request(self) -> None:
        """Hand one request to a thread, or call ``handle_timeout()`` when none comes, or no thread is free, in time."""
        self._pool.keep()
        if "draining" in vars(self):  # in a worker, the lane is what waits, and hears when to stop
            return super().handle_request()
        timeouts = [each for each in (self.socket.gettimeout(), self.timeout) if each is not None]
        if not self._pool.wait_for_room(self.max_threads, min(timeouts, default=None)):
            return self.handle_timeout()
        return super().handle_request()

    def _handle_request_noblock(self) -> None:
        """Take a request if a thread is free. If not, wait for one: the request may be somebody else's by then."""
        if self._pool.busy() < self.max_threads:
            super()._handle_request_noblock()  # type: ignore[misc] # what every loop calls
        else:
            self._pool.wait_for_room(self.max_threads, self._poll_interval)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread of the pool call ``process_request_thread()``."""
        if self.block_on_close:
            vars(self).setdefault("_threads", self._pool.joinable)
        manner = Manner(self.max_threads, self.idle_thread_timeout, self.daemon_threads, type(self).__name__)
        self._pool.submit(Request(self, request, client_address), manner)

    def server_close(self) -> None:
        """Close the listening socket, and wait for threads that are no daemons unless ``block_on_close`` is false."""
        self._pool.dismiss()
        super().server_close()


class ThreadPoolTCPServer(ThreadPoolMixIn, socketserver.TCPServer):
    """TCP, in a pool of threads."""


class ThreadPoolUDPServer(ThreadPoolMixIn, socketserver.UDPServer):
    """UDP, in a pool of threads."""


class ThreadPoolUnixStreamServer(ThreadPoolMixIn, socketserver.UnixStreamServer):
    """Unix stream sockets, in a pool of threads."""


class ThreadPoolUnixDatagramServer(ThreadPoolMixIn, socketserver.UnixDatagramServer):
    """Unix datagram sockets, in a pool of threads."""
