"""The fcgi-program that we ship for supervisord: it binds, and two daemons serve the same socket."""

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import TARGETS
from tests.daemon import DEADLINE, eventually, preforkctl
from tests.namespace import namespace
from tests.supervisor.conftest import Supervise
from tests.supervisor.daemon import Supervisor, needs, unused_port
from tests.systemd.unit import Clients, ask_stream, metrics

FILE = "preforkd-fcgi.conf"
MASTERS = "x:x_0", "x:x_1"

UPPER = f"""
[services.Upper]
target = "{TARGETS}:Upper"
listen = ["fd:0"]
probation = "0s"
"""
TALKER = UPPER.replace(f"{TARGETS}:Upper", f"{Path(__file__).parent}/targets.py:Talker")

Ask = Callable[[], bytes]


def tcp(port: int) -> dict[str, object]:
    return {"socket": f"tcp://127.0.0.1:{port}"}


def exporters(supervisor: Supervisor) -> list[int]:
    """The ports of the masters' metrics."""
    said = [supervisor.log(master).wait_for(r"^listening service=metrics url=tcp://\S+:(\d+)") for master in MASTERS]
    return [int(match[1]) for match in said]


def both_are_ready(supervisor: Supervisor, times: int = 1) -> None:
    for master in MASTERS:
        supervisor.log(master).wait_for("^ready ", times)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_restarts_one_after_the_other_refuse_and_cut_nobody(deploy: Supervise, tmp_path: Path, kind: str) -> None:
    port = unused_port()
    socket_file = f"{tmp_path}/x"
    ways: dict[str, tuple[dict[str, object], Ask]] = {
        "tcp": (tcp(port), partial(ask_stream, ("127.0.0.1", port))),
        "unix": ({"socket": f"unix://{socket_file}"}, partial(ask_stream, socket_file, socket.AF_UNIX)),
    }
    options, ask = ways[kind]
    supervisor = deploy(UPPER, FILE, options)
    both_are_ready(supervisor)
    with Clients(ask, b"QUESTION\n") as clients:
        clients.until_answered(100)
        for master in MASTERS:
            before = supervisor.pid(master)
            assert supervisor.ctl("restart", master).stdout.splitlines()[-1] == f"{master}: started"
            assert supervisor.pid(master) != before
            clients.until_answered(100)
        outcomes = clients.stop()
    assert outcomes == {"answered": outcomes["answered"]}


def test_a_killed_master_costs_nothing(deploy: Supervise) -> None:
    """Its workers finish what they hold, those of the other one serve, and supervisord starts it again."""
    port = unused_port()
    supervisor = deploy(UPPER, FILE, tcp(port))
    both_are_ready(supervisor)
    for master in MASTERS:
        name = master.partition(":")[2]
        supervisor.said.wait_for(f"success: {name} entered RUNNING")
    with Clients(partial(ask_stream, ("127.0.0.1", port)), b"QUESTION\n", number=4) as clients:
        for master in MASTERS:
            clients.until_answered(100)
            os.kill(supervisor.pid(master), signal.SIGKILL)
            supervisor.log(master).wait_for("^ready ", times=2)
        clients.until_answered(100)
        outcomes = clients.stop()
    assert outcomes == {"answered": outcomes["answered"]}


def test_each_has_a_name_a_control_socket_and_metrics_of_its_own(deploy: Supervise) -> None:
    port = unused_port()
    supervisor = deploy(UPPER, FILE, tcp(port))
    both_are_ready(supervisor)
    asked = 50
    for _ in range(asked):
        assert ask_stream(("127.0.0.1", port)) == b"QUESTION\n"
    for number, master in enumerate(MASTERS):
        done = preforkctl(f"x-{number}", "ping", "--json", environment=supervisor.environment)
        said = json.loads(done.stdout)
        assert (said["name"], said["pid"]) == (f"x-{number}", supervisor.pid(master))
        assert not supervisor.log(master).matches("no_control")
    ok = 'preforkd_requests_total{outcome="ok",service="Upper"}'
    eventually(lambda: sum(metrics(each)[ok] for each in exporters(supervisor)) == asked, "all are counted")


