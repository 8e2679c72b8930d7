"""From a target to workers: every kind of it, and everything that can be wrong with one."""

import os
import signal
import urllib.request
import xmlrpc.client
from pathlib import Path

import pytest

from tests.conftest import TARGETS, Serve
from tests.daemon import DEADLINE, Daemon, eventually

TCP = ("--listen", "tcp://127.0.0.1:0")
UDP = ("--listen", "udp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")
PRELOADS = pytest.mark.parametrize("preload", ["true", "false"])


def write(directory: Path, source: str, name: str = "app.py") -> None:
    """Replace a module, its compiled form included: two writes within a second may have the same size."""
    (directory / "new").write_text(source)
    (directory / "new").rename(directory / name)
    for compiled in directory.glob("__pycache__/*"):
        compiled.unlink()


def boot_failure(daemon: Daemon) -> str:
    """What it says of its target when it has ended for it, without the prefix."""
    assert daemon.wait() == 70
    daemon.log.wait_for("^boot_failed ")
    assert len(daemon.log.matches("^boot_failed ")) == 1
    assert not daemon.log.matches("^ready ")
    at = [line.startswith("boot_failed ") for line in daemon.log.lines].index(True)
    said = [line for line in daemon.log.lines[at + 1 :] if "| " in line]
    return "\n".join(line.partition("| ")[2] for line in said)


# What can be wrong.


BAD_TARGETS = [
    ("nowhere:Upper", "no module named 'nowhere' in {cwd} or elsewhere on sys.path"),
    ("os.nowhere:Upper", "no module named 'os.nowhere' in {cwd} or elsewhere on sys.path"),
    ("nowhere.py:Upper", "{cwd}/nowhere.py: no such file"),
    ("os", "'os': want module:name or path/to/file.py:name"),
    ("os:", "'os:': want module:name or path/to/file.py:name"),
    (":Uper", "{targets} has no 'Uper'; did you mean 'Upper'?"),
    (":os.nowhere", "{targets} has no 'os.nowhere'"),
    (
        ":os",
        "{targets}:os is of type module; want a request handler class, a server class, a server instance, "
        "or a factory f(address) -> server",
    ),
    (
        "pathlib:Path",
        "pathlib:Path is the class Path; want a request handler class, a server class, a server instance, "
        "or a factory f(address) -> server",
    ),
    (":UpperDatagram", "{targets}:UpperDatagram is a DatagramRequestHandler, which cannot serve tcp://127.0.0.1:"),
    (
        "socketserver:TCPServer",
        "socketserver:TCPServer cannot be made from an address alone (TCPServer.__init__() missing 1 required "
        "positional argument: 'RequestHandlerClass'); give it a handler",
    ),
    ("builtins:len", "builtins:len('127.0.0.1', "),
    ("builtins:str.upper", "TypeError: "),
    ("builtins:repr", "builtins:repr('127.0.0.1', "),
]


@pytest.mark.parametrize(
    ("target", "words", "preload"),
    [(*case, "true") for case in BAD_TARGETS] + [(*case, "false") for case in BAD_TARGETS[::5]],
)
def test_a_target_that_cannot_be_served_is_one_clear_message(
    serve: Serve, tmp_path: Path, target: str, words: str, preload: str
) -> None:
    daemon = serve(target, *TCP, "--set", f"preload={preload}", "--max-children", "1", ready=False)
    said = boot_failure(daemon)
    assert words.format(cwd=tmp_path, targets=TARGETS) in said
    assert "preforkd" not in said


def test_a_stream_handler_on_datagrams_and_a_server_of_the_other_type_are_named(serve: Serve) -> None:
    said = boot_failure(serve(":Upper", *UDP, ready=False))
    assert f"{TARGETS}:Upper is a StreamRequestHandler, which cannot serve udp://127.0.0.1:" in said
    said = boot_failure(serve("http.server:HTTPServer", "--handler", ":Page", *UDP, ready=False))
    assert "HTTPServer is a stream server, but udp://127.0.0.1:" in said
    assert said.endswith(" is a datagram listener")


