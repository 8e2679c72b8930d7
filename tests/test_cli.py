"""The command line: what it takes, what it answers, and its exit statuses."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from preforkd import settings
from tests.conftest import TARGETS, Serve
from tests.daemon import DEADLINE, Daemon, eventually

TCP = ("--listen", "tcp://127.0.0.1:0")
UPPER = (f"{TARGETS}:Upper", *TCP)


def run(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of ``preforkd ARGUMENTS``."""
    command = [sys.executable, "-m", "preforkd", *arguments]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=DEADLINE)
    return done.returncode, done.stdout, done.stderr


# Usage and settings.


def test_the_installed_command_is_the_module(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "preforkd"
    if not command.exists():
        pytest.skip("this interpreter has no scripts beside it")
    done = subprocess.run([command, "settings"], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout, done.stderr) == run(tmp_path, "settings")


def test_settings_prints_the_reference(tmp_path: Path) -> None:
    assert run(tmp_path, "settings") == (0, settings.reference() + "\n", "")


def test_who_reads_no_further_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "preforkd", "settings"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("sereve",),
        ("serve", "--listen"),
        ("serve", "--no-such-option"),
        ("settings", "x"),
        ("serve", "a:b", "c:d"),
        ("serve", "-c", "x.toml", "a:b"),
        ("check", "-c", "x.toml", *TCP),
    ],
)
def test_wrong_usage_is_status_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, out, error = run(tmp_path, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("usage: preforkd")


@pytest.mark.parametrize("command", ["serve", "check"])
def test_wrong_settings_are_status_78_with_every_fault_from_every_place(tmp_path: Path, command: str) -> None:
    arguments = ("a:B", *TCP, "--max-children", "0", "--kind", "x", "--metrics", "y", "--set", "z=1", "--ready-fd", "a")
    environment = {"PREFORKD_PRELOAD": "maybe"}
    assert run(tmp_path, command, *arguments, environment=environment) == (
        78,
        "",
        "preforkd: PREFORKD_PRELOAD: true or false, not 'maybe'\n"
        "preforkd: --kind: one of gevent, process, thread, not 'x'\n"
        "preforkd: --max-children: at least 1, not '0'\n"
        "preforkd: --ready-fd: a whole number, not 'a'\n"
        "preforkd: --set z: unknown setting 'z'\n"
        "preforkd: metrics: y: want one of tcp, udp, unix, unix-dgram, fd\n",
    )


def test_a_target_without_an_address_and_a_file_that_is_missing_are_status_78(tmp_path: Path) -> None:
    status, _, error = run(tmp_path, "serve", "a:B")
    assert (status, error) == (
        78,
        "preforkd: services.B.listen: at least one address, such as tcp://127.0.0.1:9999\n",
    )
    assert run(tmp_path, "serve", "-c", "x.toml") == (78, "", "preforkd: x.toml: No such file or directory\n")


# check


def test_check_says_what_it_has_found_and_binds_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        urls = [f"tcp://127.0.0.1:{taken.getsockname()[1]}", f"unix:{tmp_path}/x", "tcp://[::1]:0"]
        status, out, error = run(tmp_path, "check", UPPER[0], *(f"--listen={url}" for url in urls))
    assert (status, error) == (0, "")
    assert out.splitlines() == [
        f"service=Upper target={TARGETS}:Upper is a handler class",
        f"service=Upper listen={urls[0]} family=AF_INET type=SOCK_STREAM",
        f"service=Upper listen={urls[1]} family=AF_UNIX type=SOCK_STREAM",
        f"service=Upper listen={urls[2]} family=AF_INET6 type=SOCK_STREAM",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ((":UpperDatagram", "--listen=udp://127.0.0.1:0"), "handler class"),
        ((":ThreadingObeyServer", "--handler=:Obey", *TCP), "server class"),
        ((":recording", *TCP), "factory"),
        ((":instance", *TCP), "server instance"),
        (("preforkd_workers.samples:Clock", *TCP), "handler class"),
    ],
)
def test_check_says_what_kind_of_target_it_is(tmp_path: Path, words: tuple[str, ...], kind: str) -> None:
    arguments = [re.sub(r"(^|=):", rf"\1{TARGETS}:", word) for word in words]
    status, out, error = run(tmp_path, "check", *arguments, environment={"INSTANCE": "1"})
    assert (status, error) == (0, "")
    assert out.splitlines()[0].endswith(f" is a {kind}")


