"""Programs on the library classes, each a function, run in a process of its own: ``python tests/library.py NAME``.

They fork, install signal handlers and use threads as real programs do, and print what the tests look at.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from socketserver import BaseRequestHandler, StreamRequestHandler, TCPServer
from typing import Any

from preforkd import PreForkingMixIn, PreForkingTCPServer, PreForkingUDPServer
from tests.daemon import eventually, kill

# A program that serves from a thread forks with threads; the docstring of the mixin says what of that.
warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)

LOOPBACK = ("127.0.0.1", 0)


class Pid(BaseRequestHandler):
    """Tells which process serves."""

    def handle(self) -> None:
        self.request.sendall(b"%d" % os.getpid())


class Hold(StreamRequestHandler):
    """Says its pid, then serves until the client leaves."""

    def handle(self) -> None:
        self.wfile.write(b"%d\n" % os.getpid())
        self.rfile.read()
        self.wfile.write(b"left\n")


def connect(server: Any) -> socket.socket:
    return socket.create_connection(server.server_address, 20)


def ask(address: Any) -> int:
    with socket.create_connection(address, 20) as client:
        return int(client.makefile().read())


def hold(address: Any) -> tuple[socket.socket, int]:
    """A connection that keeps a worker busy, and the worker's pid."""
    client = socket.create_connection(address, 20)
    return client, int(client.recv(100))


def serve_in_thread(server: Any) -> threading.Thread:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    return thread


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def start_and_stop_many_times() -> None:
    """Leaves no descriptor and no child."""
    before = descriptors()
    for _ in range(20):
        with PreForkingTCPServer(LOOPBACK, Pid) as server:
            server.max_children = 2
            thread = serve_in_thread(server)
            assert ask(server.server_address) != os.getpid()
            # The worker may answer before our side of the fork has returned.
            eventually(lambda server=server: len(server.active_children or ()) == 2)  # type: ignore[misc]
            server.shutdown()
            thread.join()
            assert server.active_children == set() or server.active_children is None
    assert descriptors() == before, (before, os.listdir("/proc/self/fd"))


def serve_again() -> None:
    """A server that was shut down serves again."""
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 2
        pids = set()
        for _ in range(3):
            thread = serve_in_thread(server)
            pids.add(ask(server.server_address))
            server.shutdown()
            thread.join()
        assert len(pids) == 3


def all_busy() -> None:
    """With every worker busy the loop goes on, and ``shutdown()`` waits for no longer than the clients do."""

    class Server(PreForkingTCPServer):
        max_children = 2
        actions = 0

        def service_actions(self) -> None:
            super().service_actions()
            self.actions += 1

    with Server(LOOPBACK, Hold) as server:
        thread = serve_in_thread(server)
        held = [hold(server.server_address) for _ in range(2)]
        waiting = connect(server)
        seen = server.actions
        eventually(lambda: server.actions > seen + 2, "the loop turns")
        for client, _ in held:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b"left\n"
            client.close()
        assert waiting.recv(100).strip().isdigit()
        waiting.close()
        server.shutdown()
        thread.join()


def silent_client_at_shutdown() -> None:
    """Step two of a stop: a handler that waits for a silent client reads end-of-file."""
    with PreForkingTCPServer(LOOPBACK, Hold) as server:
        server.max_children, server.graceful_timeout = 1, 0.2
        thread = serve_in_thread(server)
        client, _ = hold(server.server_address)
        server.shutdown()
        thread.join()
        assert client.recv(100) == b"left\n"
        client.close()


def stuck_handler_at_shutdown() -> None:
    """Step three: a handler that never ends is killed."""

    class Stuck(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"%d\n" % os.getpid())
            threading.Event().wait()

    with PreForkingTCPServer(LOOPBACK, Stuck) as server:
        server.max_children, server.graceful_timeout, server.eof_timeout = 1, 0.1, 0.1
        thread = serve_in_thread(server)
        client, pid = hold(server.server_address)
        server.shutdown()
        thread.join()
        assert not os.path.exists(f"/proc/{pid}")
        client.close()


def not_waiting() -> None:
    """``block_on_close = False``: nobody waits for a client, who is served to the end all the same."""
    with PreForkingTCPServer(LOOPBACK, Hold) as server:
        server.max_children, server.block_on_close = 1, False
        thread = serve_in_thread(server)
        client, pid = hold(server.server_address)
        server.shutdown()
        thread.join()
    client.shutdown(socket.SHUT_WR)
    assert client.recv(100) == b"left\n"
    client.close()
    eventually(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, "the worker has left")


def children_of_others() -> None:
    """A child that is not the server's is nobody else's to reap."""
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(72)"])
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 2
        thread = serve_in_thread(server)
        kill(ask(server.server_address))
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert ask(server.server_address)
        server.shutdown()
        thread.join()
    assert other.wait() == 72


