"""Handlers and servers for the daemon under test. They know nothing of preforkd, but for one that interrupts it."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import (
    BaseRequestHandler,
    DatagramRequestHandler,
    ForkingMixIn,
    StreamRequestHandler,
    TCPServer,
    ThreadingMixIn,
    UDPServer,
    UnixStreamServer,
)
from typing import Any

from preforkd_workers.lifeline import Lifeline


class Upper(StreamRequestHandler):
    """Upper-cases lines."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class UpperDatagram(DatagramRequestHandler):
    """Upper-cases a datagram."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())


class Pid(BaseRequestHandler):
    """Tells which process serves."""

    def handle(self) -> None:
        self.request.sendall(b"%d\n" % os.getpid())


class PidDatagram(DatagramRequestHandler):
    """Tells which process serves."""

    def handle(self) -> None:
        self.wfile.write(b"%d" % os.getpid())


class Orphan(BaseRequestHandler):
    """Leaves a grandchild behind, and tells its pid."""

    def handle(self) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            if os.fork() == 0:
                os.write(writer, b"%d\n" % os.getpid())
                os._exit(7)
            os._exit(0)
        os.waitpid(child, 0)
        self.request.sendall(os.read(reader, 20))
        os.close(reader)
        os.close(writer)


class Obey(StreamRequestHandler):
    """Does what the line says: to test what becomes of those who do it."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(self.obey(*line.decode().split()))

    def obey(self, order: str, *words: str) -> bytes:
        match order:
            case "say":
                return f"{' '.join(words)}\n".encode()
            case "pid":
                return f"{os.getpid()}\n".encode()
            case "draining":
                return f"{self.server.draining}\n".encode()  # type: ignore[attr-defined]
            case "raise":
                raise ValueError("as told")
            case "exit":
                sys.exit(int(words[0]))
            case "interrupt":
                raise KeyboardInterrupt
            case "os_exit":
                os._exit(int(words[0]))
            case "segfault":
                os.kill(os.getpid(), 11)
            case "kill":
                os.kill(os.getpid(), 9)
            case "sleep":
                time.sleep(float(words[0]))
                return b"slept\n"
            case "until_eof":
                self.wfile.write(b"waiting\n")
                rest = self.rfile.read()
                return b"eof after %d\n" % len(rest)
            case "spin":
                self.wfile.write(b"spinning\n")
                while True:
                    pass
            case "shutdown":
                self.server.shutdown()
                return b"shut down\n"
        return b"what?\n"


class Thief(BaseRequestHandler):
    """Leaves a thread behind that takes a SIGTERM to the process, once its main thread sleeps again. Tells the pid."""

    def handle(self) -> None:
        self.request.sendall(b"%d\n" % os.getpid())
        threading.Thread(target=self.take_it, daemon=True).start()

    def take_it(self) -> None:
        state, pause = Path(f"/proc/self/task/{os.getpid()}/stat"), threading.Event()
        while not state.read_text().rpartition(")")[2].startswith(" S ") or self.request.fileno() >= 0:
            pause.wait(0.01)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)


class LateThief(BaseRequestHandler):
    """Reads, or is waited for while it does, and has another thread take the signal to read end-of-file."""

    def handle(self) -> None:
        threading.Thread(target=self.take_it, daemon=True).start()
        self.request.sendall(b"waiting\n")
        self.request.sendall(b"%d bytes\n" % len(self.request.recv(1)))

    def take_it(self) -> None:
        pause = threading.Event()
        while not self.is_time():
            pause.wait(0.01)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)

    def is_time(self) -> bool:
        """Whether the main thread has been told to drain, and now sleeps: for the client, or for a thread."""
        code = sys._current_frames()[threading.main_thread().ident or 0].f_code
        waits = Path(f"/proc/self/task/{os.getpid()}/syscall").read_text() != "running\n"
        draining: bool = self.server.draining  # type: ignore[attr-defined]
        return draining and waits and code.co_filename in (__file__, threading.__file__)