def test_check_prints_every_fault_of_every_target(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("1 / 0")
    (tmp_path / "exits.py").write_text("import os; os._exit(3)")
    (tmp_path / "hangs.py").write_text("import signal; signal.pause()")
    (tmp_path / "c.toml").write_text(
        "".join(
            f'[services.{name}]\ntarget = "{target}"\nlisten = ["{listen}"]\nboot_timeout = {timeout}\n'
            for name, target, listen, timeout in [
                ("good", UPPER[0], "tcp://127.0.0.1:0", 30),
                ("missing", "nowhere:Upper", "tcp://127.0.0.1:0", 30),
                ("raises", "raises:Upper", "tcp://127.0.0.1:0", 30),
                ("exits", "exits:Upper", "tcp://127.0.0.1:0", 30),
                ("hangs", "hangs:Upper", "tcp://127.0.0.1:0", 0.5),
                ("misfit", UPPER[0], "udp://127.0.0.1:0", 30),
                ("closed", UPPER[0], "fd:99", 30),
            ]
        )
    )
    status, out, error = run(tmp_path, "check", "-c", "c.toml")
    assert status == 78
    assert [line.split()[0] for line in out.splitlines()] == ["service=good", "service=good"]
    said = dict(re.findall(r"(?m)^preforkd: services\.(\w+): (.*)$", error))
    assert said == {
        "missing": f"no module named 'nowhere' in {tmp_path} or elsewhere on sys.path",
        "raises": "Traceback (most recent call last):",
        "exits": "the import ended the process",
        "hangs": "the import takes longer than boot_timeout",
        "misfit": f"{UPPER[0]} is a StreamRequestHandler, which cannot serve udp://127.0.0.1:0",
        "closed": "fd:99: no such descriptor is open; have whoever starts this pass it",
    }
    assert error.count("Traceback") == 1
    assert error.count("ZeroDivisionError") == 1


# serve


def test_without_a_target_a_sample_is_served_and_it_says_so(serve: Serve) -> None:
    """On its well-known ports, or, where somebody has them, with a message that says so."""
    daemon = serve(ready=False)
    if daemon.log.wait_for("^(ready|cannot_start)")[1] == "ready":
        assert daemon.url("Upper") == "tcp://127.0.0.1:9999"
        assert daemon.url("metrics") == "tcp://127.0.0.1:9109"
        assert daemon.ask(b"a\nb\n") == b"A\nB\n"
        assert daemon.metrics()['preforkd_workers_max{service="Upper"}'] == 4
    assert daemon.log.lines[0].startswith("sample target=preforkd_workers.samples:Upper advice=")


def test_without_a_target_the_sample_may_be_served_elsewhere(serve: Serve) -> None:
    daemon = serve(*TCP, "--metrics", "tcp://127.0.0.1:0")
    assert daemon.ask(b"a\n") == b"A\n"
    assert daemon.address("metrics")[1] != 9109
    assert daemon.log.matches("^sample ")


def test_several_services_in_one_file(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "mail.toml").write_text(f"""
        metrics = "tcp://127.0.0.1:0"
        [services.lines]
        target = "{TARGETS}:Upper"
        listen = ["tcp://127.0.0.1:0", "unix:lines.sock"]
        max_children = 3
        [services.pids]
        target = "{TARGETS}:Pid"
        listen = ["tcp://127.0.0.1:0"]
    """)
    daemon = serve("-c", "mail.toml", "--max-children", "2", environment={"PREFORKD_SERVICES__PIDS__PRELOAD": "false"})
    assert daemon.ask(b"a\n", "lines") == b"A\n"
    assert int(daemon.ask(b"", "pids")) in daemon.titled("worker pids#")
    assert len(daemon.titled("worker lines#")) == len(daemon.titled("worker pids#")) == 2
    assert Path(f"/proc/{daemon.pid}/cmdline").read_bytes().startswith(b"preforkd: master mail\0")
    for service in ("lines", "pids"):
        eventually(lambda: daemon.metrics()[f'preforkd_requests_total{{outcome="ok",service="{service}"}}'] == 1)  # noqa: B023 - called at once


def test_a_module_is_found_in_the_working_directory_and_beside_a_file(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(f"from neighbour import H\nassert {str(tmp_path)!r}")
    (tmp_path / "neighbour.py").write_text("from preforkd_workers.samples import Upper as H")
    assert serve("app:H", *TCP).ask(b"a\n") == b"A\n"
    (tmp_path / "deep").mkdir()
    (tmp_path / "app.py").rename(tmp_path / "deep" / "app.py")
    (tmp_path / "neighbour.py").rename(tmp_path / "deep" / "neighbour.py")
    daemon = serve("deep/app.py:H", *TCP)
    assert daemon.ask(b"a\n") == b"A\n"
    assert daemon.log.matches("^listening service=H ")


# Ready, in every way that a supervisor may want.


def test_a_service_manager_that_does_not_listen_is_no_reason_not_to_serve(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(*UPPER, environment={"NOTIFY_SOCKET": f"{tmp_path}/nobody"})
    assert daemon.ask(b"a\n") == b"A\n"


def test_ready_is_a_newline_on_the_ready_fd_and_nobody_keeps_it_open(serve: Serve) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as announced:
        daemon = serve(*UPPER, "--ready-fd", writer, pass_fds=[writer], ready=False)
        os.close(writer)
        assert announced.read() == b"\n"
        assert len(daemon.titled("worker Upper#")) == 4


def test_ready_is_logged_once_when_every_worker_is(serve: Serve) -> None:
    daemon = serve(*UPPER, "--max-children", "7")
    before = daemon.log.lines[: [line.startswith("ready ") for line in daemon.log.lines].index(True)]
    assert sum(line.startswith("worker_ready ") for line in before) == 7
    assert daemon.stop() == 0
    assert len(daemon.log.matches("^ready ")) == 1


# Signals are held from the first moment on.


def is_held(daemon: Daemon, number: signal.Signals) -> bool:
    blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{daemon.pid}/status").read_text())
    return blocked is not None and bool(int(blocked[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (signal.SIGHUP, "^reload_started gen=2 services=Upper"),
        (signal.SIGUSR2, "^upgrade_preflight "),
        (signal.SIGUSR1, "^service service=Upper"),
        (signal.SIGTTIN, "^resized service=Upper workers=5 before=4"),
    ],
)
def test_a_signal_during_start_up_is_answered_and_does_not_kill(
    serve: Serve, number: signal.Signals, answer: str
) -> None:
    daemon = serve(*UPPER, ready=False)
    eventually(lambda: is_held(daemon, number))
    daemon.signal(number)
    daemon.log.wait_for(answer)
    daemon.ready()
    assert daemon.ask(b"a\n") == b"A\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_stop_during_start_up_stops_as_asked(serve: Serve, number: signal.Signals) -> None:
    daemon = serve(*UPPER, ready=False)
    eventually(lambda: is_held(daemon, number))
    assert daemon.stop(number) == 0
    assert daemon.log.matches("^stopped status=0")
    assert not daemon.log.matches("^ready")
