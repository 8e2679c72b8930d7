"""The control socket: one JSON object a line, each way, answered from the master's own loop.

It knows clients and lines, not commands. It never waits for a client: one that is slow, gone, or sends rubbish costs
nothing but its own connection.
"""

import json
import os
import select
import selectors
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from msgspec import Struct

from preforkd import log
from preforkd.addresses import Address
from preforkd.listeners import Bound, ListenError, Rules, bind
from preforkd.runtime import address_of

VERSION = 1
MOST_CLIENTS = 64
LONGEST_LINE = 1 << 16  # bytes, without its newline
LONGEST_OUTPUT = 1 << 22  # bytes that wait for a client to read them

# For a client to send a request, from its connection or the answer before, and to read of what is written; seconds.
PATIENCE = 10.0

# Until we try again to accept a client, after the system refused; seconds.
ACCEPT_AGAIN = 1.0


def listen(path: str) -> Bound:
    """Open the control socket, for our user alone. A stale one is replaced.

    Raises ListenError.
    """
    try:
        with address_of(path) as address:
            place = Address(f"unix:{path}", "unix", path=address, options={"mode": "0600"})
            made = bind(place, Rules(request_queue_size=MOST_CLIENTS))
    except OSError as error:
        raise ListenError(f"unix:{path}: {error.strerror}") from error
    return Bound(made.listener, path, made.inode)


