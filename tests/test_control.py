"""The control socket: who is answered, what becomes of those who send rubbish or nothing; and nobody else notices."""

import json
import os
import resource
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from preforkd import log
from preforkd.control import LONGEST_LINE, LONGEST_OUTPUT, MOST_CLIENTS, PATIENCE, Control, Request, listen
from preforkd.listeners import ListenError
from preforkd.runtime import address_of, control_place, directories
from tests.conftest import TARGETS, Serve
from tests.daemon import DEADLINE, Conversation, Daemon, Log, eventually, unprivileged
from tests.test_hardship import limited

TCP = ("--listen", "tcp://127.0.0.1:0")
PING = {"v": 1, "do": "ping"}


class Client(Conversation):
    """A connection to a control socket, without any manners of its own."""

    def __init__(self, path: str) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with address_of(path) as address:
            connection.connect(address)  # waits where the backlog is full; with a time-out it would fail
        connection.settimeout(DEADLINE)
        super().__init__(connection)

    def send(self, *requests: object) -> None:
        self.socket.sendall(b"".join(json.dumps(request).encode() + b"\n" for request in requests))

    def hear(self) -> dict[str, Any]:
        """The next line."""
        said: dict[str, Any] = json.loads(self.answers.readline())
        assert said.pop("v") == 1
        return said

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """The answer; what is said before it is passed over."""
        self.send({"v": 1, "do": do, **arguments})
        while "event" in (said := self.hear()):
            pass
        return said

    def is_hung_up_on(self) -> bool:
        """Whether nothing but the end is there to be read."""
        try:
            return self.answers.read() == b""
        except ConnectionResetError:
            return True


# Lines.


def test_a_line_is_answered_by_a_line(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    with Client(daemon.control) as client:
        answer = client.ask("ping")
        assert answer.pop("ok") is True
        assert answer["name"] == "Upper"
        assert answer["pid"] == daemon.pid
        assert client.ask("ping")["pid"] == daemon.pid


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"rubbish", "want a JSON object"),
        (b"", "want a JSON object"),
        (b"[]", "want a JSON object"),
        (b'"ping"', "want a JSON object"),
        (b"\xff\xfe\x00", "want a JSON object"),
        (b'{"v": 1, "do": "ping"', "want a JSON object"),
        (b"[" * 60_000, "want a JSON object"),
        (b"9" * 60_000, "want a JSON object"),
        (b"{}", 'want "v": 1'),
        (b'{"v": 2, "do": "ping"}', 'want "v": 1'),
        (b'{"v": true, "do": "ping"}', 'want "v": 1'),
        (b'{"v": 1}', 'want "do": a command'),
        (b'{"v": 1, "do": ["ping"]}', 'want "do": a command'),
        (b'{"v": 1, "do": "pong"}', "no command 'pong'; there are ping, "),
        (b'{"v": 1, "do": "ping", "loudly": 1}', "ping takes nothing, not 'loudly'"),
        (b'{"v": 1, "do": "scale", "of": 1}', "scale takes service, workers, wait, not 'of'"),
        (b'{"v": 1, "do": "scale", "service": "Upper"}', "workers: required"),
        (b'{"v": 1, "do": "scale", "service": 1, "workers": 1}', "service: want text, not 1"),
        (b'{"v": 1, "do": "scale", "service": "Upper", "workers": 0}', "workers: want 1 to 4096, not 0"),
        (b'{"v": 1, "do": "scale", "service": "Upper", "workers": true}', "workers: want a whole number, not True"),
        (b'{"v": 1, "do": "scale", "service": "Upper", "workers": 1e999}', "workers: want a whole number, not inf"),
        (b'{"v": 1, "do": "scale", "service": "\\ud800", "workers": 1}', "no service '\\ud800'; there are Upper"),
    ],
)
def test_rubbish_is_told_what_is_wanted_and_may_go_on(serve: Serve, line: bytes, complaint: str) -> None:
    daemon = serve(":Upper", *TCP)
    with Client(daemon.control) as client:
        client.socket.sendall(line + b"\n")
        answer = client.hear()
        assert answer["ok"] is False
        assert complaint in answer["error"]
        assert client.ask("ping")["ok"]
    assert daemon.ask(b"still\n") == b"STILL\n"
    assert "Traceback" not in daemon.log.text