def test_one_instance_cannot_serve_two_listeners(serve: Serve) -> None:
    said = boot_failure(serve(":instance", *TCP, *TCP, environment={"INSTANCE": "1"}, ready=False))
    assert said == f"{TARGETS}:instance is one server instance and has one socket, not 2 listeners"


BAD_MODULES = [
    ("def f():\n    raise ValueError('too bad')\nf()", "ValueError: too bad"),
    ("def f(:\n    pass", "SyntaxError: "),
    ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    ("import sys\nsys.exit('enough')", "SystemExit: enough\n(it must not exit here)"),
    ("import sys\nsys.exit()", "SystemExit\n(it must not exit here)"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("raise ValueError('\\udcff' + 200_000 * 'x')", "xxxx"),
]


@pytest.mark.parametrize(
    ("source", "last", "preload"),
    [(*case, "true") for case in BAD_MODULES] + [(*case, "false") for case in BAD_MODULES[::3]],
)
def test_a_module_that_raises_shows_its_own_traceback_once(
    serve: Serve, tmp_path: Path, source: str, last: str, preload: str
) -> None:
    write(tmp_path, source)
    said = boot_failure(serve("app:Handler", *TCP, "--set", f"preload={preload}", ready=False))
    assert last in said.rpartition('File "')[2]
    assert "app.py" in said
    assert said.count('File "') == said.count("in f\n") + 1
    assert "preforkd" not in said
    assert "importlib" not in said


def test_a_target_that_raises_when_constructed_shows_its_own_traceback(serve: Serve, tmp_path: Path) -> None:
    write(tmp_path, "def make(address):\n    raise OSError('no database')\n")
    said = boot_failure(serve("app:make", *TCP, ready=False))
    assert said.splitlines()[0] == "Traceback (most recent call last):"
    assert said.splitlines()[1].endswith('app.py", line 2, in make')
    assert said.splitlines()[-1] == "OSError: no database"


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("import os\nos._exit(3)", "status 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("import faulthandler\nfaulthandler._sigsegv()", "signal SIGSEGV"),
    ],
)
def test_a_module_that_ends_the_process_is_named_with_how(serve: Serve, tmp_path: Path, source: str, how: str) -> None:
    write(tmp_path, source)
    daemon = serve("app:Handler", *TCP, ready=False)
    said, *stack = boot_failure(daemon).splitlines()
    assert said == f"app:Handler: the import ended the process ({how})"
    assert [line for line in stack if "app.py" in line] == (
        [f'  File "{tmp_path}/app.py", line 2 in <module>'] if "SEGV" in how else []
    )


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("import os\nos._exit(3)", "exited with status 3"),
        ("import os\nos.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    ],
)
def test_a_worker_that_ends_at_its_import_is_named_with_how(
    serve: Serve, tmp_path: Path, source: str, how: str
) -> None:
    write(tmp_path, source)
    daemon = serve("app:Handler", *TCP, "--set", "preload=false", ready=False)
    assert boot_failure(daemon) == f"a worker {how} before it was ready"


@PRELOADS
def test_a_module_that_hangs_is_killed_after_boot_timeout_with_its_stack(
    serve: Serve, tmp_path: Path, preload: str
) -> None:
    write(tmp_path, "import signal\ndef stuck():\n    signal.pause()\nstuck()")
    daemon = serve("app:Handler", *TCP, "--set", f"preload={preload}", "--set", "boot_timeout=500ms", ready=False)
    said = boot_failure(daemon)
    if preload == "true":
        assert said.splitlines()[0] == "the import of app:Handler took longer than boot_timeout"
        assert 'app.py", line 3 in stuck' in said
    else:
        assert said.splitlines()[0] == "a worker was killed by SIGABRT before it was ready"
    assert 'app.py", line 3 in stuck' in daemon.log.text
    assert daemon.log.matches("^kill .*cause=boot ")


def test_a_boot_failure_of_one_service_ends_all_with_nobody_left(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        f'services.good = {{target = "{TARGETS}:Upper", listen = ["tcp://127.0.0.1:0"]}}\n'
        'services.bad = {target = "nowhere:Upper", listen = ["unix:x"]}\n'
    )
    daemon = serve("-c", "c.toml", *METRICS, ready=False)
    assert boot_failure(daemon).startswith("no module named 'nowhere'")
    assert daemon.log.matches("^boot_failed service=bad target=nowhere:Upper")
    assert not (tmp_path / "x").exists()


