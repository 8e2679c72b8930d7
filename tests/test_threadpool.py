"""The library's pool of threads, in this process, with real sockets. Programs that fork or exit: threads_library.py."""

import contextvars
import gc
import os
import select
import socket
import threading
import urllib.request
import weakref
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, BaseServer, StreamRequestHandler, TCPServer, ThreadingMixIn
from time import monotonic
from typing import Any
from xmlrpc.server import SimpleXMLRPCServer

import pytest

from preforkd import (
    ThreadPoolMixIn,
    ThreadPoolTCPServer,
    ThreadPoolUDPServer,
    ThreadPoolUnixDatagramServer,
    ThreadPoolUnixStreamServer,
)
from tests.daemon import DEADLINE, eventually
from tests.test_library import run
from tests.threads_library import PROGRAMS

LOOPBACK = ("127.0.0.1", 0)
POLL = 0.05
FOR_EVER = 3600.0


class Name(BaseRequestHandler):
    """Tells which thread serves."""

    def handle(self) -> None:
        self.request.sendall(threading.current_thread().name.encode())


class Hold(StreamRequestHandler):
    """Says in which thread it serves, then reads until the client leaves."""

    def handle(self) -> None:
        self.wfile.write(threading.current_thread().name.encode() + b"\n")
        self.rfile.read()
        self.wfile.write(b"left\n")


