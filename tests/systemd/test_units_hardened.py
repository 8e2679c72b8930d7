"""With every directive of the unit in force: what handlers have room for, and whether the promises hold."""

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.daemon import DEADLINE, eventually
from tests.systemd.installed import ADDRESS, Instance, target, web
from tests.systemd.unit import Clients, ask_stream, metrics, systemctl

ROOM = target("Room", "systemd/handlers.py")


def asks(*lines: str) -> list[str]:
    """What the handler answers to each line."""
    with socket.create_connection(ADDRESS, DEADLINE) as client, client.makefile("rw") as stream:
        stream.write("".join(f"{line}\n" for line in lines))
        stream.flush()
        client.shutdown(socket.SHUT_WR)
        return stream.read().splitlines()


@contextmanager
def held_request() -> Iterator[tuple[int, socket.socket, BinaryIO]]:
    """A request that a worker holds until its client is done; the worker's pid, and the client's end."""
    with socket.create_connection(ADDRESS, DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(b"pid\n")
        worker = int(answers.readline())
        client.sendall(b"until_eof\n")
        assert answers.readline() == b"waiting\n"
        yield worker, client, answers


def requests(outcome: str, service: str) -> float:
    return metrics(9109)[f'preforkd_requests_total{{outcome="{outcome}",service="{service}"}}']


def test_a_handler_has_room_for_what_handlers_do() -> None:
    with Instance(web(ROOM)), socket.create_server(("127.0.0.1", 9001)) as other:
        other.settimeout(DEADLINE)
        assert asks("whoami", "write note", "run echo a program", "call_back", "nice", "machine") == [
            "preforkd",
            "written",
            "a program",
            "42",
            "1",
            "True True",
        ]
        assert Path("/var/lib/preforkd/web/note").read_text() == "kept"
        with socket.create_connection(ADDRESS, DEADLINE) as client, client.makefile("rb") as answers:
            client.sendall(b"connect 9001\n")
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"from elsewhere")
            assert answers.readline() == b"from elsewhere\n"


def test_it_has_no_room_for_what_intruders_do() -> None:
    with Instance(web(ROOM)):
        assert asks("write /opt/x", "write /etc/x") == 2 * ["Read-only file system"]
        assert asks("list /root", "list /etc/credstore") == 2 * ["Permission denied"]
        assert asks("chroot") == ["Operation not permitted"]
        assert asks("list /proc")[0].split()[0] != "1", "it sees no process of others"


def test_a_handler_reads_its_key_from_the_credentials() -> None:
    key, certificate = "/etc/credstore/preforkd@web.key", "/etc/credstore/preforkd@web.crt"
    settings = web(target("Sealed", "systemd/handlers.py"), f'handler = "{target("Upper")}"')
    unit = Instance(settings, start=False)
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    of = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run([*new, *of], check=True, capture_output=True)
    assert oct(os.stat(key).st_mode) == "0o100600"
    with unit:
        unit.start()
        context = ssl.create_default_context(cafile=certificate)
        with context.wrap_socket(socket.create_connection(ADDRESS, DEADLINE), server_hostname="localhost") as client:
            client.sendall(b"question\n")
            assert client.recv(99) == b"QUESTION\n"
        systemctl("reload", unit.name)
        with context.wrap_socket(socket.create_connection(ADDRESS, DEADLINE), server_hostname="localhost") as client:
            client.sendall(b"question\n")
            assert client.recv(99) == b"QUESTION\n"


def test_everything_that_is_measured_is_measured() -> None:
    more = ("max_rss_hard = '2G'", "max_pss = '1G'", "max_rss = '1G'", "cpu_affinity = 'spread'", "nice = 1")
    udp = ["[services.udp]", f'target = "{target("UpperDatagram")}"', 'listen = ["udp://127.0.0.1:9000"]', *more]
    unix = ["[services.unix]", f'target = "{target("Upper")}"', 'listen = ["unix:/run/preforkd/web/x"]']
    with Instance(web(":Upper", *more, *udp, *unix)) as unit:
        assert ask_stream(ADDRESS) == b"QUESTION\n"
        assert ask_stream("/run/preforkd/web/x", socket.AF_UNIX) == b"QUESTION\n"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(DEADLINE)
            client.sendto(b"question", ADDRESS)
            assert client.recv(99) == b"QUESTION"
        limit = 'preforkd_listen_backlog_limit{listener="unix:/run/preforkd/web/x",service="unix"}'
        eventually(lambda: metrics(9109)[limit] == 1024, "it asks netlink")
        page = metrics(9109)
        for name in ("resident_memory_bytes", "proportional_memory_bytes", "open_fds"):
            for service in ("web", "udp", "unix"):
                assert page[f'preforkd_worker_{name}{{service="{service}"}}'] > 0
        assert not unit.log.matches("Traceback|Error")