def test_a_line_may_come_in_pieces_and_many_at_a_time(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    with Client(daemon.control) as client:
        for byte in json.dumps(PING).encode():
            client.socket.sendall(bytes([byte]))
        client.socket.sendall(b"\n")
        assert client.hear()["ok"]
        client.send(*({"v": 1, "do": f"number {number}"} for number in range(500)))
        answers = [client.hear()["error"] for _ in range(500)]
        assert all(f"no command 'number {number}'" in answer for number, answer in enumerate(answers))


def test_who_has_sent_all_is_still_answered(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    for size, more in ((6, ()), (8, (PING, PING))):
        with Client(daemon.control) as client:
            client.send({"v": 1, "do": "scale", "service": "Upper", "workers": size}, *more)
            client.socket.shutdown(socket.SHUT_WR)
            assert client.hear() == {"ok": True, "workers": {"Upper": size}, "draining": 0}
            assert all(client.hear()["ok"] for _ in more)
            assert client.is_hung_up_on()


def test_a_line_that_is_too_long_ends_the_connection_and_is_told_so(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    with Client(daemon.control) as client, Client(daemon.control) as other:
        longest = json.dumps({"v": 1, "do": "ping", "x": ""})
        client.socket.sendall(longest.replace('""', f'"{"x" * (LONGEST_LINE - len(longest))}"').encode() + b"\n")
        assert "ping takes nothing" in client.hear()["error"]
        try:
            client.socket.sendall(b"x" * (LONGEST_LINE + 1))
            client.socket.sendall(b"x" * 10 * LONGEST_LINE)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert client.hear() == {"ok": False, "error": "a line is at most 65536 bytes long"}
        assert client.is_hung_up_on()
        assert other.ask("ping")["ok"]
    assert daemon.ask(b"still\n") == b"STILL\n"


# Clients who are slow, gone, or too many.


def test_who_is_slow_is_hung_up_on_and_nobody_else(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, "--max-children", "16")
    with ExitStack() as clients:
        begun = monotonic()
        idle, half, deaf, follower = (clients.enter_context(Client(daemon.control)) for _ in range(4))
        half.socket.sendall(b'{"v": 1, "do": "pi')
        deaf.send(*[{"v": 1, "do": "status"}] * 400)  # more than a socket holds
        follower.send({"v": 1, "do": "events", "follow": True})
        with Client(daemon.control) as other:
            assert other.ask("ping")["ok"]
        assert daemon.ask(b"meanwhile\n") == b"MEANWHILE\n"
        assert idle.is_hung_up_on()
        assert half.is_hung_up_on()
        assert PATIENCE - 1 < monotonic() - begun < PATIENCE + 5
        eventually(lambda: _fds_of_sockets_at(daemon) == 2, "the listener and the follower are left")
        heard = deaf.answers.read().splitlines()
        assert 0 < len(heard) < 400
        # Who waits for us is not slow.
        daemon.signal(signal.SIGTTIN)
        while follower.hear().get("event") != "resized":
            pass


def _fds_of_sockets_at(daemon: Daemon) -> int:
    """How many sockets the master has that are bound to its control socket's path, the listener included."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    inodes = {line.split()[6] for line in lines if line.endswith(f" {daemon.control}")}
    return sum(
        _inode_of(f"/proc/{daemon.pid}/fd/{number}") in inodes for number in os.listdir(f"/proc/{daemon.pid}/fd")
    )


def _inode_of(link: str) -> str:
    try:
        return os.readlink(link).removeprefix("socket:[").rstrip("]")
    except OSError:
        return ""


def test_one_more_than_64_clients_is_told_so_until_one_leaves(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    before = daemon.descriptors()
    with ExitStack() as clients:
        all_of_them = [clients.enter_context(Client(daemon.control)) for _ in range(MOST_CLIENTS)]
        assert all(client.ask("ping")["ok"] for client in all_of_them)
        with Client(daemon.control) as late:
            assert late.hear() == {"ok": False, "error": "there are 64 clients already"}
            assert late.is_hung_up_on()
        assert daemon.ask(b"meanwhile\n") == b"MEANWHILE\n"
        all_of_them[0].close()
        eventually(partial(_is_answered, daemon), "room for another")
    eventually(lambda: daemon.descriptors() == before, "all are forgotten")


def _is_answered(daemon: Daemon) -> bool:
    with Client(daemon.control) as client:
        try:
            return bool(client.ask("ping")["ok"])
        except (BrokenPipeError, ConnectionResetError):
            return False


def test_who_leaves_in_the_middle_leaves_nothing_behind(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    before = daemon.descriptors()
    for do in ("stacks", "status", "rubbish", "events"):
        for _ in range(20):
            with Client(daemon.control) as client:
                client.send({"v": 1, "do": do, **({"follow": True} if do == "events" else {})})
                while do == "events" and client.hear().get("event") != "ready":
                    pass
    eventually(lambda: daemon.descriptors() == before, "all are forgotten, though nothing is to be said to them")
    with Client(daemon.control) as client:
        client.send({"v": 1, "do": "scale", "service": "Upper", "workers": 5})
    daemon.log.wait_for("^resized service=Upper workers=5 ")
    eventually(lambda: len(daemon.workers()) == 5)
    eventually(lambda: daemon.descriptors() == before + 2, "all are forgotten, and there is one worker more")
    assert "Traceback" not in daemon.log.text


def test_a_master_out_of_descriptors_answers_when_it_has_some_again(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    with Client(daemon.control) as first:
        assert first.ask("ping")["ok"]
        with limited(daemon.pid, resource.RLIMIT_NOFILE, 3), Client(daemon.control) as late:
            late.send(PING)
            daemon.log.wait_for('^control_refused reason="Too many open files" retry_in=1.0s')
            assert first.ask("ping")["ok"]
            assert daemon.ask(b"meanwhile\n") == b"MEANWHILE\n"
            late.close()
        assert _is_answered(daemon)
    assert len(daemon.log.matches("^control_refused ")) < 5


# Who may ask.


def test_it_is_for_the_daemons_user_alone(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    assert stat.S_IMODE(os.stat(daemon.control).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(daemon.control)).st_mode) == 0o700


def test_another_user_is_refused_even_where_the_file_lets_him_in(serve: Serve) -> None:
    prefix = unprivileged()
    if not prefix:
        pytest.skip("needs root, to be another user than the daemon's")
    daemon = serve(":Upper", *TCP)
    for path in (daemon.runtime, *map(str, Path(daemon.control).parents[:2])):
        os.chmod(path, 0o755)
    os.chmod(daemon.control, 0o666)
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.makefile().read())"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, daemon.control], capture_output=True, text=True, timeout=DEADLINE, cwd="/"
    )
    assert json.loads(done.stdout) == {"v": 1, "ok": False, "error": "only root and the user of the daemon may ask"}
    daemon.log.wait_for(r"^control_refused reason=.* uid=61234")
    with Client(daemon.control) as client:
        assert client.ask("ping")["ok"]


def test_root_may_ask_the_daemon_of_another_user(serve: Serve) -> None:
    prefix = unprivileged()
    daemon = serve("preforkd_workers.samples:Upper", *TCP, prefix=prefix)
    with Client(daemon.control) as client:
        assert client.ask("ping")["ok"]


# Where it is.


def test_the_place_is_the_runtime_directory_of_systemd_or_the_user_or_the_system() -> None:
    assert directories("mail", {"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/run/user/1"}) == ["/run/a"]
    assert directories("mail", {"XDG_RUNTIME_DIR": "/run/user/1"}) == [
        "/run/user/1/preforkd/mail",
        "/run/preforkd/mail",
    ]
    assert directories("mail", {"XDG_RUNTIME_DIR": "relative"}) == ["/run/preforkd/mail"]
    assert directories("../../etc", {}) == ["/run/preforkd/_.._etc"]
    assert directories("..", {}) == ["/run/preforkd/preforkd"]
    place = control_place("mail", "", {})
    assert (place.path, place.is_configured) == ("/run/preforkd/mail/control.sock", False)
    place = control_place("mail", "/x.sock", {"RUNTIME_DIRECTORY": "/run/a"})
    assert (place.path, place.is_configured) == ("/x.sock", True)


def test_systemds_runtime_directory_is_used_as_it_is(serve: Serve, tmp_path: Path) -> None:
    directory = tmp_path / "given"
    directory.mkdir(mode=0o755)
    daemon = serve(":Upper", *TCP, environment={"RUNTIME_DIRECTORY": f"{directory}:/elsewhere"})
    assert daemon.control == f"{directory}/control.sock"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_a_path_may_be_longer_than_an_address(serve: Serve, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    daemon = serve(":Upper", *TCP, "--control", deep / "x.sock")
    assert daemon.control == f"{deep}/x.sock"
    assert daemon.ctl("ping").returncode == 0
    assert stat.S_IMODE(os.stat(daemon.control).st_mode) == 0o600
    daemon.stop()
    assert os.listdir(deep) == []
    os.chdir(tmp_path)


def test_the_file_is_removed_at_the_end_and_only_if_it_is_ours(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    path = daemon.control
    daemon.stop()
    assert not os.path.exists(path)
    second = serve(":Upper", *TCP)
    os.unlink(second.control)
    Path(second.control).write_text("somebody else's")
    second.stop()
    assert Path(second.control).read_text() == "somebody else's"


def test_a_stale_file_is_replaced(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    daemon = serve(":Upper", *TCP, "--control", path)
    with Client(str(path)) as client:
        assert client.ask("ping")["pid"] == daemon.pid


def _live(path: Path) -> socket.socket:
    live = socket.socket(socket.AF_UNIX)
    live.bind(str(path))
    live.listen()
    return live


def _other_file(path: Path) -> ExitStack:
    path.write_text("precious")
    return ExitStack()


def _no_directory(path: Path) -> ExitStack:
    path.parent.rmdir()
    return ExitStack()


CANNOT = [
    (_live, "another process listens there"),
    (_other_file, "a file that is no socket is there"),
    (_no_directory, "no such directory"),
]


@pytest.mark.parametrize(("obstacle", "reason"), CANNOT)
def test_a_configured_socket_that_cannot_be_made_is_one_line_and_status_1(
    serve: Serve, tmp_path: Path, obstacle: Callable[[Path], Any], reason: str
) -> None:
    path = tmp_path / "d" / "x.sock"
    path.parent.mkdir()
    with obstacle(path):
        daemon = serve(":Upper", *TCP, "--control", path, ready=False)
        assert daemon.wait() == 1
        daemon.log.finish()
        (line,) = daemon.log.lines
        assert line.startswith(f'cannot_start reason="control: unix:{path}: ')
        assert reason in line


@pytest.mark.parametrize(("obstacle", "reason"), CANNOT[:2])
def test_a_default_socket_that_cannot_be_made_is_one_warning(
    serve: Serve, tmp_path: Path, obstacle: Callable[[Path], Any], reason: str
) -> None:
    path = tmp_path / "control.sock"
    with obstacle(path):
        daemon = serve(":Upper", *TCP, environment={"RUNTIME_DIRECTORY": str(tmp_path)})
        (warning,) = daemon.log.matches("^no_control ")
        assert f"unix:{path}: " in warning.string
        assert reason in warning.string
        assert daemon.ask(b"still\n") == b"STILL\n"


def test_a_runtime_directory_that_cannot_be_made_is_one_warning(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "preforkd").write_text("no directory")
    daemon = serve(":Upper", *TCP, environment={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert len(daemon.log.matches("^no_control ")) == 1
    assert daemon.ask(b"still\n") == b"STILL\n"


def test_a_name_that_is_too_long_is_told() -> None:
    with pytest.raises(ListenError, match="too long"):
        listen(f"/tmp/{'x' * 200}")


# The signal that drains.


def test_sigwinch_drains_the_workers_and_refills_them(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    daemon.signal(signal.SIGWINCH)
    eventually(lambda: not daemon.workers())
    with daemon.connect() as client:
        client.sendall(b"patience\n")
        daemon.signal(signal.SIGTTIN)  # is of no effect on what is drained
        daemon.signal(signal.SIGUSR1)
        daemon.log.wait_for("^service service=Upper workers=0 ")
        daemon.signal(signal.SIGWINCH)
        assert client.recv(100) == b"PATIENCE\n"
    daemon.log.wait_for("^worker_ready ", 8)
    eventually(lambda: len(daemon.workers()) == 4)
    assert daemon.stop() == 0


def test_the_window_of_a_terminal_may_change_its_size(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    code = "import fcntl, os, runpy, sys, termios\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    code += "sys.argv[0] = 'preforkd'\nrunpy.run_module('preforkd', run_name='__main__')"
    command = [sys.executable, "-c", code, "serve", f"{TARGETS}:Upper", *TCP]
    daemon = subprocess.Popen(
        command, stdin=theirs, stderr=subprocess.PIPE, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    )
    said = Log(daemon.stderr)
    try:
        said.wait_for("^ready")
        os.close(theirs)
        os.kill(daemon.pid, signal.SIGWINCH)
        os.kill(daemon.pid, signal.SIGTTIN)
        said.wait_for("^resized")
        assert not said.matches("^draining")
    finally:
        daemon.terminate()
        assert daemon.wait(DEADLINE) == 0
        said.close()
        os.close(ours)


# The server by itself.


@contextmanager
def controlled(
    tmp_path: Path, answer: Callable[[Request], object]
) -> Iterator[tuple[Control, str, Callable[[], None]]]:
    """A control socket in this process, its path, and one turn of its loop."""
    bound = listen(str(tmp_path / "x.sock"))
    with selectors.DefaultSelector() as selector:
        control = Control(bound.listener.socket, selector, answer)

        def turn() -> None:
            for key, _ in selector.select(max(0.0, min(control.wake_at() - monotonic(), DEADLINE))):
                key.data()
            control.settle()

        control.settle()

        yield control, str(tmp_path / "x.sock"), turn
        control.close()
        assert not selector.get_map()
    bound.close()


def test_a_follower_who_does_not_read_is_hung_up_on_before_he_costs_more_than_4_mib(tmp_path: Path) -> None:
    def follow(request: Request) -> None:
        hear = lambda record: request.tell(**record)  # noqa: E731 - to be removed again
        log.followers.append(hear)
        request.at_end(lambda: log.followers.remove(hear))

    with controlled(tmp_path, follow) as (control, path, turn), Client(path) as client:
        client.send({"v": 1, "do": "events"})
        while not log.followers:
            turn()
        for _ in range(100):
            log.text("x", "y" * 100_000)
            (unsent,) = [len(each.unsent) for each in control.clients] or [0]
            assert unsent <= LONGEST_OUTPUT
        assert not control.clients
        assert not log.followers


def test_who_follows_is_the_masters_and_not_its_childrens() -> None:
    code = "import os; from preforkd import log; log.followers.append(print); child = os.fork()\n"
    code += "if child: os.waitpid(child, 0)\nlog.event('x', of=os.getpid())\nprint(os.getpid(), flush=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    child, record, parent = done.stdout.splitlines()
    assert child != parent
    assert f"'of': {parent}" in record


def test_a_fault_of_ours_is_the_answer_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controlled(tmp_path, lambda request: 1 // 0) as (control, path, turn), Client(path) as client:
        client.send(PING)
        while not capsys.readouterr().err.startswith("control| Traceback"):
            turn()
        assert "ZeroDivisionError" in client.hear()["error"]
        assert control.clients


def test_what_is_waited_for_has_a_deadline(tmp_path: Path) -> None:
    def never(request: Request) -> None:
        request.wait(lambda: None, monotonic() + 0.05, lambda: request.fail("too late"))

    with controlled(tmp_path, never) as (_, path, turn), Client(path) as client:
        client.send(PING)
        while not _readable(client):
            turn()
        assert client.hear() == {"ok": False, "error": "too late"}


def _readable(client: Client) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(client.socket, selectors.EVENT_READ)
        return bool(selector.select(0))


def test_the_peer_is_known_by_its_credentials(tmp_path: Path) -> None:
    peers = []
    with controlled(tmp_path, lambda request: peers.append(request.peer)) as (_, path, turn), Client(path) as client:
        client.send(PING)
        while not peers:
            turn()
    assert (peers[0].pid, peers[0].uid, peers[0].gid) == (os.getpid(), os.getuid(), os.getgid())
    assert struct.calcsize("=iII") == 12
