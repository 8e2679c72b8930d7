"""The hooks that settings may name: when each is called, and what becomes of one that is missing, raises or hangs."""

import os
import re
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import Daemon, eventually
from tests.test_boot import boot_failure
from tests.test_cli import run
from tests.test_stop import Client, exit_of, timeouts

HOOKED = Path(__file__).parent / "hooked.py"
TCP = ("--listen", "tcp://127.0.0.1:0")
ONE = ("--max-children", "1")
PRELOADS = pytest.mark.parametrize("preload", ["true", "false"])

Notes = Callable[[], list[list[str]]]


def hooks(**names: str) -> Sequence[str]:
    """Settings: ``on_drain="raises"``."""
    return [word for hook, name in names.items() for word in ("--set", f"{hook}={name}")]


ALL = hooks(
    on_mold="on_mold",
    on_worker_start="on_worker_start",
    on_drain="Hooks.on_drain",
    on_worker_stop="Hooks.on_worker_stop",
)


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    """What the hooks have noted since the test began, a list of words each."""
    path = tmp_path / "hooks"
    path.touch()
    monkeypatch.setenv("HOOKS", str(path))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(HOOKED.parents[1]), os.environ.get("PYTHONPATH")]))
    )
    return lambda: [line.split() for line in path.read_text().splitlines()]


def named(notes: Notes) -> list[str]:
    return [words[0] for words in notes()]


def test_each_hook_comes_in_its_order_and_place(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, *ONE, *ALL)
    (mold,) = daemon.titled("mold Server")
    port = str(daemon.address()[1])
    with Client(daemon) as client:
        worker = str(client.pid)
        assert notes() == [
            ["on_mold", str(mold), "main", "serving", "open", port],
            ["on_worker_start", worker, "main", "serving", "open", port, "0"],
        ]
        daemon.signal(signal.SIGTERM)
        eventually(lambda: len(notes()) == 3, "the hook has run although the handler is busy")
        assert client.ask(b"draining") == b"True\n"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
        assert daemon.wait() == 0
    assert notes()[2:] == [
        ["on_drain", worker, "main", "draining", "open", port],
        ["request", worker, "main", "draining", "open", port],
        ["on_worker_stop", worker, "main", "draining", "open", port],
        ["server_close", worker, "main", "draining", "open", port],
    ]
    assert not daemon.log.matches("hook_failed")


def test_with_preload_off_every_worker_runs_on_mold_for_itself(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, "--max-children", "2", "--set", "preload=false", *ALL)
    workers = {str(pid) for pid in daemon.workers()}
    assert len(workers) == 2
    for worker in workers:
        assert [words[0] for words in notes() if words[1] == worker] == ["on_mold", "on_worker_start"]
    assert len(notes()) == 4
    assert {words[-1] for words in notes() if words[0] == "on_worker_start"} == {"0", "1"}


def test_each_hook_is_called_for_every_server(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, *TCP, *ONE, *ALL)
    ports = [str(daemon.address(index=index)[1]) for index in (0, 1)]
    assert daemon.stop() == 0
    for hook in ("on_mold", "on_worker_start", "on_drain", "on_worker_stop", "server_close"):
        assert [words[5] for words in notes() if words[0] == hook] == ports
    assert named(notes)[-4:] == ["on_worker_stop", "on_worker_stop", "server_close", "server_close"]


def test_a_hook_may_be_in_another_module_or_file(serve: Serve, notes: Notes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from tests.hooked import note\ndef mold(server): note('elsewhere', server)\n"
    )
    names = hooks(on_mold="elsewhere:mold", on_worker_start=f"{HOOKED}:on_worker_start", on_drain="elsewhere.py:mold")
    daemon = serve("tests.targets:Obey", *TCP, *ONE, *names)
    assert daemon.stop() == 0
    assert named(notes) == ["elsewhere", "on_worker_start", "elsewhere"]


def test_the_file_names_hooks_for_one_service_only(serve: Serve, notes: Notes, tmp_path: Path) -> None:
    (tmp_path / "preforkd.toml").write_text(
        f'[services.a]\ntarget = "{HOOKED}:Server"\nlisten = ["tcp://127.0.0.1:0"]\n'
        f'on_worker_start = "on_worker_start"\nmax_children = 1\n[services.b]\ntarget = "{HOOKED}:Server"\nlisten = ["tcp://127.0.0.1:0"]\n'
    )
    daemon = serve("-c", "preforkd.toml")
    assert [(words[0], words[1]) for words in notes()] == [("on_worker_start", str(daemon.workers("a")[0]))]


# What goes wrong before a worker serves.


