"""An upgrade under systemd: the unit stays active with the same main process, and so does what systemd keeps for it."""

import re
import socket
import sys
from functools import partial
from pathlib import Path

from tests.daemon import DEADLINE, eventually, preforkctl
from tests.systemd.unit import Clients, Unit, ask_stream, metrics, systemctl

ADDRESS = ("127.0.0.1", 9000)
TCP = ("--listen", "tcp://127.0.0.1:9000", "--set", "probation=0s")
METRICS = ("--metrics", "tcp://127.0.0.1:9109")
CONTROL = "/run/under-test/control.sock"


def upgrade(*words: str) -> None:
    done = preforkctl("-s", CONTROL, "upgrade", *words)
    assert (done.returncode, done.stderr) == (0, "")


def counted() -> float:
    return metrics(9109)['preforkd_requests_total{outcome="ok",service="Upper"}']


def test_the_unit_stays_active_and_what_is_kept_for_it_is_kept_once() -> None:
    # The exporter's listener, ours, and the scoreboard: there is no room for one more.
    with Unit(":Upper", *TCP, *METRICS, WatchdogSec="10s", FileDescriptorStoreMax="3") as unit:
        assert unit.show("NFileDescriptorStore") == "3"
        before, since = unit.pid, unit.show("ActiveEnterTimestampMonotonic")
        with Clients(partial(ask_stream, ADDRESS), b"QUESTION\n") as clients:
            for _ in range(3):
                clients.until_answered(50)
                upgrade()
                eventually(lambda: unit.show("ActiveState") == "active", "it has reloaded")
            clients.until_answered(50)
            outcomes = clients.stop()
        assert outcomes == {"answered": outcomes["answered"]}
        assert (unit.pid, unit.show("ActiveEnterTimestampMonotonic")) == (before, since)
        assert unit.show("NFileDescriptorStore") == "3"
        eventually(lambda: re.search("; last reload: upgrade done$", unit.show("StatusText")), "the status tells")
        eventually(lambda: counted() == outcomes["answered"], "every request is counted")
        systemctl("restart", unit.name)
        assert ask_stream(ADDRESS) == b"QUESTION\n"
        eventually(lambda: counted() == outcomes["answered"] + 1, "counted on")
        unit.log.wait_for("^ready ", 2)
        assert unit.pid != before


def test_the_watchdog_is_fed_afterwards() -> None:
    with Unit(":Upper", *TCP, WatchdogSec="3s") as unit:
        before = unit.pid
        upgrade()
        fed = int(unit.show("WatchdogTimestampMonotonic"))
        eventually(lambda: int(unit.show("WatchdogTimestampMonotonic")) > fed + 7_000_000, "fed for 7 s")
        assert (unit.pid, unit.show("NRestarts")) == (before, "0")


def test_systemd_is_told_that_it_reloads_and_is_ready_again(tmp_path: Path) -> None:
    """While new code is imported: systemd waits for the end of it."""
    app = tmp_path / "app.py"
    app.write_text("from preforkd_workers.samples import Upper\n")
    with Unit(f"{app}:Upper", *TCP) as unit:
        gate = tmp_path / "gate"
        app.write_text(
            "import os, time\n"
            "from preforkd_workers.samples import Upper\n"
            f"while os.path.exists('{gate}'):\n    time.sleep(0.01)\n"
        )
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\ncase " $* " in *" serve "*) : > {gate};; esac\nexec {sys.executable} "$@"\n')
        script.chmod(0o755)
        assert preforkctl("-s", CONTROL, "upgrade", "--no-wait", script).returncode == 0
        eventually(lambda: unit.show("ActiveState") == "reloading", "it reloads")
        gate.unlink()
        eventually(lambda: unit.show("ActiveState") == "active", "it is ready again")
        unit.log.wait_for("^upgrade_done ")


def test_a_conversation_survives() -> None:
    with Unit(":Obey", *TCP) as unit:
        with socket.create_connection(ADDRESS, DEADLINE) as client, client.makefile("rb") as answers:
            client.sendall(b"pid\n")
            pid = answers.readline()
            upgrade()
            client.sendall(b"pid\n")
            assert answers.readline() == pid
            assert int(pid) in unit.processes()
        unit.log.wait_for(rf"^worker_exit .*pid={int(pid)} cause=drained ")