class Upper(StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


class Server(ThreadPoolTCPServer):
    """Counts, in the thread of its loop."""

    taken = 0
    turns = 0

    def get_request(self) -> Any:
        taken = super().get_request()
        self.taken += 1
        return taken

    def service_actions(self) -> None:
        super().service_actions()
        self.turns += 1


class Client:
    """Connected to a server; says what it reads, and leaves."""

    def __init__(self, server: Any) -> None:
        self.socket = socket.create_connection(server.server_address, DEADLINE)
        self.file = self.socket.makefile("rb")

    def line(self) -> bytes:
        return self.file.readline().strip()

    def leave(self) -> bytes:
        """What is said after us, up to its end."""
        self.socket.shutdown(socket.SHUT_WR)
        return self.rest()

    def rest(self) -> bytes:
        with self.socket, self.file:
            return self.file.read()

    def gone(self) -> None:
        self.file.close()
        self.socket.close()


Connect = Callable[[Any], Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as stack:

        def make(server: Any) -> Client:
            client = Client(server)
            stack.callback(client.gone)
            return client

        yield make


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= before, "no thread is left")


@contextmanager
def serving(server: Any, poll_interval: float | None = POLL) -> Iterator[Any]:
    """Serve in a thread, and shut down; closing is another matter."""
    thread = threading.Thread(target=server.serve_forever, args=(poll_interval,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def served(kind: Any, handler: Any, poll_interval: float | None = POLL, address: Any = LOOPBACK) -> Iterator[Any]:
    with kind(address, handler) as server, serving(server, poll_interval):
        yield server


def threads_of(server: BaseServer) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{type(server).__name__}-")]


def idle(server: Any) -> bool:
    return bool(server._pool.busy() == 0)


def ask(server: Any) -> bytes:
    return Client(server).rest()


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def two_turns(server: Server) -> None:
    """The loop goes on, and has had the occasion to do something else than that."""
    seen = server.turns
    eventually(lambda: server.turns >= seen + 2, "the loop turns")


# The bound.


def test_a_thread_is_used_again() -> None:
    threads = []

    class Note(BaseRequestHandler):
        def handle(self) -> None:
            threads.append(threading.current_thread())

    with served(ThreadPoolTCPServer, Note) as server:
        for _ in range(20):
            assert ask(server) == b""
            eventually(lambda: idle(server), "idle")
    assert len(threads) == 20
    assert len(set(threads)) == 1


def test_the_thread_that_idles_shortest_is_used_so_that_the_others_may_end(connect: Connect) -> None:
    with served(ThreadPoolTCPServer, Hold) as server:
        clients = [connect(server) for _ in range(3)]
        names = [client.line() for client in clients]
        assert len(set(names)) == 3
        for position in (1, 0, 2):
            clients[position].leave()
            eventually(lambda left=position: server._pool.busy() == {1: 2, 0: 1, 2: 0}[left], "idle")  # type: ignore[misc]
        for _ in range(5):
            client = connect(server)
            assert client.line() == names[2]
            client.leave()
            eventually(lambda: idle(server), "idle")


def test_with_all_threads_busy_a_connection_waits_in_the_backlog_and_the_loop_goes_on(connect: Connect) -> None:
    with served(Server, Hold) as server:
        server.max_threads = 2
        held = [connect(server) for _ in range(2)]
        assert {client.line() for client in held} == {b"Server-1", b"Server-2"}
        waiting = connect(server)
        two_turns(server)
        assert server.taken == 2
        assert len(threads_of(server)) == 2
        assert held[0].leave() == b"left\n"
        assert waiting.line() in (b"Server-1", b"Server-2")
        assert waiting.leave() == held[1].leave() == b"left\n"


def test_the_loop_does_not_spin_while_a_connection_waits(connect: Connect) -> None:
    with served(Server, Hold) as server:
        server.max_threads = 1
        held = connect(server)
        held.line()
        waiting = connect(server)
        two_turns(server)
        begin, turns = monotonic(), server.turns
        eventually(lambda: server.turns >= turns + 5)
        assert monotonic() - begin >= 4 * POLL
        assert held.leave() == b"left\n"
        assert waiting.leave().endswith(b"left\n")


def test_a_free_thread_ends_the_wait_at_once(connect: Connect) -> None:
    with Server(LOOPBACK, Hold) as server:
        server.max_threads, server.idle_thread_timeout = 1, FOR_EVER
        loop = in_thread(lambda: server.serve_forever(None))  # the slowest rhythm there is
        held = connect(server)
        held.line()
        waiting = connect(server)
        assert held.leave() == b"left\n"
        assert waiting.line() == b"Server-1"
        waiting.leave()
        stopping = in_thread(server.shutdown)
        eventually(lambda: vars(server)["_BaseServer__shutdown_request"])
        connect(server)  # as under socketserver, nobody else wakes a select without a time-out
        stopping.join()
        loop.join()


def test_shutdown_does_not_wait_for_busy_threads(connect: Connect) -> None:
    with Server(LOOPBACK, Hold) as server:
        server.max_threads = 1
        with serving(server):
            held = connect(server)
            held.line()
            waiting = connect(server)
            two_turns(server)
        assert server.taken == 1
        with serving(server):  # and again
            assert held.leave() == b"left\n"
            assert waiting.leave().endswith(b"left\n")


def test_the_bound_is_read_again_while_serving(connect: Connect) -> None:
    with served(Server, Hold) as server:
        server.max_threads = 1
        clients = [connect(server) for _ in range(3)]
        assert clients[0].line()
        two_turns(server)
        assert server.taken == 1
        server.max_threads = 3
        assert all(client.line() for client in clients[1:])
        server.max_threads = 1
        for client in clients:
            client.leave()
        eventually(lambda: idle(server), "idle")
        held, waiting = connect(server), connect(server)
        assert held.line()
        two_turns(server)
        assert server.taken == 4
        assert held.leave() == b"left\n"
        assert waiting.leave().endswith(b"left\n")


def test_many_clients_are_served_by_few_threads() -> None:
    names = set()
    most = 0

    class Count(StreamRequestHandler):
        def handle(self) -> None:
            nonlocal most
            names.add(threading.current_thread())
            most = max(most, len(threads_of(self.server)))
            self.wfile.write(self.rfile.readline().upper())

    def talk() -> None:
        for number in range(100):
            with socket.create_connection(server.server_address, DEADLINE) as client:
                client.sendall(b"line %d\n" % number)
                answers.append(client.makefile().read() == f"LINE {number}\n")

    answers: list[bool] = []
    with served(ThreadPoolTCPServer, Count) as server:
        server.max_threads, server.idle_thread_timeout = 3, 0.001  # they come and go as well
        clients = [in_thread(talk) for _ in range(8)]
        for thread in clients:
            thread.join()
    assert answers == [True] * 800
    assert most <= 3


@pytest.mark.parametrize("order", [b"hand on", b"leave"])
def test_a_handler_may_hand_on_a_request_although_nobody_is_free(
    order: bytes, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HandOn(BaseRequestHandler):
        def handle(self) -> None:
            match self.request.recv(100):
                case b"last":
                    self.request.sendall(threading.current_thread().name.encode())
                    return
                case order:
                    self.server.process_request(handed, self.client_address)
            if order == b"leave":
                raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    handed, other = socket.socketpair()
    with served(ThreadPoolTCPServer, HandOn) as server, other:
        server.max_threads = 1
        other.sendall(b"last")
        other.settimeout(DEADLINE)
        client = connect(server)
        client.socket.sendall(order)
        assert client.rest() == b""
        assert other.recv(100) == b"ThreadPoolTCPServer-1"


# The hooks.


def test_hooks_are_called_where_threading_mixin_calls_them() -> None:
    seen: dict[str, str] = {}

    def note(hook: str) -> None:
        seen[hook] = threading.current_thread().name

    class Noting(ThreadPoolTCPServer):
        def get_request(self) -> Any:
            note("get_request")
            return super().get_request()

        def verify_request(self, request: Any, client_address: Any) -> bool:
            note("verify_request")
            return super().verify_request(request, client_address)

        def process_request(self, request: Any, client_address: Any) -> None:
            note("process_request")
            super().process_request(request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            note("process_request_thread")
            super().process_request_thread(request, client_address)

        def finish_request(self, request: Any, client_address: Any) -> None:
            note("finish_request")
            super().finish_request(request, client_address)

        def handle_error(self, request: Any, client_address: Any) -> None:
            note("handle_error")

        def shutdown_request(self, request: Any) -> None:
            note("shutdown_request")
            super().shutdown_request(request)

    class Fail(BaseRequestHandler):
        def handle(self) -> None:
            raise ValueError

    with served(Noting, Fail) as server:
        assert ask(server) == b""
    loop = {seen.pop(hook) for hook in ("get_request", "verify_request", "process_request")}
    assert len(loop) == 1
    assert not loop & set(seen.values())
    assert set(seen) == {"process_request_thread", "finish_request", "handle_error", "shutdown_request"}
    assert set(seen.values()) == {"Noting-1"}


def test_what_a_thread_is_told_by_a_base_exception_ends_it_and_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leave(BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(1) == b"!":
                raise SystemExit("leave")
            self.request.sendall(threading.current_thread().name.encode())

    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with served(ThreadPoolTCPServer, Leave) as server:
        server.max_threads = 1
        for _ in range(5):
            client = Client(server)
            client.socket.sendall(b"!")
            assert client.rest() == b""
            client = Client(server)
            client.socket.sendall(b"?")
            assert client.rest() == b"ThreadPoolTCPServer-1"
    assert [each.exc_type for each in raised] == [SystemExit] * 5


def test_a_thread_that_cannot_be_started_costs_its_request_only() -> None:
    errors: list[Any] = []

    class Catching(ThreadPoolTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(threading.current_thread().name)

    with served(Catching, Name) as server:
        before = threading.stack_size(1 << 46)
        try:
            assert ask(server) == b""
        finally:
            threading.stack_size(before)
        assert ask(server) == b"Catching-1"
        eventually(lambda: idle(server), "idle")
    assert len(errors) == 1  # and nobody has tried again


def test_each_request_has_a_context_of_its_own() -> None:
    variable = contextvars.ContextVar("variable", default=0)

    class Set(BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"%d" % variable.get())
            variable.set(variable.get() + 1)

    with served(ThreadPoolTCPServer, Set) as server:
        server.max_threads = 1
        assert [ask(server) for _ in range(3)] == [b"0"] * 3


def test_hooks_overridden_below_the_mixin_are_called_and_a_loop_may_close_its_server() -> None:
    class Below(ThreadPoolTCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            request.sendall(b"below ")
            super().process_request(request, client_address)

        def serve_forever(self, poll_interval: float | None = POLL) -> None:
            try:
                super().serve_forever(poll_interval)
            finally:
                self.server_close()

    server = Below(LOOPBACK, Name)
    with serving(server):
        assert ask(server) == b"below Below-1"
    assert server.fileno() == -1


def test_a_class_may_pass_over_init_and_replace_its_socket() -> None:
    class Own(ThreadPoolMixIn, TCPServer):
        def __init__(self) -> None:
            TCPServer.__init__(self, LOOPBACK, Name, bind_and_activate=False)
            self.socket.close()
            self.socket = socket.create_server(LOOPBACK)
            self.server_address = self.socket.getsockname()

    with Own() as server, serving(server):
        assert ask(server) == b"Own-1"


# The end.


def test_idle_threads_end_with_the_loop_and_at_server_close() -> None:
    with ThreadPoolTCPServer(LOOPBACK, Name) as server:
        server.idle_thread_timeout = FOR_EVER
        with serving(server):
            ask(server)
            eventually(lambda: idle(server), "idle")
            assert threads_of(server)
        eventually(lambda: not threads_of(server), "gone after the loop")
        with Client(server).socket as client:
            server.handle_request()
            assert client.recv(100)
        eventually(lambda: idle(server), "idle")
        assert threads_of(server)
    assert not threads_of(server)


def test_an_idle_thread_ends_by_itself() -> None:
    with served(ThreadPoolTCPServer, Name) as server:
        server.idle_thread_timeout = 0.01
        for _ in range(3):
            assert ask(server) == b"ThreadPoolTCPServer-1"
            eventually(lambda: not threads_of(server), "gone")


def test_a_server_that_is_forgotten_is_collected_although_a_thread_idles(connect: Connect) -> None:
    server = ThreadPoolTCPServer(LOOPBACK, Name)
    server.idle_thread_timeout = 0.5
    client = connect(server)
    server.handle_request()
    assert client.rest()
    reference, pool = weakref.ref(server), server._pool
    eventually(lambda: pool.busy() == 0, "idle")
    server.socket.close()
    del server
    gc.collect()
    assert reference() is None


def test_server_close_waits_for_busy_threads(connect: Connect) -> None:
    with ThreadPoolTCPServer(LOOPBACK, Hold) as server:
        with serving(server):
            held = connect(server)
            held.line()
        assert not any(thread.daemon for thread in threads_of(server))
        closing = in_thread(server.server_close)
        eventually(lambda: server.fileno() == -1, "the listening socket is closed")
        assert closing.is_alive()
        assert held.leave() == b"left\n"
        closing.join()
        assert not threads_of(server)


@pytest.mark.parametrize(("attribute", "value"), [("daemon_threads", True), ("block_on_close", False)])
def test_server_close_does_not_wait_for(attribute: str, value: bool, connect: Connect) -> None:
    with ThreadPoolTCPServer(LOOPBACK, Hold) as server:
        setattr(server, attribute, value)
        with serving(server):
            held = connect(server)
            held.line()
            assert [thread.daemon for thread in threads_of(server)] == [attribute == "daemon_threads"]
    assert threads_of(server)
    assert held.leave() == b"left\n"


def test_two_handlers_may_close_their_server_and_are_waited_for_later(connect: Connect) -> None:
    class Close(StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.server.server_close()
            self.wfile.write(b"closed\n")
            self.rfile.read()

    with ThreadPoolTCPServer(LOOPBACK, Close) as server:
        with serving(server):
            clients = [connect(server) for _ in range(2)]
            eventually(lambda: server._pool.busy() == 2, "both are served")
        for client in clients:
            client.socket.sendall(b"close\n")
        # One of them waits for the other, who does not wait for anybody.
        readable = select.select([client.socket for client in clients], [], [], DEADLINE)[0]
        first, second = sorted(clients, key=lambda client: client.socket not in readable)
        assert first.leave() == b"closed\n"
        assert second.line() == b"closed"
        eventually(lambda: list(server._pool.joinable) == threads_of(server), "put back")
        closing = in_thread(server.server_close)
        second.leave()
        closing.join()
        assert not threads_of(server)


def test_starting_and_stopping_many_times_leaves_nothing_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with served(ThreadPoolTCPServer, Name, 0.01) as server:
            assert ask(server)
        assert not threads_of(server)
    assert len(os.listdir("/proc/self/fd")) == before


# One request at a time.


def test_handle_request_hands_over_exactly_one(connect: Connect) -> None:
    with Server(LOOPBACK, Name) as server:
        clients = [connect(server) for _ in range(2)]
        for number, client in enumerate(clients, 1):
            server.handle_request()
            assert server.taken == number
            assert client.rest() == b"Server-1"
            eventually(lambda: idle(server), "idle")


class Impatient(Server):
    timeout = 0.05
    timeouts = 0

    def handle_timeout(self) -> None:
        super().handle_timeout()
        self.timeouts += 1


def test_handle_request_calls_handle_timeout_once_when_there_is_none() -> None:
    with Impatient(LOOPBACK, Name) as server:
        server.handle_request()
        assert server.timeouts == 1


def test_handle_request_leaves_a_request_in_the_backlog_while_nobody_is_free(connect: Connect) -> None:
    with Impatient(LOOPBACK, Hold) as server:
        server.max_threads = 1
        held, waiting = connect(server), connect(server)
        server.handle_request()
        assert held.line() == b"Impatient-1"
        server.handle_request()
        assert (server.taken, server.timeouts) == (1, 1)
        server.timeout = DEADLINE
        turn = in_thread(server.handle_request)
        assert held.leave() == b"left\n"
        turn.join()
        assert (server.taken, server.timeouts) == (2, 1)
        assert waiting.leave().endswith(b"left\n")


# The kinds, and servers that others wrote.


@pytest.mark.parametrize("kind", [ThreadPoolUDPServer, ThreadPoolUnixDatagramServer])
def test_datagrams(kind: Any, tmp_path: Path) -> None:
    class Answer(BaseRequestHandler):
        def handle(self) -> None:
            data, own = self.request
            own.sendto(data.upper(), self.client_address)

    local = kind is ThreadPoolUnixDatagramServer
    with (
        served(kind, Answer, address=str(tmp_path / "server") if local else LOOPBACK) as server,
        socket.socket(server.address_family, socket.SOCK_DGRAM) as client,
    ):
        server.max_threads = 2
        client.bind(str(tmp_path / "client") if local else LOOPBACK)
        client.settimeout(DEADLINE)
        for number in range(100):
            client.sendto(b"datagram %d" % number, server.server_address)
            assert client.recv(100) == b"DATAGRAM %d" % number


def test_unix_streams(tmp_path: Path) -> None:
    with (
        served(ThreadPoolUnixStreamServer, Upper, address=str(tmp_path / "server")) as server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(server.server_address)
        client.sendall(b"line\n")
        assert client.recv(100) == b"LINE\n"


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = threading.current_thread().name.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("base", [HTTPServer, ThreadingHTTPServer])
def test_http(base: Any) -> None:
    kind: Any = type("ThreadPoolHTTPServer", (ThreadPoolMixIn, base), {"max_threads": 2})
    assert ThreadingMixIn in kind.__mro__
    with (
        served(kind, Page) as server,
        urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=DEADLINE) as answer,
    ):
        assert answer.read() == b"ThreadPoolHTTPServer-1"


def test_xmlrpc() -> None:
    class ThreadPoolXMLRPCServer(ThreadPoolMixIn, SimpleXMLRPCServer):
        max_threads = 2

    with ThreadPoolXMLRPCServer(LOOPBACK, logRequests=False) as server:
        server.register_function(lambda text: text.upper(), "upper")
        with serving(server), xmlrpc.client.ServerProxy(f"http://127.0.0.1:{server.server_address[1]}") as proxy:
            assert proxy.upper("text") == "TEXT"


# Programs of their own.


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str) -> None:
    done = run(str(Path(__file__).with_name("threads_library.py")), name)
    assert done.stderr == ""
    assert done.stdout == PROGRAMS[name]
