"""The clients of ``load.py``: they notice every kind of fault, and what they see is what the daemon counts."""

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import eventually
from tests.under_load import NO_BYTECODE, Code, Load, check_losses, check_nothing_lost

PATIENT = 'graceful_timeout = "2s"'


# It notices.

VISIT = """
class StreamHandler(StreamRequestHandler):
    def handle(self):
        serial = self.rfile.readline().split()[1]
        {answer}
"""

DATAGRAM = """
class DatagramHandler(DatagramRequestHandler):
    def handle(self):
        serial = self.rfile.read().split()[1]
        {answer}
    def finish(self):
        if answer := self.wfile.getvalue():
            self.socket.sendto(answer, self.client_address)
"""

MIXTURE = 'self.wfile.write(b"1 %s 2 0\\n" % serial)'
RESET = 'import socket; self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")'


@pytest.mark.parametrize(
    ("kind", "answer", "fault"),
    [
        (VISIT, "pass", "unanswered"),
        (VISIT, 'self.wfile.write(b"1 %s" % serial)', "unanswered"),
        (VISIT, "self.wfile.write(answer(serial)); self.rfile.read()", "unanswered"),
        (VISIT, f"{RESET}; self.connection.close()", "reset"),
        (VISIT, MIXTURE, "wrong"),
        (VISIT, 'self.wfile.write(answer(b"0"))', "wrong"),
        (VISIT, "self.wfile.write(answer(serial) + answer(serial))", "wrong"),
        (DATAGRAM, "pass", "unanswered"),
        (DATAGRAM, MIXTURE, "wrong"),
        (DATAGRAM, 'self.wfile.write(answer(b"0"))', "wrong"),
    ],
)
def test_a_closed_loop_client_notices(serve: Serve, tmp_path: Path, kind: str, answer: str, fault: str) -> None:
    code = Code(tmp_path)
    code.deploy(kind.format(answer=answer))
    daemon = serve("-c", code.settings(), environment=NO_BYTECODE)
    where = {"datagram": None} if kind is VISIT else {"stream": None}
    with Load(daemon, **where, clients=1, talkers=0, stayers=0, deadline=0.2) as load:  # type: ignore[arg-type]
        eventually(lambda: load.report().faults)
        report = load.stop()
    assert set(report.faults) == {fault}, report.text()
    assert sum(report.faults.values()) == sum(report.asked.values())


TALK = """
class StreamHandler(StreamRequestHandler):
    def handle(self):
        for turn, line in enumerate(self.rfile):
            serial = line.split()[1]
            {answer}
"""


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ('self.wfile.write(b"%d %s %d 0\\n" % (turn, serial, turn))', "wrong"),
        ("self.wfile.write(answer(serial)); self.wfile.write(b'goodbye\\n')", "wrong"),
        ("if turn: break\n            self.wfile.write(answer(serial))", "unanswered"),
        (f"self.wfile.write(answer(serial)); {RESET}; self.connection.close(); break", "reset"),
    ],
)
def test_a_client_with_a_long_lived_connection_notices(serve: Serve, tmp_path: Path, answer: str, fault: str) -> None:
    code = Code(tmp_path)
    code.deploy(TALK.format(answer=answer))
    daemon = serve("-c", code.settings(), environment=NO_BYTECODE)
    with Load(daemon, datagram=None, clients=0, talkers=2, stayers=0, deadline=0.2) as load:
        eventually(lambda: load.report().faults)
        report = load.stop()
    assert set(report.faults) == {fault}, report.text()


def test_clients_notice_that_nobody_listens(serve: Serve, tmp_path: Path) -> None:
    code = Code(tmp_path)
    code.deploy()
    daemon = serve("-c", code.settings(), environment=NO_BYTECODE)
    with Load(daemon, clients=4, talkers=1, stayers=0, deadline=0.5) as load:
        load.after(1)
        daemon.stop(signal.SIGINT)
        eventually(lambda: load.report().refused > 20)
        assert load.stop().refused > 20


def test_a_load_ends_in_time_though_nobody_tells_it(serve: Serve, tmp_path: Path) -> None:
    code = Code(tmp_path)
    code.deploy()
    daemon = serve("-c", code.settings(), environment=NO_BYTECODE)
    with Load(daemon, clients=2, at_most=0.3) as load:
        assert load.process.wait(10) == 0


# It counts.


def test_nothing_is_lost_while_pools_shrink_and_grow(serve: Serve, tmp_path: Path) -> None:
    code = Code(tmp_path)
    code.deploy()
    daemon = serve("-c", code.settings(service=PATIENT), environment=NO_BYTECODE)
    with Load(daemon) as load:
        load.after(100)
        for turn in range(10):
            daemon.signal(signal.SIGTTOU)
            daemon.log.wait_for("^resized service=stream workers=7 ", turn + 1)
            load.after(100)
            daemon.signal(signal.SIGTTIN)
            daemon.log.wait_for("^resized service=stream workers=8 ", turn + 1)
            load.after(100)
        report = load.stop()
    check_nothing_lost(daemon, report)


def test_a_stop_answers_whatever_was_accepted(serve: Serve, tmp_path: Path) -> None:
    code = Code(tmp_path)
    code.deploy()
    daemon = serve("-c", code.settings(service='graceful_timeout = "0.5s"'), environment=NO_BYTECODE)
    with Load(daemon, datagram=None, talkers=0) as load:
        load.after(1000)
        assert daemon.stop() == 0
        report = load.stop()
    assert set(report.faults) <= {"refused", "reset"}, report.text()  # they were in the backlog, or came later
    ended = daemon.log.matches(r"^worker_exit service=stream .* cause=(?:drained|eof) .* requests=(\d+) (lost)?")
    assert sum(int(match[1]) for match in ended) == sum(report.answered.values())
    assert not any(match[2] for match in ended)


def test_killed_workers_cost_what_they_held_and_no_more(serve: Serve, tmp_path: Path) -> None:
    code = Code(tmp_path)
    code.deploy()
    daemon = serve("-c", code.settings(service=PATIENT), environment=NO_BYTECODE)
    kills = {"stream": 0, "datagrams": 0}
    with Load(daemon, deadline=2.0) as load:
        for turn in range(6):
            load.after(200)
            service = ("stream", "datagrams")[turn % 2]
            eventually(lambda service=service: len(daemon.workers(service)) > 1, "the slot is refilled")  # type: ignore[misc]
            victim = daemon.workers(service)[turn % 2]
            os.kill(victim, signal.SIGKILL)
            kills[service] += 1
            daemon.log.wait_for(rf"^worker_exit service={service} .*\bpid={victim} .*signal=SIGKILL")
        report = load.stop()
    check_losses(daemon, report, kills)