def test_an_upgrade_and_a_reload_and_a_restart_refuse_nobody() -> None:
    with Instance(web()) as unit:
        before = unit.pid
        with Clients(partial(ask_stream, ADDRESS), b"QUESTION\n") as clients:
            for step in (("ctl", "upgrade"), ("systemctl", "reload", unit.name)):
                clients.until_answered(100)
                if step[0] == "ctl":
                    done = unit.ctl(*step[1:])
                    assert (done.returncode, done.stderr) == (0, "")
                else:
                    systemctl(*step[1:])
            clients.until_answered(100)
            assert unit.pid == before
            systemctl("restart", unit.name)
            clients.until_answered(100)
            outcomes = clients.stop()
        assert outcomes == {"answered": outcomes["answered"]}
        eventually(lambda: requests("ok", "web") == outcomes["answered"], "every request is counted")


def test_a_killed_worker_costs_the_one_request_that_it_held() -> None:
    with Instance(web(":Obey")) as unit, held_request() as (worker, _, answers):
        os.kill(worker, signal.SIGKILL)
        assert answers.read() == b""
        unit.log.wait_for(f"^worker_exit .* pid={worker} cause=crash signal=SIGKILL .* lost=1 ")
        assert asks("say hello") == ["hello"]
        eventually(lambda: requests("killed", "web") == 1)


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_the_workers_of_a_dead_master_finish_what_they_hold_and_nobody_is_refused(how: str) -> None:
    watchdog = {"killed": "45s", "hung": "1s"}[how]
    with (
        Instance(web(":Obey"), RestartSec="100ms", WatchdogSec=watchdog) as unit,
        held_request() as (_, client, answers),
    ):
        before = unit.pid
        with Clients(partial(ask_stream, ADDRESS), b"what?\n") as clients:
            clients.until_answered(50)
            os.kill(before, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            eventually(lambda: len(unit.processes()) == 1, "only the worker that is held stays")
            assert (unit.show("MainPID"), unit.show("NRestarts")) == ("0", "0")
            client.shutdown(socket.SHUT_WR)
            assert answers.readline() == b"eof after 0\n"
            unit.restarted(before)
            clients.until_answered(50)
            outcomes = clients.stop()
        assert outcomes == {"answered": outcomes["answered"]}
        assert unit.show("NRestarts") == "1"
        eventually(lambda: requests("ok", "web") == outcomes["answered"] + 1, "every request is counted")


def test_a_worker_of_a_dead_master_that_is_stuck_is_not_waited_for_for_ever() -> None:
    with Instance(web(":Obey"), RestartSec="100ms", WatchdogSec="2s") as unit, held_request() as (worker, _, _):
        before = unit.pid
        os.kill(worker, signal.SIGSTOP)
        os.kill(before, signal.SIGKILL)
        unit.log.wait_for("Watchdog timeout")
        unit.restarted(before)
        assert asks("say hello") == ["hello"]
        unit.log.wait_for(f"^worker_exit .* pid={worker} cause=orphaned lost=1 ")


def test_a_master_that_hangs_is_stopped_with_all_of_its_workers() -> None:
    # A stop wakes who is stopped (SIGCONT, systemd.kill(5)), so it hangs for a moment only; the worker for ever.
    more = ("graceful_timeout = 0.5", "eof_timeout = 0.5")
    with Instance(web(":Obey", *more)) as unit, held_request() as (worker, _, _):
        everybody = unit.processes()
        os.kill(worker, signal.SIGSTOP)
        os.kill(unit.pid, signal.SIGSTOP)
        systemctl("stop", unit.name)
        assert unit.processes() == []
        assert not [pid for pid in everybody if Path(f"/proc/{pid}").exists()]


def test_a_master_that_cannot_be_woken_is_killed_with_all_of_its_workers() -> None:
    with Instance(web(":Obey"), TimeoutStopSec="1s") as unit, held_request():
        everybody = unit.processes()
        freezer = Path(f"/sys/fs/cgroup{unit.show('ControlGroup')}/frozen")
        freezer.mkdir()
        (freezer / "cgroup.procs").write_text(str(unit.pid))
        (freezer / "cgroup.freeze").write_text("1")
        systemctl("stop", unit.name)
        assert unit.show("Result") == "timeout"
        assert not [pid for pid in everybody if Path(f"/proc/{pid}").exists()]