def killed_worker() -> None:
    """A worker that is killed is replaced."""
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 1
        thread = serve_in_thread(server)
        first = ask(server.server_address)
        kill(first)
        assert ask(server.server_address) != first
        server.shutdown()
        thread.join()


def resized() -> None:
    """``max_children`` is read again while serving."""
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 1
        thread = serve_in_thread(server)
        for size in (3, 1):
            server.max_children = size
            eventually(lambda size=size: len(server.active_children or ()) == size, f"{size} workers")  # type: ignore[misc]
        server.shutdown()
        thread.join()


def shutdown_from_a_handler() -> None:
    """As under ThreadingMixIn, a handler can stop the server."""

    class Stop(StreamRequestHandler):
        def handle(self) -> None:
            threading.Thread(target=self.server.shutdown).start()
            self.wfile.write(b"stopping\n")

    with PreForkingTCPServer(LOOPBACK, Stop) as server:
        thread = serve_in_thread(server)
        with connect(server) as client:
            assert client.recv(100) == b"stopping\n"
        thread.join(20)
        assert not thread.is_alive()


def shutdown_from_a_signal() -> None:
    """A SIGTERM handler that calls ``shutdown()`` in a thread, inherited by the children, in the usual way."""
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 3
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())

        def whole_group() -> None:
            assert ask(server.server_address)
            os.kill(0, signal.SIGTERM)

        threading.Thread(target=whole_group).start()
        server.serve_forever(poll_interval=0.05)


