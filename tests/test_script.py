"""``python server.py`` becomes ``preforkd serve server.py``: scripts that know nothing of it, run as ever."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon, eventually, kill
from tests.site import free_port, udp

AT_ONCE = ("--set", "probation=0s")
TWO = ("--max-children", "2", *AT_ONCE)

# The examples of the documentation of socketserver; only the port is another one.

BASE = """
import socketserver

class MyTCPHandler(socketserver.BaseRequestHandler):
    def handle(self):
        self.data = self.request.recv(1024).strip()
        print("Received from {}:".format(self.client_address[0]))
        print(self.data)
        self.request.sendall(self.data.upper())

if __name__ == "__main__":
    HOST, PORT = "localhost", 0
    with socketserver.TCPServer((HOST, PORT), MyTCPHandler) as server:
        server.serve_forever()
"""

STREAM = """
import socketserver

class MyTCPHandler(socketserver.StreamRequestHandler):
    def handle(self):
        self.data = self.rfile.readline(10000).rstrip()
        print(f"{self.client_address[0]} wrote:")
        print(self.data.decode("utf-8"))
        self.wfile.write(self.data.upper())

if __name__ == "__main__":
    HOST, PORT = "localhost", 0
    with socketserver.TCPServer((HOST, PORT), MyTCPHandler) as server:
        server.serve_forever()
"""

DATAGRAMS = """
import socketserver

class MyUDPHandler(socketserver.BaseRequestHandler):
    def handle(self):
        data = self.request[0].strip()
        socket = self.request[1]
        print(f"{self.client_address[0]} wrote:")
        print(data)
        socket.sendto(data.upper(), self.client_address)

if __name__ == "__main__":
    HOST, PORT = "localhost", 0
    with socketserver.UDPServer((HOST, PORT), MyUDPHandler) as server:
        server.serve_forever()
"""

THREADED = """
import socket
import threading
import socketserver

class ThreadedTCPRequestHandler(socketserver.BaseRequestHandler):
    def handle(self):
        data = str(self.request.recv(1024), 'ascii')
        cur_thread = threading.current_thread()
        response = bytes("{}: {}".format(cur_thread.name, data), 'ascii')
        self.request.sendall(response)

class ThreadedTCPServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    pass
"""

IN_A_THREAD = f"""{THREADED}
def client(ip, port, message):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.connect((ip, port))
        sock.sendall(bytes(message, 'ascii'))
        response = str(sock.recv(1024), 'ascii')
        print("Received: {{}}".format(response))

if __name__ == "__main__":
    HOST, PORT = "localhost", 0
    server = ThreadedTCPServer((HOST, PORT), ThreadedTCPRequestHandler)
    with server:
        ip, port = server.server_address
        server_thread = threading.Thread(target=server.serve_forever)
        server_thread.daemon = True
        server_thread.start()
        print("Server loop running in thread:", server_thread.name)
        client(ip, port, "Hello World 1")
        server.shutdown()
"""

# And ours.

APP = """
import os, sys
from socketserver import StreamRequestHandler, TCPServer

VERSION = "one"

