"""What the journal has of us: a priority, and one entry an event. A journal that stands still stops nobody."""

import json
import os
import signal
import socket
import subprocess
from typing import Any

from tests.daemon import DEADLINE, eventually
from tests.systemd.unit import Unit, systemctl
from tests.unheard import TALK

TCP = ("--listen", "tcp://127.0.0.1:9000")


def entries(unit: Unit) -> list[tuple[int, str]]:
    """Priority and text of all that the unit's processes have said."""
    shown = ["journalctl", "--output=json", "--all", f"_SYSTEMD_UNIT={unit.name}.service"]
    subprocess.run(["journalctl", "--sync"], check=True, timeout=DEADLINE)
    found = subprocess.run(shown, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout
    records: list[dict[str, Any]] = [json.loads(line) for line in found.splitlines()]
    return [(int(record["PRIORITY"]), record["MESSAGE"]) for record in records]


def say(what: str) -> bytes:
    with socket.create_connection(("127.0.0.1", 9000), DEADLINE) as client:
        client.sendall(f"{what}\n".encode())
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            return answer.read()


def test_every_event_has_its_priority_in_the_journal() -> None:
    with Unit(TALK, *TCP) as unit:
        say("raise 1 raised")
        say("log 1 logged")
        say("kill 1 killed")
        eventually(lambda: any(text.startswith("worker_exit ") for _, text in entries(unit)), "it is told")
        found = {text.split()[0]: (priority, text) for priority, text in entries(unit)}
    assert found["ready"][0] == found["listening"][0] == found["worker_ready"][0] == 6
    assert found["worker_exit"][0] == 3
    assert found["logged"] == (4, "logged 0")
    assert found["killed"] == (6, "killed 0")
    assert found["ValueError:"] == (6, "ValueError: raised 0")  # as socketserver prints it
    assert "at=" not in found["ready"][1]


def test_a_journal_that_stands_still_stops_nobody() -> None:
    with Unit(TALK, *TCP) as unit:
        journal = int(systemctl("show", "--property", "MainPID", "--value", "systemd-journald"))
        os.kill(journal, signal.SIGSTOP)
        try:
            for how in ("print", "stderr", "log"):
                assert say(f"{how} 20000 {'x' * 100}") == b"said\n"
            os.kill(unit.pid, signal.SIGUSR1)
            assert say("print 1 more") == b"said\n"
        finally:
            os.kill(journal, signal.SIGCONT)
        eventually(lambda: say("print 1 again") and any("log_dropped " in text for _, text in entries(unit)), "told")
        assert unit.show("Result") == "success"