class Besieged(BaseRequestHandler):
    """Is asked for its stack, and again whenever that is about to be told. Says how often."""

    def handle(self) -> None:
        tell, questions = Lifeline.text, 0

        def tell_later(lifeline: Lifeline, lines: str) -> None:
            nonlocal questions
            if questions < sys.getrecursionlimit():
                questions += 1
                signal.raise_signal(signal.SIGUSR1)
            tell(lifeline, lines)

        Lifeline.text = tell_later  # type: ignore[assignment, method-assign]
        signal.raise_signal(signal.SIGUSR1)
        self.request.sendall(b"asked once more\n" if questions == 1 else b"asked %d times more\n" % questions)


class Deaf(BaseRequestHandler):
    """Hangs in C, with the GIL held and whatever signals come: it locks a mutex twice."""

    def handle(self) -> None:
        self.request.sendall(b"stuck\n")
        mutex = ctypes.create_string_buffer(256)  # all zeros: PTHREAD_MUTEX_INITIALIZER
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)


class Environment(BaseRequestHandler):
    """Tells the names of the environment's variables."""

    def handle(self) -> None:
        self.request.sendall("\n".join(os.environ).encode())


class Program(BaseRequestHandler):
    """Runs a program that outlives the worker, and tells its pid."""

    def handle(self) -> None:
        null = subprocess.DEVNULL
        program = subprocess.Popen(
            ["sleep", "600"], stdin=null, stdout=null, stderr=null, close_fds=False, start_new_session=True
        )
        self.request.sendall(b"%d\n" % program.pid)


class RecordingServer(TCPServer):
    """Appends the name of every hook to the file named in HOOKS, in the order of the calls."""

    def note(self, hook: str) -> None:
        with open(os.environ["HOOKS"], "a") as file:
            file.write(f"{hook}\n")

    def get_request(self) -> Any:
        self.note("get_request")
        return super().get_request()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.note("verify_request")
        return bool(request.recv(1, socket.MSG_PEEK) != b"!")

    def process_request(self, request: Any, client_address: Any) -> None:
        self.note("process_request")
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.note("finish_request")
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.note("shutdown_request")
        super().shutdown_request(request)

    def close_request(self, request: Any) -> None:
        self.note("close_request")
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.note("handle_error")

    def server_close(self) -> None:
        self.note("server_close")
        super().server_close()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self.note("serve_forever")
        try:
            super().serve_forever(poll_interval)
        finally:
            self.note("served")


def recording(address: Any) -> TCPServer:
    """A factory."""
    return RecordingServer(address, Obey)


class Page(BaseHTTPRequestHandler):
    """A page that says where it was served."""

    def do_GET(self) -> None:
        body = f"{self.server.server_name} {self.server.server_port}\n".encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class TidyUnixServer(UnixStreamServer):
    """Removes its socket file before it binds and after it closes, as many do."""

    def server_bind(self) -> None:
        assert isinstance(self.server_address, str)
        if os.path.exists(self.server_address):
            os.unlink(self.server_address)
        super().server_bind()

    def server_close(self) -> None:
        super().server_close()
        assert isinstance(self.server_address, str)
        os.remove(self.server_address)


class ThreadingObeyServer(ThreadingMixIn, TCPServer):
    """Threads of its own, inside the worker."""


class ForkingObeyServer(ForkingMixIn, TCPServer):
    """Children of its own, inside the worker."""


class ForkAndReturn(BaseRequestHandler):
    """Forks, and lets parent and child return alike."""

    def handle(self) -> None:
        if os.fork():
            os.wait()
        else:
            self.request.sendall(b"%d\n" % os.getpid())


class SecondServer(BaseRequestHandler):
    """Asks a server that it runs in a thread of its own."""

    def handle(self) -> None:
        with TCPServer(("127.0.0.1", 0), Pid) as second:
            thread = threading.Thread(target=second.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            with socket.create_connection(second.server_address[:2]) as client:  # type: ignore[arg-type]
                self.request.sendall(client.makefile("rb").read())
            second.shutdown()
            thread.join()


class BlockingServer(TCPServer):
    """Wants its listening socket to block."""

    def server_activate(self) -> None:
        super().server_activate()
        self.socket.setblocking(True)


class UpperUDPServer(UDPServer):
    """Overrides get_request, so that it takes the general turn."""

    def get_request(self) -> Any:
        return super().get_request()


instance = HTTPServer(("127.0.0.1", 0), Page) if os.environ.get("INSTANCE") else None