@PRELOADS
@pytest.mark.parametrize("hook", ["on_mold", "on_worker_start", "on_drain", "on_worker_stop"])
def test_a_hook_that_is_missing_is_named_with_what_may_have_been_meant(serve: Serve, hook: str, preload: str) -> None:
    names = hooks(**{hook: "Hooks.on_drian", "preload": preload})
    said = boot_failure(serve(f"{HOOKED}:Server", *TCP, *ONE, *names, ready=False))
    assert said == f"{hook}: {HOOKED} has no 'Hooks.on_drian'; did you mean 'on_drain'?"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing is of type NoneType; want a function"),
        ("nowhere:x", "no module named 'nowhere' in "),
        ("x:", "'x:': want module:name or path/to/file.py:name"),
    ],
)
def test_check_finds_a_hook_that_is_none_and_runs_none(tmp_path: Path, notes: Notes, name: str, message: str) -> None:
    status, out, error = run(tmp_path, "check", f"{HOOKED}:Server", *TCP, *hooks(on_mold="raises", on_drain=name))
    assert (status, out) == (78, "")
    assert error.startswith(f"preforkd: services.Server: on_drain: {message}")
    assert run(tmp_path, "check", f"{HOOKED}:Server", *TCP, *ALL, *hooks(on_mold="raises"))[0] == 0
    assert notes() == []


LAST_WORDS = {
    "raises": "ValueError: as told",
    "exits": "SystemExit: 3",
    "interrupts": "KeyboardInterrupt",
}


@PRELOADS
@pytest.mark.parametrize("hook", ["on_mold", "on_worker_start"])
@pytest.mark.parametrize("name", LAST_WORDS)
def test_a_hook_that_raises_before_a_worker_serves_is_a_boot_failure(
    serve: Serve, hook: str, name: str, preload: str
) -> None:
    names = hooks(**{hook: name, "preload": preload})
    said = boot_failure(serve(f"{HOOKED}:Server", *TCP, *ONE, *names, ready=False))
    lines = [line for line in said.splitlines() if line.strip(" ~^")]  # without what newer interpreters underline
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith(f'  File "{HOOKED}", line ')
    assert lines[1].endswith(f"in {name}")
    assert lines[3:5] == [LAST_WORDS[name], f"(raised by the hook {hook})"]
    assert lines[5:] == (["(it must not exit here)"] if name == "exits" else [])


@pytest.mark.parametrize("hook", ["on_mold", "on_worker_start"])
def test_a_hook_that_hangs_before_a_worker_serves_is_killed_with_its_stack(serve: Serve, hook: str) -> None:
    names = hooks(**{hook: "hangs", "boot_timeout": "3"})
    daemon = serve(f"{HOOKED}:Server", *TCP, *ONE, *names, ready=False)
    assert daemon.wait() == 70
    assert daemon.log.matches("^kill .*cause=boot signal=SIGABRT")
    assert re.search(r'hooked.py", line \d+ in hangs', daemon.log.text)


def test_a_worker_that_is_replaced_starts_with_the_hook_and_its_failure_is_told(
    serve: Serve, notes: Notes, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(
        "import os\nfrom tests.hooked import *\nfrom tests.hooked import on_worker_start as start\n"
        "def once(server, slot):\n    start(server, slot)\n    assert not os.path.exists('broken'), 'still broken'\n"
    )
    daemon = serve("app:Server", *TCP, *ONE, *hooks(on_worker_start="once"))
    (first,) = daemon.workers()
    (tmp_path / "broken").touch()
    os.kill(first, signal.SIGKILL)
    daemon.log.wait_for(r"^boot_failed service=Server")
    daemon.log.wait_for(r"^Server\| AssertionError: still broken")
    (tmp_path / "broken").unlink()
    daemon.log.wait_for("^worker_ready ", 2)
    assert daemon.ask(b"say again\n") == b"again\n"
    assert len(notes()) >= 4


def test_threads_that_on_mold_starts_are_warned_about(serve: Serve) -> None:
    daemon = serve(f"{HOOKED}:Handler", *TCP, *ONE, *hooks(on_mold="starts_thread"))
    assert daemon.log.matches("^mold_has_threads .*threads=helper")


@PRELOADS
@pytest.mark.parametrize("hook", ["on_mold", "on_worker_start"])
def test_what_a_hook_does_with_signals_does_not_last(serve: Serve, notes: Notes, hook: str, preload: str) -> None:
    names = hooks(**{hook: "takes_signals", "preload": preload})
    daemon = serve(f"{HOOKED}:Server", *TCP, *ONE, *names, *timeouts(0.2, 20))
    with Client(daemon) as client:
        daemon.signal(signal.SIGUSR1)
        daemon.log.wait_for(r"^Server#0\| .*in handle")
        daemon.signal(signal.SIGTERM)
        assert client.rest() == b""
    assert daemon.wait() == 0
    assert "cause=eof " in exit_of(daemon, client.pid)
    assert "takes_signals" in named(notes)


# What goes wrong later.


def failed_hooks(daemon: Daemon) -> list[str]:
    return [match[1] for match in daemon.log.matches(r"^hook_failed service=Server slot=0 .*\bhook=(\S+)")]


@pytest.mark.parametrize("name", LAST_WORDS)
def test_a_hook_that_raises_in_the_end_is_logged_and_the_stop_goes_on(serve: Serve, notes: Notes, name: str) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, *TCP, *ONE, *hooks(on_drain=name, on_worker_stop=name))
    with Client(daemon) as client:
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("^hook_failed ", 2)
        assert client.ask(b"say still here") == b"still here\n"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    assert daemon.wait() == 0
    assert named(notes) == [name, name, "request", name, name, "server_close", "server_close"]
    assert failed_hooks(daemon) == ["on_drain"] * 2 + ["on_worker_stop"] * 2
    assert len(daemon.log.matches(rf"^Server#0\| {LAST_WORDS[name]}$")) == 4
    assert len(daemon.log.matches(rf'^Server#0\|   File "{HOOKED}", line \d+, in {name}$')) == 4
    assert "cause=drained status=0 requests=1 " in exit_of(daemon, client.pid)