def test_reloads_and_upgrades_of_each_refuse_and_cut_nobody(deploy: Supervise) -> None:
    port = unused_port()
    supervisor = deploy(UPPER, FILE, tcp(port))
    both_are_ready(supervisor)
    pids = [supervisor.pid(master) for master in MASTERS]
    with Clients(partial(ask_stream, ("127.0.0.1", port)), b"QUESTION\n", number=4) as clients:
        for verb in ("reload", "upgrade"):
            for number in range(2):
                clients.until_answered(100)
                done = preforkctl(f"x-{number}", verb, environment=supervisor.environment)
                assert done.returncode == 0, done.stderr
        clients.until_answered(100)
        outcomes = clients.stop()
    assert outcomes == {"answered": outcomes["answered"]}
    assert [supervisor.pid(master) for master in MASTERS] == pids


def test_who_serves_alone_is_woken_for_every_connection(deploy: Supervise) -> None:
    """One client at a time: nobody else would wake a worker that has slept through its connection."""
    port = unused_port()
    supervisor = deploy(UPPER, FILE, tcp(port))
    both_are_ready(supervisor)
    with Clients(partial(ask_stream, ("127.0.0.1", port)), b"QUESTION\n", number=1) as clients:
        for master in MASTERS:
            clients.until_answered(20)
            supervisor.ctl("stop", master)
            clients.until_answered(20)
            with supervisor.rpc as rpc:
                rpc.supervisor.startProcess(master, False)
            supervisor.log(master).wait_for("^ready ", times=2)
        clients.until_answered(20)
        outcomes = clients.stop()
    assert outcomes == {"answered": outcomes["answered"]}


def test_the_listener_is_nobodys_standard_input(deploy: Supervise) -> None:
    port = unused_port()
    supervisor = deploy(TALKER, FILE, tcp(port))
    both_are_ready(supervisor)
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(b"stdin\n")
        assert answers.readline() == b"/dev/null\n"
    master = supervisor.pid(MASTERS[0])
    assert os.readlink(f"/proc/{master}/fd/0") == "/dev/null"
    done = preforkctl("x-0", "upgrade", environment=supervisor.environment)
    assert done.returncode == 0, done.stderr
    assert os.readlink(f"/proc/{master}/fd/0") == "/dev/null"


def test_a_low_port_for_a_user_without_any_right_to_it(deploy: Supervise) -> None:
    needs("nobody")
    with namespace():
        assert int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) > 80
        supervisor = deploy(TALKER, FILE, {**tcp(80), "user": "nobody"})
        both_are_ready(supervisor)
        with socket.create_connection(("127.0.0.1", 80), DEADLINE) as client, client.makefile("rb") as answers:
            client.sendall(b"print hello\n")
            assert answers.readline() == b"done\n"
    for pid in supervisor.family():
        assert os.stat(f"/proc/{pid}").st_uid == pwd.getpwnam("nobody").pw_uid
    for number, master in enumerate(MASTERS):
        assert not supervisor.log(master).matches("no_control")
        assert preforkctl(f"x-{number}", "ping", environment=supervisor.environment).returncode == 0


def test_a_killed_supervisord_leaves_nobody_on_the_socket_when_the_last_has_drained(deploy: Supervise) -> None:
    port = unused_port()
    supervisor = deploy(UPPER, FILE, tcp(port))
    both_are_ready(supervisor)
    supervisor.kill()
    eventually(lambda: not supervisor.family(), "all have drained")
    supervisor.start()
    both_are_ready(supervisor, times=2)
    assert ask_stream(("127.0.0.1", port)) == b"QUESTION\n"


def test_a_check_in_a_shell_does_not_mind_that_nothing_is_passed_yet(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(UPPER)
    command = [sys.executable, "-m", "preforkd", "check", "-c", "x.toml"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for passed, said in ((subprocess.DEVNULL, ""), (listener.fileno(), " family=AF_INET type=SOCK_STREAM")):
            done = subprocess.run(command, cwd=tmp_path, stdin=passed, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.splitlines()[1] == f"service=Upper listen=fd:0{said}"
