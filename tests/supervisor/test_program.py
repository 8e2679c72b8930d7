"""The program that we ship for supervisord: what becomes of a daemon there."""

import os
import pwd
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from preforkd.roster import EXPORTER_SERVICE
from preforkd.settings import Service
from tests.conftest import TARGETS
from tests.daemon import DEADLINE, eventually, preforkctl
from tests.supervisor.conftest import Supervise
from tests.supervisor.daemon import Supervisor, needs, shipped, unused_port

OBEY = f"""
[services.Obey]
target = "{TARGETS}:Obey"
listen = ["tcp://127.0.0.1:0"]
probation = "0s"
"""

TALKER = OBEY.replace(f"{TARGETS}:Obey", f"{Path(__file__).parent}/targets.py:Talker")

VERSION = """
from socketserver import StreamRequestHandler

class Version(StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"{}\\n")
"""

# What may fail at a start, with its exit status.
FAILING = {
    78: ("no_such_setting = 1\n" + OBEY, r"^preforkd: .*no_such_setting"),
    70: (OBEY.replace(":Obey", ":Nobody"), "^boot_failed .*:Nobody"),
}


def ask(supervisor: Supervisor, question: bytes) -> bytes:
    with socket.create_connection(supervisor.address("x"), DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(question)
        return answers.readline()


@contextmanager
def held_request(supervisor: Supervisor) -> Iterator[tuple[socket.socket, BinaryIO]]:
    """A request that ends when its client says so."""
    with socket.create_connection(supervisor.address("x"), DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(b"until_eof\n")
        assert answers.readline() == b"waiting\n"
        yield client, answers


def finish(client: socket.socket, answers: BinaryIO) -> None:
    """The worker that held the request has gone on with it to the end."""
    client.shutdown(socket.SHUT_WR)
    assert answers.readline() == b"eof after 0\n"


def ctl(supervisor: Supervisor, *words: object) -> str:
    """What ``preforkctl x WORDS`` prints, found by the name as an operator would."""
    done = preforkctl("x", *words, environment=supervisor.environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_serves_and_is_running_after_startsecs(deploy: Supervise) -> None:
    supervisor = deploy(OBEY)
    assert supervisor.state("x") == "STARTING"
    assert ask(supervisor, b"say hello\n") == b"hello\n"
    supervisor.said.wait_for(r"success: x entered RUNNING state.*\b5 seconds")
    assert f"pid {supervisor.pid('x')}" in supervisor.ctl("status", "x").stdout
    assert ctl(supervisor, "status").startswith("x: preforkd ")


@pytest.mark.parametrize("status", FAILING)
def test_a_start_that_fails_is_fatal_at_the_fourth_time(deploy: Supervise, status: int) -> None:
    settings, said = FAILING[status]
    supervisor = deploy(settings)
    supervisor.said.wait_for(r"gave up: x entered FATAL state", deadline=40)
    assert len(supervisor.said.matches(rf"exited: x \(exit status {status}; not expected\)")) == 4
    supervisor.log("x").wait_for(said, times=4)


def test_a_start_that_fails_late_for_good_is_not_tried_again(deploy: Supervise, tmp_path: Path) -> None:
    """Later than startsecs, which is shorter here. The first start that supervisord calls a success stays the only."""
    (tmp_path / "late.py").write_text("import time\ntime.sleep(2)\nraise ValueError('too late')\n")
    supervisor = deploy(
        '[services.x]\ntarget = "late.py:x"\nlisten = ["tcp://127.0.0.1:0"]\n', options={"startsecs": 1}
    )
    supervisor.said.wait_for(r"exited: x \(exit status 70; expected\)")
    with supervisor.rpc as rpc:  # an answer comes after a whole turn of its loop
        for _ in range(3):
            assert rpc.supervisor.getProcessInfo("x")["statename"] == "EXITED"
    assert len(supervisor.said.matches("spawned: 'x'")) == 1


def test_a_stop_drains(deploy: Supervise) -> None:
    supervisor = deploy(OBEY)
    with held_request(supervisor) as (client, answers):
        with supervisor.rpc as rpc:
            assert rpc.supervisor.stopProcess("x", False)
        supervisor.log("x").wait_for("^stopping haste=none")
        assert supervisor.state("x") == "STOPPING"
        finish(client, answers)
    supervisor.said.wait_for(r"stopped: x \(exit status 0\)")
    eventually(lambda: not supervisor.family(), "nobody is left")


def test_a_stop_leaves_their_time_to_programs_of_handlers(deploy: Supervise) -> None:
    supervisor = deploy(TALKER)
    address = supervisor.address("x")
    with socket.create_connection(address, DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(b"cat\n")
        eventually(lambda: "cat" in supervisor.commands(), "the program runs")
        with supervisor.rpc as rpc:
            rpc.supervisor.stopProcess("x", False)
        supervisor.log("x").wait_for("^stopping haste=none")
        client.sendall(b"hello\n")
        client.shutdown(socket.SHUT_WR)
        assert answers.readline() == b"hello\n"
    supervisor.said.wait_for(r"stopped: x \(exit status 0\)")


def test_supervisord_waits_longer_than_any_stop_takes() -> None:
    exporter = EXPORTER_SERVICE.graceful_timeout + EXPORTER_SERVICE.eof_timeout
    defaults = Service(target="x")
    for file, section in (("preforkd.conf", "program:x"), ("preforkd-fcgi.conf", "fcgi-program:x")):
        patience = int(str(shipped(file)[section]["stopwaitsecs"]))
        assert patience >= defaults.graceful_timeout + defaults.eof_timeout + exporter + 2  # KILL_TIMEOUT of each


def test_who_does_not_leave_in_time_is_killed_and_takes_nobody_with_it_into_the_next_start(deploy: Supervise) -> None:
    supervisor = deploy(OBEY, options={"stopwaitsecs": 1})
    with held_request(supervisor) as (_, answers):
        assert supervisor.ctl("stop", "x").stdout == "x: stopped\n"
        supervisor.said.wait_for(r"stopped: x \(terminated by SIGKILL\)")
        eventually(lambda: not supervisor.family(), "the workers as well: killasgroup")
        assert answers.readline() == b""
    supervisor.ctl("start", "x")
    assert not supervisor.log("x").matches("^takeover_waits")


def test_without_killasgroup_the_next_start_waits_for_the_workers_that_were_left(deploy: Supervise) -> None:
    """Before there was a lock it found the address in use, again and again."""
    port = unused_port()
    supervisor = deploy(OBEY.replace(":0", f":{port}"), options={"stopwaitsecs": 1, "killasgroup": "false"})
    with held_request(supervisor) as (client, answers):
        assert supervisor.ctl("stop", "x").stdout == "x: stopped\n"
        with supervisor.rpc as rpc:
            rpc.supervisor.startProcess("x", False)
        supervisor.log("x").wait_for("^takeover_waits ")
        finish(client, answers)
    supervisor.log("x").wait_for("^ready ", times=2)
    assert ask(supervisor, b"say hello\n") == b"hello\n"
    assert not supervisor.log("x").matches("in use")


def test_workers_that_were_left_and_stay_for_long_do_not_make_it_fatal(deploy: Supervise) -> None:
    """As the wait for them takes longer than startsecs, supervisord tries again, for as long as it takes."""
    port = unused_port()
    settings = "takeover_timeout = 2\n" + OBEY.replace(":0", f":{port}")
    supervisor = deploy(settings, options={"stopwaitsecs": 1, "killasgroup": "false", "startsecs": 1})
    with held_request(supervisor) as (client, answers):
        supervisor.ctl("stop", "x")
        with supervisor.rpc as rpc:
            rpc.supervisor.startProcess("x", False)
        supervisor.said.wait_for(r"exited: x \(exit status 1; not expected\)", times=2)
        finish(client, answers)
    supervisor.log("x").wait_for("^ready ", times=2)
    assert not supervisor.said.matches("FATAL")


def test_a_killed_master_is_started_again_and_waits_for_the_workers_of_the_old_one(deploy: Supervise) -> None:
    port = unused_port()
    supervisor = deploy(OBEY.replace(":0", f":{port}"))
    supervisor.said.wait_for("success: x entered RUNNING")
    before = supervisor.pid("x")
    with held_request(supervisor) as (client, answers):
        os.kill(before, signal.SIGKILL)
        supervisor.said.wait_for(r"exited: x \(terminated by SIGKILL; not expected\)")
        supervisor.log("x").wait_for("^takeover_waits ")
        finish(client, answers)
    supervisor.log("x").wait_for("^ready ", times=2)
    assert ask(supervisor, b"say hello\n") == b"hello\n"
    assert supervisor.pid("x") != before


def test_a_reload_by_signal_and_by_preforkctl(deploy: Supervise, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(VERSION.format(1))
    supervisor = deploy(OBEY.replace(f"{TARGETS}:Obey", "app.py:Version"))
    assert ask(supervisor, b"") == b"1\n"
    (tmp_path / "app.py").write_text(VERSION.format(22))
    assert supervisor.ctl("signal", "HUP", "x").stdout == "x: signalled\n"
    supervisor.log("x").wait_for("^reload_done gen=2")
    assert ask(supervisor, b"") == b"22\n"
    (tmp_path / "app.py").write_text("no python")
    done = preforkctl("x", "reload", environment=supervisor.environment)
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr
    assert ask(supervisor, b"") == b"22\n"


def test_an_upgrade_goes_unnoticed(deploy: Supervise) -> None:
    supervisor = deploy(OBEY)
    supervisor.said.wait_for("success: x entered RUNNING")
    before = supervisor.pid("x")
    with held_request(supervisor) as (client, answers):
        assert "upgrade: done" in ctl(supervisor, "upgrade")
        finish(client, answers)
    assert ask(supervisor, b"say hello\n") == b"hello\n"
    assert (supervisor.pid("x"), supervisor.state("x")) == (before, "RUNNING")
    assert ctl(supervisor, "stop") == "stopping\n"
    supervisor.said.wait_for(r"exited: x \(exit status 0; expected\)")


def test_a_restart_drains_and_starts(deploy: Supervise) -> None:
    supervisor = deploy(OBEY)
    with ThreadPoolExecutor() as aside, held_request(supervisor) as (client, answers):
        restart = aside.submit(supervisor.ctl, "restart", "x")
        supervisor.log("x").wait_for("^stopping haste=none")
        finish(client, answers)
        assert restart.result(DEADLINE).stdout == "x: stopped\nx: started\n"
    supervisor.log("x").wait_for("^ready ", times=2)
    assert ask(supervisor, b"say hello\n") == b"hello\n"


def test_a_killed_supervisord_leaves_a_daemon_that_drains_for_the_next_one(deploy: Supervise) -> None:
    port = unused_port()
    supervisor = deploy(OBEY.replace(":0", f":{port}"))
    with held_request(supervisor) as (client, answers):
        log = supervisor.log("x")
        supervisor.kill()
        supervisor.start()
        log.wait_for("^takeover_waits ")
        finish(client, answers)
    log.wait_for("^ready ", times=2)
    assert ask(supervisor, b"say hello\n") == b"hello\n"
    assert not log.matches("in use|no_control")


def test_rotation_loses_no_line_of_the_log(deploy: Supervise) -> None:
    supervisor = deploy(TALKER, options={"stdout_logfile_maxbytes": 500, "stdout_logfile_backups": "50"})
    address = supervisor.address("x")
    numbers = range(100)
    for number in numbers:
        with socket.create_connection(address, DEADLINE) as client, client.makefile("rb") as answers:
            client.sendall(f"print line {number}\n".encode())
            assert answers.readline() == b"done\n"

    def logged() -> list[int]:
        text = "".join(path.read_text() for path in supervisor.runtime.glob("preforkd-x.log*"))
        return sorted(int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE))

    eventually(lambda: logged() == [*numbers], "every line is in one of the files")
    assert len([*supervisor.runtime.glob("preforkd-x.log.*")]) > 1


def test_another_user(deploy: Supervise) -> None:
    needs("nobody")
    supervisor = deploy(OBEY, options={"user": "nobody"})
    assert ask(supervisor, b"say hello\n") == b"hello\n"
    for pid in supervisor.family():
        assert os.stat(f"/proc/{pid}").st_uid == pwd.getpwnam("nobody").pw_uid
    assert ctl(supervisor, "ping")  # as root
    assert not supervisor.log("x").matches("no_control")


def test_another_user_for_whom_nobody_has_made_a_directory_is_told_what_to_do(deploy: Supervise) -> None:
    needs("nobody")
    where = "/run/preforkd-of-nobody/x"  # which the user nobody may not make
    supervisor = deploy(OBEY, options={"user": "nobody", "environment": f'RUNTIME_DIRECTORY="{where}"'})
    assert ask(supervisor, b"say hello\n") == b"hello\n"
    said = supervisor.log("x").wait_for("^no_control ").string
    assert f"install -d -o {pwd.getpwnam('nobody').pw_uid} -m 0700 {where};" in said