@pytest.mark.parametrize("hook", ["on_drain", "on_worker_stop"])
def test_a_hook_that_hangs_in_the_end_is_killed_at_the_deadline_with_its_stack(serve: Serve, hook: str) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, *ONE, *hooks(**{hook: "hangs"}), *timeouts(0.2, 0.2))
    assert daemon.stop() == 0
    assert daemon.log.matches("^kill .*cause=deadline signal=SIGABRT")
    assert re.search(r'hooked.py", line \d+ in hangs', daemon.log.text)


def test_hooks_run_when_the_master_is_gone_and_say_on_standard_error_what_they_raised(
    serve: Serve, notes: Notes
) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, *ONE, *hooks(on_drain="raises", on_worker_stop="Hooks.on_worker_stop"))
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: named(notes)[-1:] == ["server_close"], "the worker has left")
    assert named(notes) == ["raises", "on_worker_stop", "server_close"]
    daemon.log.wait_for("^ValueError: as told$")


# Who is told, and when.


def test_shutdown_by_a_handler_drains_with_its_hooks(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, *ONE, *ALL)
    with Client(daemon) as client:
        assert client.ask(b"shutdown") == b"shut down\n"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    assert "cause=drained " in exit_of(daemon, client.pid)
    mine = [words[0] for words in notes() if words[1] == str(client.pid)]
    assert mine == ["on_worker_start", "on_drain", "request", "on_worker_stop", "server_close"]


@pytest.mark.parametrize("kill", ["", "os.kill = lambda *_: threading.Event().wait()\n"], ids=["", "told too late"])
def test_shutdown_in_another_thread_runs_the_hook_in_the_main_thread(
    serve: Serve, notes: Notes, tmp_path: Path, kill: str
) -> None:
    """Also where the request ends before that thread gets to tell the main one."""
    (tmp_path / "app.py").write_text(
        f"import os, threading\n{kill}from tests.hooked import *\nfrom tests.hooked import Handler, Hooks\n"
        "class Stop(Handler):\n"
        "    def obey(self, order, *words):\n"
        "        if order == 'stop':\n"
        "            threading.Thread(target=self.server.shutdown, daemon=True).start()\n"
        "            while not self.server.draining: pass\n"
        "        return super().obey(order, *words)\n"
        "def make(address):\n    server = Server(address)\n    server.RequestHandlerClass = Stop\n    return server\n"
    )
    daemon = serve("app:make", *TCP, *ONE, *hooks(on_drain="Hooks.on_drain"))
    with Client(daemon) as client:
        assert client.ask(b"stop") == b"what?\n"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    assert "cause=drained " in exit_of(daemon, client.pid)
    drained = [words for words in notes() if words[0] == "on_drain"]
    assert [(words[1], words[2]) for words in drained] == [(str(client.pid), "main")]


def test_on_worker_stop_comes_after_the_requests_in_threads(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{HOOKED}:ThreadingServer", *TCP, *ONE, *ALL)
    with daemon.connect() as client:
        assert client.recv(100) == b"quick\n"
        daemon.signal(signal.SIGTERM)
        eventually(lambda: named(notes)[-1] == "on_drain", "the worker drains")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert daemon.wait() == 0
    assert named(notes)[2:] == ["on_drain", "request", "on_worker_stop", "server_close"]


def test_a_child_that_a_handler_forks_runs_no_hook(serve: Serve, notes: Notes, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("from tests.hooked import *\nfrom tests.hooked import Hooks\n")
    daemon = serve(
        "app:ForkAndReturn", *TCP, *ONE, *hooks(on_drain="Hooks.on_drain", on_worker_stop="Hooks.on_worker_stop")
    )
    (worker,) = daemon.workers()
    assert int(daemon.ask(b"")) != worker
    assert daemon.stop() == 0
    assert [(words[0], words[1]) for words in notes()] == [("on_drain", str(worker)), ("on_worker_stop", str(worker))]


def test_a_worker_told_twice_at_once_runs_on_drain_once(serve: Serve, notes: Notes) -> None:
    daemon = serve(f"{HOOKED}:Server", *TCP, "--max-children", "8", *hooks(on_drain="Hooks.on_drain"))
    workers = {str(pid) for pid in daemon.workers()}
    for pid in workers:
        for _ in range(3):
            with suppress(ProcessLookupError):  # it may have left
                os.kill(int(pid), signal.SIGTERM)  # beside what the master does: hang up, and the same signal
    assert daemon.stop() == 0
    drained = [words[1] for words in notes() if words[0] == "on_drain"]
    assert len(drained) == len(set(drained))
    assert workers <= set(drained)