def interrupted() -> None:
    """Ctrl-C reaches the whole group; only the master answers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 3

        def whole_group() -> None:
            # Not while it forks: CPython drops what a signal handler raises in the hooks of os.register_at_fork.
            eventually(lambda: len(server.active_children or ()) == 3)
            assert ask(server.server_address)
            os.kill(0, signal.SIGINT)

        threading.Thread(target=whole_group).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("interrupted once")  # noqa: T201


def two_servers() -> None:
    """Closing one frees its port, although the children of the other were forked while it was open."""

    class Server(PreForkingTCPServer):
        max_children = 2
        allow_reuse_address = True  # although old connections linger there

    first, second = Server(LOOPBACK, Pid), Server(LOOPBACK, Pid)
    threads = serve_in_thread(first), serve_in_thread(second)
    assert ask(first.server_address) != ask(second.server_address)
    first.shutdown()
    first.server_close()
    Server(first.server_address, Pid).server_close()
    assert ask(second.server_address)
    second.shutdown()
    second.server_close()
    for thread in threads:
        thread.join()


def closed_beside_newborns() -> None:
    """Closing a server frees its port, although a worker of another has just been forked and got no further yet."""

    class Server(PreForkingTCPServer):
        max_children = 1
        allow_reuse_address = True

    first, second = Server(LOOPBACK, Pid), Server(LOOPBACK, Pid)
    threads = [serve_in_thread(first)]
    assert ask(first.server_address)
    os.register_at_fork(after_in_child=lambda: time.sleep(0.3))
    threads.append(serve_in_thread(second))
    eventually(lambda: second.active_children)
    first.shutdown()
    first.server_close()
    Server(first.server_address, Pid).server_close()
    second.shutdown()
    second.server_close()
    for thread in threads:
        thread.join()


def forgotten() -> None:
    """A server that has served and is forgotten is collected, also one that nobody has closed."""
    server = PreForkingTCPServer(LOOPBACK, Pid)
    server.max_children, server.block_on_close = 1, False
    thread = serve_in_thread(server)
    assert ask(server.server_address)
    server.shutdown()
    thread.join()
    trace = weakref.ref(server)
    warnings.simplefilter("ignore", ResourceWarning)
    del server, thread
    gc.collect()
    assert trace() is None


def init_passed_over() -> None:
    """A class that calls ``TCPServer.__init__`` itself, and sets what it likes afterwards."""

    class Server(PreForkingMixIn, TCPServer):
        def __init__(self) -> None:
            TCPServer.__init__(self, LOOPBACK, Pid, bind_and_activate=False)
            self.max_children = 1
            own = socket.socket()
            own.bind(LOOPBACK)
            own.listen()
            self.socket.close()
            self.socket = own
            self.server_address = own.getsockname()

    with Server() as server:
        thread = serve_in_thread(server)
        assert ask(server.server_address) != os.getpid()
        server.shutdown()
        thread.join()


def overridden_below() -> None:
    """Hooks overridden below the mixin are called, ``server_close()`` inside ``serve_forever()`` too."""

    class Server(PreForkingTCPServer):
        max_children = 1

        def process_request(self, request: Any, client_address: Any) -> None:
            request.sendall(b"1")
            super().process_request(request, client_address)

        def service_actions(self) -> None:
            """Nothing, not even what the mixin does."""

        def serve_forever(self, poll_interval: float | None = 0.5) -> None:
            try:
                super().serve_forever(poll_interval)
            finally:
                self.server_close()

    server = Server(LOOPBACK, Pid)
    thread = serve_in_thread(server)
    answer = ask(server.server_address)
    assert str(answer).startswith("1")
    kill(int(str(answer)[1:]))
    assert ask(server.server_address) != answer
    server.shutdown()
    thread.join()
    assert server.fileno() == -1


def one_request() -> None:
    """``handle_request()`` serves exactly one, in a child."""
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        clients = [connect(server) for _ in range(2)]
        server.handle_request()
        assert int(clients[0].recv(100)) != os.getpid()
        clients[1].setblocking(False)
        try:
            raise AssertionError(clients[1].recv(100))
        except BlockingIOError:
            pass
        server.handle_request()
        clients[1].setblocking(True)
        assert int(clients[1].recv(100)) != os.getpid()
        for client in clients:
            client.close()
    assert not server.active_children


def no_request() -> None:
    """``handle_request()`` calls ``handle_timeout()`` once when there is none."""

    class Server(PreForkingTCPServer):
        timeout = 0.05
        timeouts = 0

        def handle_timeout(self) -> None:
            super().handle_timeout()
            self.timeouts += 1

    with Server(LOOPBACK, Pid) as server:
        server.handle_request()
        assert server.timeouts == 1


def one_request_too_many() -> None:
    """With ``max_children`` busy, ``handle_request()`` leaves the next in the backlog until its time-out is over."""
    with PreForkingTCPServer(LOOPBACK, Hold) as server:
        server.max_children, server.timeout = 1, 0.05
        first = connect(server)
        server.handle_request()
        assert int(first.recv(100))
        second = connect(server)
        server.handle_request()
        assert len(server.active_children or ()) == 1
        first.shutdown(socket.SHUT_WR)  # the child has a copy of our end, too
        assert first.recv(100) == b"left\n"
        first.close()
        server.timeout = 20
        server.handle_request()
        assert int(second.recv(100))
        second.shutdown(socket.SHUT_WR)
        assert second.recv(100) == b"left\n"
        second.close()


def datagrams() -> None:
    """UDP, with a get_request of its own, so that nothing is specialised."""

    class Server(PreForkingUDPServer):
        max_children = 3

        def get_request(self) -> Any:
            return super().get_request()

    class Echo(BaseRequestHandler):
        def handle(self) -> None:
            data, own = self.request
            own.sendto(data.upper(), self.client_address)

    with Server(LOOPBACK, Echo) as server:
        thread = serve_in_thread(server)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(20)
            for number in range(100):
                client.sendto(b"datagram %d" % number, server.server_address)
                assert client.recv(100) == b"DATAGRAM %d" % number
        server.shutdown()
        thread.join()


def orphaned() -> None:
    """The master is killed: nobody stays."""
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 3

        def kill() -> None:
            eventually(lambda: len(server.active_children or ()) == 3)
            assert ask(server.server_address)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill).start()
        server.serve_forever()


def orphaned_with_a_client() -> None:
    """The master is killed while a silent client holds a worker: it reads end-of-file, for there is a deadline."""
    with PreForkingTCPServer(LOOPBACK, Hold) as server:
        server.max_children, server.graceful_timeout, server.eof_timeout = 1, 2.0, 1.9
        if os.fork() == 0:
            client, _ = hold(server.server_address)
            os.kill(os.getppid(), signal.SIGKILL)
            client.recv(100)
            os._exit(0)
        server.serve_forever()


def buffered_output() -> None:
    """What is in the buffer of standard output at a fork is written once."""
    sys.stdout.write("once\n")
    with PreForkingTCPServer(LOOPBACK, Pid) as server:
        server.max_children = 3
        thread = serve_in_thread(server)
        assert ask(server.server_address)
        server.shutdown()
        thread.join()


def extras() -> None:
    """What a handler may ask the daemon for does no harm here, in a worker and in the process that forks them."""

    class Ask(BaseRequestHandler):
        def handle(self) -> None:
            server: Any = self.server
            server.extend_deadline(5)
            server.mark("asking")
            self.request.sendall(b"%d" % os.getpid())

    with PreForkingTCPServer(LOOPBACK, Ask) as server:
        server.extend_deadline(5)
        server.mark("nobody hears")
        thread = serve_in_thread(server)
        assert ask(server.server_address) != os.getpid()
        server.shutdown()
        thread.join()


PROGRAMS = {
    name: program
    for name, program in list(globals().items())
    if callable(program) and getattr(program, "__module__", None) == __name__ and not isinstance(program, type)
}
for helper in ("connect", "ask", "hold", "serve_in_thread", "descriptors"):
    del PROGRAMS[helper]

if __name__ == "__main__":
    try:
        PROGRAMS[sys.argv[1]]()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without waiting for threads that serve
