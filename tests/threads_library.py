"""Programs on the pool of threads that exit, fork or get signals: ``python tests/threads_library.py NAME``."""

import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from socketserver import BaseRequestHandler, StreamRequestHandler
from typing import Any

from preforkd import PreForkingTCPServer, ThreadPoolMixIn, ThreadPoolTCPServer
from tests.daemon import eventually

warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)

LOOPBACK = ("127.0.0.1", 0)
FOR_EVER = 3600.0

Program = Callable[[], None]
PROGRAMS: dict[str, str] = {}  # and what each prints


def prints(*lines: str) -> Callable[[Program], Program]:
    def register(program: Program) -> Program:
        PROGRAMS[program.__name__] = "".join(f"{line}\n" for line in lines)
        return program

    return register


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Who(BaseRequestHandler):
    """Tells which process serves, and in which thread of it."""

    def handle(self) -> None:
        self.request.sendall(f"{os.getpid()} {threading.current_thread().name} {threading.get_native_id()}".encode())


class Hold(StreamRequestHandler):
    """Serves until the client leaves."""

    def handle(self) -> None:
        self.wfile.write(b"held\n")
        self.rfile.read()
        say("finished")


class Server(ThreadPoolTCPServer):
    idle_thread_timeout = FOR_EVER
    turns = 0

    def service_actions(self) -> None:
        self.turns += 1


def connect(server: Any) -> socket.socket:
    return socket.create_connection(server.server_address, 20)


def ask(server: Any) -> list[str]:
    with connect(server) as client:
        return client.makefile().read().split()


def hold(server: Any) -> socket.socket:
    client = connect(server)
    assert client.recv(100) == b"held\n"
    return client


def idle(server: Any) -> None:
    eventually(lambda: server._pool._members and server._pool.busy() == 0, "idle")


@prints("served")
def exit_with_an_idle_thread() -> None:
    server = Server(LOOPBACK, Who)
    with connect(server) as client:
        server.handle_request()
        assert client.recv(100)
    idle(server)
    server.socket.close()
    say("served")


@prints("served")
def exit_with_an_idle_thread_while_a_daemon_thread_serves() -> None:
    server = Server(LOOPBACK, Who)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert ask(server)
    idle(server)
    say("served")


@prints("main ends", "finished")
def exit_waits_for_a_request() -> None:
    server = Server(LOOPBACK, Hold)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = hold(server)

    def leave() -> None:
        threading.main_thread().join()
        client.close()

    threading.Thread(target=leave, daemon=True).start()
    say("main ends")


@prints("main ends")
def exit_does_not_wait_for_a_daemon() -> None:
    warnings.simplefilter("ignore", ResourceWarning)  # of what the daemon holds
    server = Server(LOOPBACK, Hold)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = hold(server)
    threading.current_thread().client = client  # type: ignore[attr-defined] # lest it is closed
    say("main ends")


@prints("main ends", "served by one thread")
def a_loop_outlives_the_main_thread() -> None:
    """And its pool is a pool all the same."""
    server = Server(LOOPBACK, Who)
    threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    first = ask(server)[2]  # before: 3.12.1 starts no thread any more when the main thread has ended
    idle(server)

    def use() -> None:
        threading.main_thread().join()
        seen = {first}
        for _ in range(5):
            seen.add(ask(server)[2])
            idle(server)
        server.shutdown()
        server.server_close()
        say(f"served by {'one thread' if len(seen) == 1 else seen}")

    threading.Thread(target=use).start()
    say("main ends")


@prints("finished", "child", "finished", "parent")
def a_forked_child_serves() -> None:
    """None of the parent's threads is counted there, the busy one no more than the idle one."""
    with Server(LOOPBACK, Hold) as server:
        server.max_threads = 2
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        clients = [hold(server) for _ in range(2)]
        clients[0].close()
        eventually(lambda: server._pool.busy() == 1)
        pid = os.fork()
        if pid == 0:
            server.RequestHandlerClass = Who
            assert server._pool._members == {}
            server.server_close()
            server.socket = socket.create_server(LOOPBACK)
            server.server_address = server.socket.getsockname()
            own = threading.Thread(target=server.serve_forever, args=(0.05,))
            own.start()
            assert ask(server)[:2] == [str(os.getpid()), "Server-1"]
            server.shutdown()
            server.server_close()
            say("child")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert server._pool.busy() == 1
        clients[1].close()
        server.shutdown()
        thread.join()
    say("parent")


@prints("forked", "in the child", "served")
def a_handler_forks() -> None:
    """Its child is no thread of the pool, and ends with the handler as it would in a thread of its own."""

    class Fork(BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"served")
            if pid := os.fork():
                assert os.waitpid(pid, 0)[1] == 0
            else:
                assert self.server._pool._members == {}  # type: ignore[attr-defined]
                say("in the child")

    with Server(LOOPBACK, Fork) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        say("forked")
        say(" ".join(ask(server)))
        server.shutdown()
        thread.join()


@prints("interrupted", "finished")
def interrupted_with_all_threads_busy() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Server(LOOPBACK, Hold) as server:
        server.max_threads = 1

        def interrupt() -> None:
            clients.append(hold(server))
            clients.append(connect(server))
            turns = server.turns
            eventually(lambda: server.turns > turns + 1)
            os.kill(os.getpid(), signal.SIGINT)

        clients: list[socket.socket] = []
        threading.Thread(target=interrupt).start()
        try:
            server.serve_forever(0.05)
        except KeyboardInterrupt:
            say("interrupted")
        for client in clients:
            client.close()


@prints("closed")
def closed_by_a_signal_handler() -> None:
    """Again and again, wherever in the loop the signal comes: no lock is left held, no thread left behind."""
    warnings.simplefilter("ignore", ResourceWarning)  # as under socketserver, of what was just being accepted

    class Quiet(Server):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """As under socketserver, a request that was just being handed over is closed by the loop, too."""

    def close(*_: object) -> None:
        server.server_close()
        raise SystemExit

    def ask_and_kill() -> None:
        with connect(server):
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, close)
    for _ in range(200):
        server = Quiet(LOOPBACK, Who)
        thread = threading.Thread(target=ask_and_kill)
        with suppress(SystemExit):
            thread.start()
            server.serve_forever()
        thread.join()
    eventually(lambda: threading.active_count() == 1)
    say("closed")


@prints("finished")
def stopped_by_a_signal_handler_in_the_usual_way() -> None:
    with Server(LOOPBACK, Hold) as server:
        server.max_threads = 1
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())

        def stop() -> None:
            client = hold(server)
            waiting = connect(server)
            os.kill(os.getpid(), signal.SIGTERM)
            server._BaseServer__is_shut_down.wait()  # type: ignore[attr-defined]
            client.close()
            waiting.close()

        threading.Thread(target=stop).start()
        server.serve_forever(0.05)


@prints("finished", "finished", "served")
def pools_of_threads_in_pre_forked_processes() -> None:
    class Both(ThreadPoolMixIn, PreForkingTCPServer):
        max_children = 2
        max_threads = 1

    with Both(LOOPBACK, Hold) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        clients = [hold(server) for _ in range(2)]
        for client in clients:
            client.shutdown(socket.SHUT_WR)  # a child has a copy of our end, too
            client.recv(100)
            client.close()
        server.shutdown()
        thread.join()
    say("served")


if __name__ == "__main__":
    try:
        globals()[sys.argv[1]]()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without waiting for threads that serve