class Handler(StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(f"{VERSION} {os.getpid()} {line.decode()}".encode())

def note(text):
    with open("notes", "a") as notes:
        notes.write(f"{text} {os.getpid()}\\n")
"""

SERVE = """
note("made by")
try:
    with TCPServer(("127.0.0.1", PORT), Handler) as server:
        server.serve_forever()
        note("served by")
finally:
    note("left by")
"""


def app(serving: str = SERVE, version: str = "one", port: int = 0) -> str:
    """A script of this version, of another size than that of every other version."""
    return f"{APP}{serving}".replace('"one"', repr(version)).replace("PORT", str(port))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "server.py"


def notes(script: Path, text: str) -> list[int]:
    """Who has noted this, by pid."""
    lines = (script.parent / "notes").read_text().splitlines()
    return [int(line.removeprefix(f"{text} ")) for line in lines if line.startswith(f"{text} ")]


def titles(daemon: Daemon) -> list[str]:
    """Of all its processes that live."""
    return [Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0") for pid in daemon.alive()]


class Talk(Conversation):
    """A conversation that stays open."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon.connect())

    def ask(self, line: str) -> str:
        self.socket.sendall(f"{line}\n".encode())
        return self.answers.readline().decode()


def version(daemon: Daemon, service: str | None = None) -> str:
    return daemon.ask(b"x\n", service).decode().split()[0]


def reload(daemon: Daemon, result: str = "done", times: int = 1) -> str:
    """Have it reloaded by a signal, for the so-many-th time; how that has ended."""
    daemon.signal(signal.SIGHUP)
    line = daemon.log.wait_for("^reload_(done|rolled_back|refused|abandoned) ", times).string
    assert line.startswith(f"reload_{result} "), daemon.log.text
    return line


def refusal(daemon: Daemon) -> str:
    """Why it could not be started, without the prefix."""
    assert daemon.wait() == 70, daemon.log.text
    said = [line for line in daemon.log.lines if line.startswith("server| ")]
    return "\n".join(line.removeprefix("server| ") for line in said)


# What people have.


@pytest.mark.parametrize("source", [BASE, STREAM], ids=["BaseRequestHandler", "StreamRequestHandler"])
def test_the_tcp_servers_of_the_documentation_serve_and_are_reloaded(serve: Serve, script: Path, source: str) -> None:
    script.write_text(source)
    daemon = serve(*TWO, "server.py")
    assert daemon.ask(b"hello\n") == b"HELLO"
    script.write_text(source.replace(".upper()", ".title()"))
    reload(daemon)
    assert daemon.ask(b"hello\n") == b"Hello"
    assert len(daemon.log.matches("^listening ")) == 1
    assert daemon.stop() == 0


def test_the_udp_server_of_the_documentation_serves_and_is_reloaded(serve: Serve, script: Path) -> None:
    script.write_text(DATAGRAMS)
    daemon = serve(*TWO, "server.py")
    assert daemon.url().startswith("udp://127.0.0.1:")
    with udp(daemon.address()) as client:
        client.send(b"hello")
        assert client.recv(100) == b"HELLO"
        script.write_text(DATAGRAMS.replace(".upper()", ".title()"))
        reload(daemon)
        client.send(b"hello")
        assert client.recv(100) == b"Hello"


def test_a_script_may_be_in_a_multicast_group_through_every_reload(serve: Serve, script: Path) -> None:
    script.write_text(
        DATAGRAMS.replace('"localhost"', '"224.0.0.251"').replace(
            "server.serve_forever()",
            "import socket\n        group = socket.inet_aton(HOST) + socket.inet_aton('127.0.0.1')\n"
            "        server.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)\n"
            "        server.serve_forever()",
        )
    )
    daemon = serve(*TWO, "server.py")
    reload(daemon)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        client.sendto(b"hello", daemon.address())
        assert client.recv(100) == b"HELLO"


def test_what_a_fork_does_not_copy_is_told_and_the_listeners_are_not_it(serve: Serve, script: Path) -> None:
    script.write_text(app(f"import socket\nshared = socket.create_server(('127.0.0.1', 0))\n{SERVE}"))
    daemon = serve(*TWO, "server.py")
    assert len(daemon.log.matches("^mold_has_sockets .*sockets=")) == 1
    found = daemon.log.wait_for("^mold_has_sockets ").string
    assert str(daemon.address()[1]) not in found
    assert daemon.stop() == 0
    assert "not safe to fork: sockets after the import: tcp listening at 127.0.0.1:" in refusal(
        serve("--set", "fork_safety=refuse", "server.py", ready=False)
    )


def test_a_script_with_threads_of_its_own_has_no_lanes_to_count_at_the_door(serve: Serve) -> None:
    daemon = serve("--set", "when_full=close", "-m", "http.server", "0", ready=False)
    assert daemon.wait() == 70
    daemon.log.wait_for("mixes in ThreadingMixIn: max_per_client and when_full count lanes; use kind = thread")


def test_a_threaded_server_serves_in_the_main_thread(serve: Serve, script: Path) -> None:
    script.write_text(
        f'{THREADED}\nwith ThreadedTCPServer(("localhost", 0), ThreadedTCPRequestHandler) as server:\n'
        "    server.serve_forever()\n"
    )
    daemon = serve(*TWO, "server.py")
    assert re.fullmatch(rb"Thread-\d+.*: hello", daemon.ask(b"hello"))


def test_the_module_http_server_serves_both_families_and_says_so_once(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("one")
    buffered = {"PYTHONUNBUFFERED": ""}
    daemon = serve(*TWO, "-m", "http.server", "--", "0", "--bind=::", "--directory", tmp_path, environment=buffered)
    assert daemon.url("http.server").startswith("tcp://[::]:")
    _, port = daemon.address()
    for host in ("127.0.0.1", "[::1]"):
        with urllib.request.urlopen(f"http://{host}:{port}/page", timeout=DEADLINE) as page:
            assert page.read() == b"one"
    reload(daemon)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=DEADLINE) as page:
        assert page.read() == b"one"
    assert daemon.stop() == 0
    daemon.out.finish()
    assert daemon.out.lines == 2 * [f"Serving HTTP on :: port {port} (http://[::]:{port}/) ..."]
    assert not daemon.log.matches("Traceback")


WHO = """
import json, os, sys
told = [__name__, __file__, sys.argv, sys.path[0], __package__, __spec__ and __spec__.name]
told += [vars(sys.modules["__main__"]) is globals(), __doc__, sorted(set(globals()) - {"told", "__annotations__"})]
print(json.dumps(told), flush=True)
if os.environ.get("PLAIN"):
    sys.exit()
from socketserver import BaseRequestHandler, TCPServer
TCPServer(("127.0.0.1", 0), BaseRequestHandler).serve_forever()
"""

ARGUMENTS = ["8000", "--listen", "x", "--max-children=0", "-c", "--", "-m", "a:b"]


@pytest.mark.parametrize("words", [["sub/server.py"], ["-m", "pkg"], ["-m", "pkg.inner"]], ids=" ".join)
@pytest.mark.parametrize("divider", [[], ["--"]], ids=["directly", "--"])
def test_it_finds_itself_where_python_would_have_put_it(
    serve: Serve, tmp_path: Path, words: list[str], divider: list[str]
) -> None:
    for name in ("sub/server.py", "pkg/__init__.py", "pkg/__main__.py", "pkg/inner.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name.endswith("__init__.py") else WHO)
    plain = subprocess.run(
        [sys.executable, *words, *ARGUMENTS],
        cwd=tmp_path,
        env={**os.environ, "PLAIN": "1"},
        capture_output=True,
        check=True,
        timeout=DEADLINE,
    )
    daemon = serve("--max-children", "2", "--set", "boot_timeout=20s", *words, *divider, *ARGUMENTS)
    assert json.loads(daemon.out.wait_for("").string) == json.loads(plain.stdout)
    assert len(daemon.workers()) == 2


def test_a_file_of_settings_says_the_same(serve: Serve, tmp_path: Path, script: Path) -> None:
    script.write_text(app() + "\n")
    (tmp_path / "preforkd.toml").write_text(
        '[services.echo]\ntarget = "server.py"\nmax_children = 1\nargs = ["a", "--b"]\n'
        '[services.web]\ntarget = "-m http.server"\nargs = ["0", "--bind", "127.0.0.1"]\nmax_children = 1\n'
    )
    script.write_text(f"import sys\nprint(sys.argv)\n{app()}")
    daemon = serve("-c", "preforkd.toml")
    daemon.out.wait_for(re.escape("['server.py', 'a', '--b']"))
    assert version(daemon, "echo") == "one"
    with urllib.request.urlopen(f"http://127.0.0.1:{daemon.address('web')[1]}/", timeout=DEADLINE) as page:
        assert page.status == 200


# Where it listens.


def test_a_script_that_binds_a_unix_socket_keeps_its_file_through_every_reload(serve: Serve, script: Path) -> None:
    script.write_text(
        f"""{APP}
from socketserver import UnixStreamServer
os.umask(0o117)
if os.path.exists("socket"):
    os.unlink("socket")
with UnixStreamServer("socket", Handler) as server:
    server.serve_forever()
os.unlink("socket")
"""
    )
    path = script.parent / "socket"
    daemon = serve(*TWO, "server.py")
    first = path.stat()
    assert first.st_mode & 0o777 == 0o660
    for times in (1, 2):
        reload(daemon, times=times)
        assert path.stat().st_ino == first.st_ino
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
        client.connect(str(path))
        client.sendall(b"x\n")
        assert answers.readline().startswith(b"one ")
    assert daemon.stop() == 0
    assert not path.exists()
    assert not daemon.log.matches("Traceback")


def test_what_is_said_to_listen_on_counts_and_not_what_the_script_binds(serve: Serve, script: Path) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        script.write_text(app(port=port))
        daemon = serve(*TWO, "--listen", "unix:socket", "server.py")
    assert daemon.url() == "unix:socket"
    for times in (1, 2):
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
            client.connect(str(script.parent / "socket"))
            client.sendall(b"x\n")
            assert answers.readline().startswith(b"one ")
        reload(daemon, times=times)


def test_why_an_address_cannot_be_had_is_what_bind_raises(serve: Serve, script: Path) -> None:
    script.write_text(
        APP
        + """
def make():
    for port in range(int(sys.argv[1]), 65536):
        try:
            return TCPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            print(type(error).__name__, error.errno, error.strerror, flush=True)

make().serve_forever()
"""
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        daemon = serve(*TWO, "server.py", port)
        said = daemon.out.wait_for("^OSError ").string
        assert said == (
            f"OSError 98 tcp://127.0.0.1:{port}: address in use: stop whoever listens there, or choose another port"
        )
        assert daemon.address()[1] > port
        assert version(daemon) == "one"


def test_what_it_binds_and_does_not_serve_is_closed(serve: Serve, script: Path) -> None:
    script.write_text(
        app(
            """
other = TCPServer(("127.0.0.1", 0), None)
print(other.server_address[1], flush=True)
with TCPServer(("127.0.0.1", 0), Handler) as server:
    server.serve_forever()
"""
        )
    )
    daemon = serve(*TWO, "server.py")
    daemon.log.wait_for("^not_served service=server ")
    unserved = int(daemon.out.lines[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", unserved), DEADLINE)
    assert version(daemon) == "one"


def test_it_may_look_for_a_free_port_first(serve: Serve, script: Path) -> None:
    script.write_text(
        app(
            """
with TCPServer(("127.0.0.1", 0), None) as probe:
    where = probe.server_address
with TCPServer(where, Handler) as server:
    server.serve_forever()
"""
        )
    )
    daemon = serve(*TWO, "server.py")
    assert version(daemon) == "one"
    reload(daemon)
    assert version(daemon) == "one"
    assert len(daemon.log.matches("^listening ")) == 1


@pytest.mark.parametrize("kept", [0, 1], ids=["taken back", "of no use"])
def test_what_a_service_manager_has_kept_for_it_is_taken_back(serve: Serve, script: Path, kept: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        script.write_text(app(port=port))
        names = f"tcp%3A//127.0.0.1%3A{port + kept}"
        shell = f'exec 3<&{listener.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ LISTEN_FDNAMES={names} exec "$@"'
        prefix = ("bash", "-c", shell, "bash")
        if kept:  # under another name, so that it is let go of, but not by us
            assert "address in use" in refusal(
                serve("server.py", prefix=prefix, pass_fds=[listener.fileno()], ready=False)
            )
            return
        waiting = socket.create_connection(("127.0.0.1", port), DEADLINE)
        daemon = serve(*TWO, "server.py", prefix=prefix, pass_fds=[listener.fileno()])
        with waiting, waiting.makefile("rb") as answers:
            waiting.sendall(b"x\n")
            assert answers.readline().startswith(b"one ")
        assert not daemon.log.matches("^descriptor_unused ")


def test_two_scripts_cannot_have_the_same_address(serve: Serve, script: Path) -> None:
    port = free_port()
    script.write_text(app(port=port))
    (script.parent / "other.py").write_text(app(port=port))
    (script.parent / "preforkd.toml").write_text(
        '[services.a]\ntarget = "server.py"\n[services.b]\ntarget = "other.py"\n'
    )
    daemon = serve("-c", "preforkd.toml", ready=False)
    assert daemon.wait() == 70
    assert daemon.log.matches(rf"OSError: \[Errno 98\] tcp://127.0.0.1:{port}: tcp://127.0.0.1:{port} of ours has it")


@pytest.mark.parametrize("kind", ["thread", "gevent"])
def test_every_kind_of_worker_runs_scripts(serve: Serve, script: Path, kind: str) -> None:
    if kind == "gevent":
        pytest.importorskip("gevent")
    script.write_text(app())
    daemon = serve(*TWO, "--kind", kind, "--threads", "4", "--greenlets", "4", "server.py")
    with Talk(daemon) as one, Talk(daemon) as other:
        assert other.ask("x").startswith("one ")
        assert one.ask("x").startswith("one ")
    reload(daemon)
    workers = set(daemon.workers())
    assert version(daemon) == "one"
    assert daemon.stop() == 0
    assert workers <= set(notes(script, "served by"))
    assert not daemon.log.matches("Traceback")


def test_a_save_of_the_script_is_noticed_in_dev_mode(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("watchfiles")
    path = tmp_path / "below" / "server.py"
    path.parent.mkdir()
    path.write_text(app())
    daemon = serve("--dev", "--max-children", "1", "below/server.py")
    daemon.log.wait_for(rf"^dev_watching directories=.*{path.parent}")
    path.write_text(app(version="two"))
    daemon.log.wait_for("^reload_done ")
    assert version(daemon) == "two"


# A reload is a transaction.


def test_a_script_that_is_broken_is_rolled_back_and_who_has_asked_gets_the_traceback(
    serve: Serve, script: Path
) -> None:
    port, other = free_port(), free_port()
    script.write_text(app(port=port))
    daemon = serve(*TWO, "server.py")
    url = daemon.url()
    breaks = 'with TCPServer(("127.0.0.1", PORT), Handler):\n    raise KeyError("broken")\n'
    script.write_text(app(breaks, "two", other))
    asked = daemon.ctl("reload")
    assert asked.returncode == 1
    assert 'File "' + str(script) in asked.stderr
    assert "KeyError: 'broken'" in asked.stderr
    assert "preforkd_workers" not in asked.stderr
    assert version(daemon) == "one"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", other), DEADLINE)
    script.write_text(app(SERVE, "three", other))
    assert daemon.ctl("reload").returncode == 0
    assert daemon.url(index=1) != url
    with socket.create_connection(("127.0.0.1", other), DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(b"x\n")
        assert answers.readline().startswith(b"three ")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), DEADLINE)


def test_a_reload_finds_the_listener_again_with_those_who_wait_there(serve: Serve, script: Path) -> None:
    script.write_text(app())
    daemon = serve("--max-children", "1", *AT_ONCE, "--set", "graceful_timeout=20s", "server.py")
    with daemon.connect() as busy, busy.makefile("rb") as answers:
        busy.sendall(b"x\n")
        assert answers.readline().startswith(b"one ")
        with daemon.connect() as waiting, waiting.makefile("rb") as later:
            waiting.sendall(b"x\n")
            script.write_text(app(version="version two"))
            reload(daemon)
            assert later.readline().startswith(b"version ")
    assert len(daemon.log.matches("^listening ")) == 1


def test_an_upgrade_keeps_what_the_script_has_bound(serve: Serve, script: Path) -> None:
    script.write_text(app())
    daemon = serve(*TWO, "server.py", "--an", "argument")
    before = daemon.pid, daemon.address()
    script.write_text(app(version="version two"))
    daemon.signal(signal.SIGUSR2)
    daemon.log.wait_for("^upgrade_done ")
    assert (daemon.pid, daemon.address()) == before
    assert version(daemon) == "version"
    assert len(daemon.log.matches("^listening ")) == 1
    script.write_text(app(version="v3"))
    reload(daemon, times=2)
    assert version(daemon) == "v3"


def test_a_mold_that_dies_is_made_again_and_has_the_same_listener(serve: Serve, script: Path) -> None:
    script.write_text(app())
    daemon = serve(*TWO, "server.py")
    for times in (2, 3):
        kill(daemon.titled("mold server")[0])
        daemon.log.wait_for("^mold_ready service=server ", times)
        for pid in daemon.workers():
            kill(pid)
        daemon.log.wait_for("^worker_ready service=server ", 2 * times)
        assert version(daemon) == "one"
    assert len(daemon.log.matches("^listening ")) == 1


# The lines after serve_forever().


def test_the_lines_after_it_run_in_every_worker_and_nowhere_else(serve: Serve, script: Path) -> None:
    script.write_text(app())
    daemon = serve(*TWO, "server.py")
    first = set(daemon.workers())
    reload(daemon)
    eventually(lambda: not first & set(daemon.alive()), "the old workers have left")
    assert set(notes(script, "served by")) == set(notes(script, "left by")) == first
    second = set(daemon.workers())
    assert daemon.stop() == 0
    assert sorted(notes(script, "served by")) == sorted(notes(script, "left by")) == sorted(first | second)
    assert len(notes(script, "made by")) == 2
    assert not set(notes(script, "made by")) & (first | second)
    assert len(daemon.log.matches("cause=drained")) == 4


def test_what_it_has_registered_with_atexit_runs_in_every_worker(serve: Serve, script: Path) -> None:
    script.write_text(app(f'import atexit\natexit.register(note, "atexit")\n{SERVE}'))
    daemon = serve(*TWO, "server.py")
    workers = sorted(daemon.workers())
    assert daemon.stop() == 0
    assert sorted(notes(script, "atexit")) == workers


@pytest.mark.parametrize(
    "serving",
    [
        "while True:\n        server.serve_forever()",
        "server.serve_forever()\n    server.shutdown()\n    server.serve_forever()",
        "while True:\n        server.handle_request()",
        "for _ in range(1000):\n        server.handle_request()",
    ],
)
def test_it_leaves_however_it_loops(serve: Serve, script: Path, serving: str) -> None:
    script.write_text(app(f'with TCPServer(("127.0.0.1", 0), Handler) as server:\n    {serving}\n'))
    daemon = serve(*TWO, "server.py")
    assert version(daemon) == "one"
    reload(daemon)
    assert version(daemon) == "one"
    assert daemon.stop() == 0
    assert len(daemon.log.matches("cause=drained status=0")) == 4


def test_a_class_around_the_loop_and_signal_handlers_of_its_own_do_not_matter(serve: Serve, script: Path) -> None:
    script.write_text(
        app(
            """
import signal, threading

class Server(TCPServer):
    def serve_forever(self, poll_interval=0.5):
        note("begun by")
        try:
            super().serve_forever(poll_interval)
        except KeyboardInterrupt:
            note("interrupted")
        finally:
            self.server_close()
            note("ended by")

def stop(*_):
    note("signal")
    threading.Thread(target=server.shutdown).start()

server = Server(("127.0.0.1", 0), Handler)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, stop)
server.serve_forever()
"""
        )
    )
    daemon = serve(*TWO, "server.py")
    first = sorted(daemon.workers())
    os.kill(first[0], signal.SIGTERM)
    daemon.log.wait_for("^worker_exit .* cause=drained status=0")
    daemon.log.wait_for("^worker_ready ", 3)
    workers = sorted({*daemon.workers(), *first})
    for pid in daemon.workers():
        os.kill(pid, signal.SIGINT)  # as from a terminal
    assert daemon.stop() == 0
    assert sorted(notes(script, "ended by")) == workers
    assert not notes(script, "signal")
    assert not notes(script, "interrupted")


# Several servers.

BOTH = """
import threading
from socketserver import BaseRequestHandler, UDPServer

class Datagram(BaseRequestHandler):
    def handle(self):
        data, socket = self.request
        socket.sendto(f"{VERSION} {os.getpid()}".encode(), self.client_address)

def run(server):
    with server:
        server.serve_forever()

tcp = TCPServer(("127.0.0.1", 0), Handler)
udp = UDPServer(("127.0.0.1", 0), Datagram)
thread = threading.Thread(target=run, args=[udp])
thread.start()
try:
    tcp.serve_forever()
finally:
    udp.shutdown()
    thread.join()
    tcp.server_close()
    udp.server_close()
    note("left by")
"""


def ask_both(daemon: Daemon) -> list[str]:
    with udp(daemon.address("server-2")) as client:
        client.send(b"x")
        answer = client.recv(100).decode()
    return [version(daemon, "server"), answer.split()[0]]


def test_two_servers_of_a_script_are_two_services(serve: Serve, script: Path) -> None:
    script.write_text(app(BOTH))
    daemon = serve(*TWO, "server.py")
    assert daemon.url("server").startswith("tcp://")
    assert daemon.url("server-2").startswith("udp://")
    assert len(daemon.workers("server")) == len(daemon.workers("server-2")) == 2
    assert not daemon.log.matches("^mold_has_")
    assert ask_both(daemon) == ["one", "one"]
    old = {*daemon.workers()}
    script.write_text(app(BOTH, "version"))
    reload(daemon)
    assert ask_both(daemon) == ["version", "version"]
    assert len(daemon.log.matches("^listening ")) == 2
    eventually(lambda: not old & set(daemon.alive()), "the old workers have left")
    assert set(notes(script, "left by")) == old
    assert daemon.ctl("scale", "server-2", "1").returncode == 0
    assert daemon.ctl("reload", "server").returncode == 0
    assert daemon.stop() == 0


def is_refused(address: tuple[str, int]) -> bool:
    """Whether nobody has this UDP port open: the kernel tells who has sent to it."""
    with udp(address) as client:
        client.settimeout(0.05)
        client.send(b"x")
        try:
            client.recv(1)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            pass
        return False


def test_a_reload_adds_and_removes_the_services_of_a_script(serve: Serve, script: Path) -> None:
    script.write_text(app())
    daemon = serve(*TWO, "server.py")
    script.write_text(app(BOTH, "version"))
    reload(daemon)
    assert ask_both(daemon) == ["version", "version"]
    where = daemon.address("server-2")
    script.write_text(app(f"{BOTH}\n", "broken").replace("tcp.serve_forever()", "raise KeyError('broken')"))
    reload(daemon, "rolled_back", times=2)
    assert ask_both(daemon) == ["version", "version"]
    script.write_text(app(version="v3"))
    reload(daemon, times=3)
    assert version(daemon, "server") == "v3"
    eventually(lambda: is_refused(where), "those who had it open have left")
    status = json.loads(daemon.ctl("status", "--json").stdout)
    assert [each["name"] for each in status["services"]] == ["server"]


def test_a_failure_of_the_second_server_takes_back_the_first_as_well(serve: Serve, script: Path) -> None:
    script.write_text(app())
    daemon = serve(*TWO, "server.py")
    script.write_text(
        app(BOTH, "version")
        .replace("tcp.serve_forever()", "tcp.serve_forever()")
        .replace("tcp = ", 'os.path.exists("ran") and exit(3)\nopen("ran", "w").close()\ntcp = ')
    )
    reload(daemon, "rolled_back")
    assert version(daemon) == "one"
    eventually(lambda: not daemon.titled("mold server-2") and not daemon.titled("worker server-2"))
    assert daemon.stop() == 0


def test_the_settings_may_name_the_second_server(serve: Serve, script: Path) -> None:
    script.write_text(app(BOTH))
    (script.parent / "preforkd.toml").write_text(
        '[services.lines]\ntarget = "server.py"\nmax_children = 1\n'
        '[services.packets]\ntarget = "server.py"\nserver = 2\nmax_children = 3\nlisten = ["udp://127.0.0.1:0"]\n'
    )
    daemon = serve("-c", "preforkd.toml")
    assert len(daemon.workers("lines")) == 1
    assert len(daemon.workers("packets")) == 3
    assert len(daemon.log.matches("^mold_ready ")) == 2
    with udp(daemon.address("packets")) as client:
        client.send(b"x")
        assert int(client.recv(100).split()[1]) in daemon.workers("packets")


def test_a_reload_of_another_service_leaves_them_alone(serve: Serve, script: Path) -> None:
    script.write_text(app(BOTH))
    (script.parent / "other.py").write_text(app())
    (script.parent / "preforkd.toml").write_text(
        "".join(f'[services.{name}]\ntarget = "{name}.py"\nmax_children = 1\n' for name in ("server", "other"))
    )
    daemon = serve("-c", "preforkd.toml")
    workers = daemon.workers("server") + daemon.workers("server-2")
    assert daemon.ctl("reload", "other").returncode == 0
    assert daemon.workers("server") + daemon.workers("server-2") == workers
    assert ask_both(daemon) == ["one", "one"]


def test_an_upgrade_keeps_both(serve: Serve, script: Path) -> None:
    script.write_text(app(BOTH))
    daemon = serve(*TWO, "server.py")
    daemon.signal(signal.SIGUSR2)
    daemon.log.wait_for("^upgrade_done ")
    assert ask_both(daemon) == ["one", "one"]
    assert len(daemon.log.matches("^listening ")) == 2
    assert daemon.stop() == 0


# What cannot be served.


def test_the_example_that_serves_in_a_thread_is_refused_with_the_reason(serve: Serve, script: Path) -> None:
    script.write_text(IN_A_THREAD)
    assert refusal(serve("server.py", ready=False)).startswith(
        "server.py calls serve_forever() of a ThreadedTCPServer in the thread 'Thread-1 (serve_forever)' and not "
        "within 2 s in the main thread; a fork copies no other thread than the one that forks: call it in the main "
        "thread"
    )


WANTED = "want one whose main thread calls serve_forever() of a socketserver server"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", f"server.py has come to its end without a call of serve_forever(); {WANTED}"),
        (app("TCPServer(('127.0.0.1', 0), Handler)"), "server.py has come to its end without a call of serve_f"),
        ("import sys\nsys.exit(3)", f"SystemExit: 3\n(server.py has not called serve_forever(); {WANTED})"),
        ("def f():\n    raise KeyError(1)\nf()", "line 3, in <module>\n    f()\n"),
        ("x = = 1", "SyntaxError: invalid syntax"),
        ("import os\nos._exit(3)", "server.py: the script ended the process (status 3)"),
        (
            "import threading\nthreading.Event().wait()",
            "server.py has not called serve_forever() within boot_timeout\n",
        ),
        (
            app(
                "import socket\ns = TCPServer(('127.0.0.1', 0), Handler, False)\ns.socket.close()\n"
                "s.socket = socket.create_server(('127.0.0.1', 0))\ns.serve_forever()\n"
            ),
            "server.py: the socket of its TCPServer is not made by socketserver, so a reload could not keep it open; "
            "say where to listen: --listen URL",
        ),
        (None, "{cwd}/server.py: no such file"),
    ],
    ids=["empty", "unserved", "exits", "raises", "syntax", "dies", "hangs", "own socket", "none"],
)
def test_a_script_that_does_not_serve_is_a_clear_failure(
    serve: Serve, script: Path, source: str | None, said: str
) -> None:
    if source is not None:
        script.write_text(source)
    found = refusal(serve("--set", "boot_timeout=1s", "server.py", ready=False))
    assert said.replace("{cwd}", str(script.parent)) in found
    assert "preforkd_workers" not in found


def test_a_socket_of_the_scripts_own_is_replaced_when_it_is_said_where_to_listen(serve: Serve, script: Path) -> None:
    script.write_text(
        app(
            "import socket\ns = TCPServer(('127.0.0.1', 0), Handler, False)\ns.socket.close()\n"
            "s.socket = socket.create_server(('127.0.0.1', 0))\ns.serve_forever()\n"
        )
    )
    daemon = serve(*TWO, "--listen", "tcp://127.0.0.1:0", "server.py")
    reload(daemon)
    assert version(daemon) == "one"


def test_a_module_that_is_not_there_is_a_clear_failure(serve: Serve, tmp_path: Path) -> None:
    daemon = serve("-m", "no_such.module", ready=False)
    assert daemon.wait() == 70
    assert daemon.log.matches(r"\| no module named 'no_such.module' in " + re.escape(str(tmp_path)))


def test_a_listener_of_another_type_is_refused(serve: Serve, script: Path) -> None:
    script.write_text(DATAGRAMS)
    assert refusal(serve("--listen", "tcp://127.0.0.1:0", "server.py", ready=False)).startswith(
        "server.py: its server binds udp://127.0.0.1:0, which tcp://127.0.0.1:"
    )


def run(directory: Path, *words: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "preforkd", *map(str, words)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    return done.returncode, done.stdout, done.stderr


def test_settings_that_no_script_can_have_are_faults(tmp_path: Path) -> None:
    settings = tmp_path / "preforkd.toml"
    settings.write_text(
        '[services.a]\ntarget = "a.py"\nhandler = "x:y"\npreload = false\nlisten = ["tcp://[::]:0", "unix:x"]\n'
        '[services.b]\ntarget = "a.py"\n[services.c]\ntarget = "c:C"\nlisten = ["unix:y"]\nargs = ["x"]\nserver = 2\n'
    )
    status, _, said = run(tmp_path, "check", "-c", "preforkd.toml")
    assert status == 78
    assert said.splitlines() == [
        "preforkd: services.a.handler: a script brings its own",
        "preforkd: services.a.preload: a script runs once, in the mold, and not in each worker",
        "preforkd: services.a.listen: one server has one socket; for a script's second: a service with server = 2 and "
        "its own listen",
        "preforkd: services.b.target: server 1 of it is served by a",
        "preforkd: services.c.args: is for a script, file.py or -m module, and no other target",
        "preforkd: services.c.server: is for a script, file.py or -m module, and no other target",
    ]


def test_check_says_what_a_script_would_serve_and_touches_nothing(serve: Serve, script: Path) -> None:
    port = free_port()
    script.write_text(
        app(BOTH, port=port).replace(
            'tcp = TCPServer(("127.0.0.1", 0)',
            'from socketserver import UnixStreamServer\nif os.path.exists("socket"): os.unlink("socket")\n'
            'tcp = UnixStreamServer("socket"',
        )
    )
    wanted = [
        "service=server target=server.py is a script",
        f"service=server listen=unix:{script.parent}/socket family=AF_UNIX type=SOCK_STREAM",
        "service=server-2 listen=udp://127.0.0.1:0 family=AF_INET type=SOCK_DGRAM",
    ]
    assert run(script.parent, "check", "server.py") == (0, "\n".join([*wanted, ""]), "")
    assert not (script.parent / "socket").exists()
    serve(*TWO, "server.py")
    inode = (script.parent / "socket").stat().st_ino
    assert run(script.parent, "check", "server.py")[0] == 0
    assert (script.parent / "socket").stat().st_ino == inode