# What goes wrong after it has been right.

PID_HANDLER = """
import os
from socketserver import BaseRequestHandler

class H(BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"%d" % os.getpid())
"""


def test_when_the_mold_dies_and_the_module_is_broken_the_workers_serve_on(serve: Serve, tmp_path: Path) -> None:
    write(tmp_path, PID_HANDLER)
    daemon = serve("app:H", *TCP, "--max-children", "2")
    workers = daemon.workers()
    write(tmp_path, "raise ValueError('broken on disk')")
    (mold,) = daemon.titled("mold H")
    os.kill(mold, signal.SIGKILL)
    pauses = [float(daemon.log.wait_for(r"^mold_exit .*retry_in=([0-9.]+)s", times)[1]) for times in (1, 2, 3, 4)]
    assert pauses[:2] == [0.0, 0.0]
    assert 0 < pauses[2] < pauses[3]
    daemon.log.wait_for(r"^H\| ValueError: broken on disk", 2)
    assert {int(daemon.ask(b"")) for _ in range(20)} <= set(workers)
    assert daemon.workers() == workers
    write(tmp_path, PID_HANDLER)
    daemon.log.wait_for("^mold_ready ", times=2)
    os.kill(workers[0], signal.SIGKILL)
    eventually(lambda: len(daemon.workers()) == 2)
    assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGRTMIN])
def test_who_has_no_stack_to_tell_yet_lives_on_when_asked_for_it(serve: Serve, number: int) -> None:
    """A mold never has; and what it does with a signal, its workers do until they are ready to answer."""
    daemon = serve("preforkd_workers.samples:Upper", *TCP)
    (mold,) = daemon.titled("mold Upper")
    os.kill(mold, number)
    assert daemon.ctl("roll").returncode == 0
    assert daemon.titled("mold Upper") == [mold]


def test_when_a_worker_cannot_import_any_more_it_is_said_and_tried_again(serve: Serve, tmp_path: Path) -> None:
    write(tmp_path, PID_HANDLER)
    daemon = serve("app:H", *TCP, "--max-children", "2", "--set", "preload=false", *METRICS)
    one, other = daemon.workers()
    write(tmp_path, "raise ValueError('broken on disk')")
    os.kill(one, signal.SIGKILL)
    daemon.log.wait_for("^worker_exit service=H .*cause=boot")
    daemon.log.wait_for(r"^H\| ValueError: broken on disk")
    assert int(daemon.ask(b"")) == other
    write(tmp_path, PID_HANDLER)
    eventually(lambda: len(daemon.workers("H")) == 2)
    assert daemon.metrics()['preforkd_worker_exits_total{reason="boot",service="H"}'] >= 1
    assert daemon.stop() == 0


# What is right: every kind of target.


@PRELOADS
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ((":Upper",), b"A\n"),
        ((":ThreadingObeyServer", "--handler", ":Obey"), b"what?\n"),
        (("socketserver:ForkingTCPServer", "--handler", ":Obey"), b"what?\n"),
        ((":recording",), b"what?\n"),
        (("preforkd_workers.samples:Echo",), b"a\n"),
    ],
)
def test_handler_class_server_class_and_factory(
    serve: Serve, tmp_path: Path, words: tuple[str, ...], answer: bytes, preload: str
) -> None:
    environment = {"HOOKS": f"{tmp_path}/hooks"}
    daemon = serve(*words, *TCP, *TCP, "--set", f"preload={preload}", environment=environment)
    assert daemon.ask(b"a\n") == answer
    assert daemon.address(None, 1) != daemon.address(None, 0)


def page(daemon: Daemon, index: int = 0) -> list[str]:
    host, port = daemon.address(None, index)
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=DEADLINE) as answer:
        return answer.read().decode().split()  # type: ignore[no-any-return]