class Peer(Struct, frozen=True):
    """The process at the other end, as it was when it connected (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class Request:
    """What a client asks for. It is answered once, at once or later, by ``reply`` or ``fail``."""

    def __init__(self, client: "_Client", do: str, arguments: dict[str, Any]) -> None:
        self.do = do
        self.arguments = arguments
        self.peer = client.peer
        self.is_over = False  # it has been answered, or its client is gone
        self.until = float("inf")
        self._client = client
        self._look: Callable[[], object] = _nothing
        self._give_up: Callable[[], object] = _nothing
        self._at_end: list[Callable[[], object]] = []

    @property
    def is_gone(self) -> bool:
        """Whether there is nobody any more who would read the answer."""
        return self._client.is_closed

    def tell(self, event: str, **fields: object) -> None:
        """Say something before the answer."""
        if not self.is_over:
            self._client.say({"event": event, **fields})

    def reply(self, **fields: object) -> None:
        """Answer that it is done."""
        self._answer({"ok": True, **fields})

    def fail(self, reason: str) -> None:
        """Answer that it is not done, and why."""
        self._answer({"ok": False, "error": reason})

    def wait(self, look: Callable[[], object], until: float, give_up: Callable[[], object]) -> None:
        """Have ``look`` called on every turn of the loop, to answer when it can, and ``give_up`` at this time.

        Whoever waits may set ``until`` anew.
        """
        self._look, self.until, self._give_up = look, until, give_up

    def at_end(self, tidy: Callable[[], object]) -> None:
        """Call this when the request is over, however it ends."""
        self._at_end.append(tidy)

    def settle(self) -> None:
        """Answer if it is time."""
        with self._excused():
            self._look()
            if not self.is_over and monotonic() >= self.until:
                self.until = float("inf")
                self._give_up()

    def begin(self, answer: Callable[["Request"], object]) -> None:
        with self._excused():
            answer(self)

    def end(self) -> None:
        """There is nothing to be said any more."""
        self.is_over = True
        for tidy in self._at_end:
            tidy()
        self._at_end.clear()

    def _answer(self, fields: dict[str, object]) -> None:
        if not self.is_over:
            self.end()
            self._client.answered(fields)

    @contextmanager
    def _excused(self) -> Iterator[None]:
        """A fault of ours is the answer to the request, and no trouble for anybody else."""
        try:
            yield
        except Exception as fault:
            log.text("control", traceback.format_exc())
            self.fail(f"a fault of ours: {fault!r}; its traceback is in the log")


def _nothing() -> None:
    pass


class _Client:
    """One connection: a line in, an answer out, then the next line."""

    def __init__(self, connection: socket.socket, peer: Peer, control: "Control") -> None:
        self.connection = connection
        self.peer = peer
        self.control = control
        self.request: Request | None = None  # the one that is being worked for
        self.received = bytearray()
        self.unsent = bytearray()
        self.since = monotonic()  # it has had something to do: to send a request, or to read
        self.has_ended = False  # it will send nothing more
        self.is_closed = False
        self.events = 0  # what the selector waits for

    # What comes and goes.

    def act(self) -> None:
        """Something has come, or can go."""
        if not self.is_closed and self.unsent:
            self._flush()
        if not self.is_closed and self._wants_more:
            self._receive()

    def _receive(self) -> None:
        try:
            received = self.connection.recv(LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self.received += received
        self.has_ended = not received
        if self.has_ended and _is_gone(self.connection):
            self.close()

    def say(self, fields: dict[str, object]) -> None:
        if self.is_closed:
            return
        if not self.unsent:
            self.since = monotonic()
        self.unsent += _line(fields)
        self._flush()
        if len(self.unsent) > LONGEST_OUTPUT:
            self.close()

    def _flush(self) -> None:
        try:
            sent = self.connection.send(self.unsent)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self.since = monotonic()
        del self.unsent[:sent]

    # What is to be done.

    @property
    def _has_line(self) -> bool:
        return b"\n" in self.received or len(self.received) > LONGEST_LINE

    @property
    def _wants_more(self) -> bool:
        return not self.has_ended and not self._has_line

    @property
    def _is_idle(self) -> bool:
        return self.request is None and not self.unsent

    @property
    def deadline(self) -> float:
        """When our patience ends. While we work for the client there is nothing that it must do."""
        return float("inf") if self.request is not None and not self.unsent else self.since + PATIENCE

    def wake_at(self) -> float:
        if self._is_idle and self._has_line:
            return 0.0
        return min(self.deadline, self.request.until if self.request is not None else float("inf"))

    def settle(self) -> None:
        """Answer what can be answered, one line at most; close what is over; wait for the rest."""
        if self.request is not None:
            self.request.settle()
        if self._is_idle and self._has_line:
            self._take_line()
        if monotonic() >= self.deadline or (self.has_ended and self._is_idle and not self._has_line):
            self.close()
        if not self.is_closed:
            self._watch()

    def _take_line(self) -> None:
        line, _, rest = self.received.partition(b"\n")
        if len(line) > LONGEST_LINE:
            self.received.clear()
            self.has_ended = True
            return self.say({"ok": False, "error": f"a line is at most {LONGEST_LINE} bytes long"})
        self.received = rest
        try:
            do, arguments = _understood(bytes(line))
        except ValueError as error:
            return self.answered({"ok": False, "error": str(error)})
        self.request = Request(self, do, arguments)
        return self.control.ask(self.request)

    def answered(self, fields: dict[str, object]) -> None:
        """The last line that a request is answered with."""
        self.request = None
        self.since = monotonic()
        self.say(fields)

    def _watch(self) -> None:
        """Have the selector wait for what we can use."""
        events = (selectors.EVENT_READ if self._wants_more else 0) | (selectors.EVENT_WRITE if self.unsent else 0)
        if events == self.events:
            return
        if not events:
            self.control.selector.unregister(self.connection)
        elif not self.events:
            self.control.selector.register(self.connection, events, self.act)
        else:
            self.control.selector.modify(self.connection, events, self.act)
        self.events = events

    def close(self) -> None:
        """Hang up. Whatever the client has asked for goes on without it."""
        if self.is_closed:
            return
        self.is_closed = True
        self.control.clients.discard(self)
        if self.events:
            self.control.selector.unregister(self.connection)
        self.connection.close()
        if self.request is not None:
            self.request.end()


class Control:
    """The clients of the control socket. ``answer`` is called with each request, in the order of the lines.

    ``listener`` is bound, listens and does not block; it is not closed here. None: there is no control socket.
    """

    def __init__(
        self,
        listener: socket.socket | None,
        selector: selectors.BaseSelector,
        answer: Callable[[Request], object],
    ) -> None:
        self.listener = listener
        self.selector = selector
        self._answer = answer
        self.clients: set[_Client] = set()
        self._has_asked = False  # somebody, and what was asked for is not settled yet
        self.accept_at = 0.0 if listener is not None else float("inf")
        self._accepts = False

    def settle(self) -> None:
        """Answer whom it is time to answer. To be called on every turn of the loop."""
        self._has_asked = False
        if not self._accepts and self.listener is not None and monotonic() >= self.accept_at:
            self._accepts = True
            self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        for client in [*self.clients]:
            client.settle()

    def wake_at(self) -> float:
        """When ``settle`` will have something to do although nothing comes."""
        if self._has_asked:
            return 0.0
        accept_at = float("inf") if self._accepts else self.accept_at
        return min([accept_at, *(client.wake_at() for client in self.clients)])

    def ask(self, request: Request) -> None:
        """Have the request answered, and the loop turn once more for what that has changed."""
        self._has_asked = True
        request.begin(self._answer)

    def close(self) -> None:
        """Hang up on everybody."""
        if self._accepts and self.listener is not None:
            self.selector.unregister(self.listener)
        self._accepts, self.accept_at = False, float("inf")
        for client in [*self.clients]:
            client.close()

    def _accept(self) -> None:
        assert self.listener is not None
        try:
            connection, _ = self.listener.accept()
        except BlockingIOError:  # it has left already
            return
        except OSError as error:  # out of descriptors or memory: those who wait would wake us for ever
            self.selector.unregister(self.listener)
            self._accepts, self.accept_at = False, monotonic() + ACCEPT_AGAIN
            log.event("control_refused", reason=error.strerror, retry_in=f"{ACCEPT_AGAIN:.1f}s")
            return
        connection.setblocking(False)
        peer = _peer_of(connection)
        reason = self._refusal(peer)
        if reason is None:
            self.clients.add(_Client(connection, peer, self))
            return
        log.event("control_refused", reason=reason, pid=peer.pid, uid=peer.uid)
        with connection, suppress(OSError):
            connection.send(_line({"ok": False, "error": reason}))

    def _refusal(self, peer: Peer) -> str | None:
        if peer.uid not in (0, os.geteuid()):
            return "only root and the user of the daemon may ask"
        return f"there are {MOST_CLIENTS} clients already" if len(self.clients) >= MOST_CLIENTS else None


def _understood(line: bytes) -> tuple[str, dict[str, Any]]:
    """The command and its arguments. Raises ValueError with what is wrong with the line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'want a JSON object a line, such as {{"v": {VERSION}, "do": "ping"}}')
    version, do = found.pop("v", None), found.pop("do", None)
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f'want "v": {VERSION}, the version of this protocol that the daemon speaks')
    if not isinstance(do, str):
        raise ValueError('want "do": a command')
    return do, found


def _line(fields: dict[str, object]) -> bytes:
    return json.dumps({"v": VERSION, **fields}, default=str).encode() + b"\n"


def _peer_of(connection: socket.socket) -> Peer:
    return Peer(*struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other side does not read any more either, and not only sends nothing more (poll(2), POLLHUP)."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
