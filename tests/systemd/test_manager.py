"""What systemd makes of what it is told: patience, status, watchdog."""

import os
import signal
import socket
from functools import partial
from pathlib import Path

from tests.daemon import DEADLINE, eventually
from tests.systemd.unit import Clients, Unit, ask_stream, systemctl

ADDRESS = ("127.0.0.1", 9000)
TCP = ("--listen", "tcp://127.0.0.1:9000")


def test_the_status_is_shown() -> None:
    with Unit(":Upper", *TCP) as unit:
        assert unit.show("StatusText") == "4 workers: 0 busy, 4 idle; generation 1"


def test_a_slow_import_is_given_its_time(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(5)\nfrom preforkd_workers.samples import Upper\n")
    with Unit(f"{tmp_path}/slow.py:Upper", *TCP, TimeoutStartSec="2s", WatchdogSec="2s"):
        assert ask_stream(ADDRESS) == b"QUESTION\n"


def test_a_slow_drain_is_given_its_time() -> None:
    with Unit(":Obey", *TCP, TimeoutStopSec="1s", WatchdogSec="1s") as unit:
        with socket.create_connection(ADDRESS, DEADLINE) as client, client.makefile("rb") as answers:
            client.sendall(b"pid\n")
            assert answers.readline()
            client.sendall(b"sleep 3\n")
            client.shutdown(socket.SHUT_WR)
            systemctl("stop", unit.name)
            assert answers.readline() == b"slept\n"
        assert unit.show("Result") == "success"


def test_a_master_that_hangs_is_replaced_and_nobody_is_refused_meanwhile() -> None:
    with Unit(":Upper", *TCP, WatchdogSec="1s", TimeoutAbortSec="2s") as unit:
        with Clients(partial(ask_stream, ADDRESS), b"QUESTION\n") as clients:
            clients.until_answered(100)
            before = unit.pid
            os.kill(before, signal.SIGSTOP)
            unit.log.wait_for("Watchdog timeout")
            unit.restarted(before)
            clients.until_answered(100)
            outcomes = clients.stop()
        assert outcomes.keys() <= {"answered", "ConnectionResetError", "got b''"}
        assert unit.show("NRestarts") == "1"


def test_a_daemon_at_rest_is_left_alone_by_its_watchdog() -> None:
    with Unit(":Upper", *TCP, WatchdogSec="1s") as unit:
        before = unit.pid
        status = unit.show("WatchdogTimestampMonotonic")
        eventually(lambda: int(unit.show("WatchdogTimestampMonotonic")) > int(status) + 4_000_000, "fed for 4 s")
        assert unit.pid == before
        assert unit.show("NRestarts") == "0"


def test_a_service_that_is_loaded_again_and_slowly_does_not_starve_the_watchdog(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("from preforkd_workers.samples import Upper\n")
    with Unit(f"{tmp_path}/app.py:Upper", *TCP, WatchdogSec="1s", Restart="no") as unit:
        (tmp_path / "app.py").write_text("import time\ntime.sleep(3)\nfrom preforkd_workers.samples import Upper\n")
        for pid in unit.processes():
            if pid != unit.pid:
                os.kill(pid, signal.SIGKILL)
        unit.log.wait_for("^mold_ready ", times=2)
        assert ask_stream(ADDRESS) == b"QUESTION\n"
        assert unit.show("SubState") == "running"


def test_a_service_that_has_nobody_starves_the_watchdog(tmp_path: Path) -> None:
    """Its code is broken while it serves, and everybody is killed: the mold cannot be made again."""
    (tmp_path / "app.py").write_text("from preforkd_workers.samples import Upper\n")
    with Unit(f"{tmp_path}/app.py:Upper", *TCP, WatchdogSec="1s", Restart="no") as unit:
        (tmp_path / "app.py").write_text("broken\n")
        for pid in unit.processes():
            if pid != unit.pid:
                os.kill(pid, signal.SIGKILL)
        unit.log.wait_for("Watchdog timeout")
        eventually(lambda: unit.show("Result") == "watchdog", "systemd has ended it")