@PRELOADS
@pytest.mark.parametrize(
    "words",
    [
        ("http.server:HTTPServer", "--handler", ":Page"),
        ("http.server:ThreadingHTTPServer", "--handler", ":Page"),
        (":instance",),
        ("app:bound_elsewhere",),
        ("app:configured",),
    ],
)
def test_http_servers_take_the_masters_socket_and_know_its_address(
    serve: Serve, tmp_path: Path, words: tuple[str, ...], preload: str
) -> None:
    write(
        tmp_path,
        f"import sys; sys.path.append({str(TARGETS.parent)!r})\n"
        "from targets import HTTPServer, Page\n"
        "def bound_elsewhere(address): return HTTPServer(('127.0.0.1', 0), Page)\n"
        "def configured(address):\n    server = HTTPServer(address, Page, False)\n"
        "    server.server_bind(); server.server_activate(); return server\n",
    )
    daemon = serve(*words, *TCP, "--set", f"preload={preload}", environment={"INSTANCE": "1"})
    name, port = page(daemon)
    assert int(port) == daemon.address()[1]
    assert name in ("localhost", "127.0.0.1")


def test_each_of_several_listeners_has_a_server_that_knows_its_own_address(serve: Serve) -> None:
    daemon = serve("http.server:HTTPServer", "--handler", ":Page", *TCP, *TCP)
    assert [int(page(daemon, index)[1]) for index in (0, 1)] == [daemon.address(None, index)[1] for index in (0, 1)]


def test_an_xmlrpc_server_and_a_wsgi_server_are_constructed_as_written(serve: Serve, tmp_path: Path) -> None:
    write(
        tmp_path,
        "from xmlrpc.server import SimpleXMLRPCServer\n"
        "from wsgiref.simple_server import make_server\n"
        "def rpc(address):\n    server = SimpleXMLRPCServer(address, logRequests=False)\n"
        "    server.register_function(lambda: list(server.server_address), 'where')\n    return server\n"
        "def site(environ, start):\n    start('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [f\"{environ['SERVER_NAME']} {environ['SERVER_PORT']}\".encode()]\n"
        "def wsgi(address):\n    return make_server(address[0], address[1], site)\n",
    )
    rpc, wsgi = serve("app:rpc", *TCP), serve("app:wsgi", *TCP)
    host, port = rpc.address()
    with xmlrpc.client.ServerProxy(f"http://{host}:{port}") as proxy:
        assert proxy.where() == [host, port]
    assert int(page(wsgi)[1]) == wsgi.address()[1]


def test_a_server_that_removes_its_socket_file_leaves_the_masters_alone(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(":TidyUnixServer", "--handler", ":Pid", f"--listen=unix:{tmp_path}/x", "--max-children", "2")
    inode = (tmp_path / "x").stat().st_ino
    workers = daemon.workers()
    os.kill(workers[0], signal.SIGTERM)  # it leaves in good order, closing its server
    daemon.log.wait_for("^worker_exit .*cause=drained")
    eventually(lambda: len(daemon.workers()) == 2)
    assert (tmp_path / "x").stat().st_ino == inode
    assert daemon.stop() == 0
    assert not (tmp_path / "x").exists()


def test_what_a_target_prints_and_warns_of_at_import_is_seen_once(serve: Serve, tmp_path: Path) -> None:
    write(tmp_path, PID_HANDLER + "import sys\nprint('hello')\nprint('careful', file=sys.stderr)\n")
    daemon = serve("app:H", *TCP)
    assert daemon.stop() == 0
    assert daemon.out.lines == ["hello"]
    assert daemon.log.lines.count("careful") == 1


def test_hazards_of_a_target_are_said_once(serve: Serve, tmp_path: Path) -> None:
    write(
        tmp_path,
        PID_HANDLER + "import threading\n"
        "threading.Thread(target=threading.Event().wait, name='poller', daemon=True).start()\n",
    )
    daemon = serve("app:H", *TCP)
    (said,) = daemon.log.matches("^mold_has_threads .*")
    assert "threads=poller" in said[0]
    assert "preload = false" in said[0]
    daemon = serve(":ThreadingObeyServer", "--handler", ":Obey", *TCP)
    assert len(daemon.log.matches("^mixin_unnecessary .*mixin=ThreadingMixIn")) == 1
