"""The units as they are shipped: what systemd says of them, and an ordinary day of an instance."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

from tests.daemon import DEADLINE, eventually
from tests.systemd.installed import ADDRESS, ETC, SHIPPED, UNITS, Instance, drop_in, install, web
from tests.systemd.unit import ask_stream, systemctl


def fails(*words: str, status: int = 1) -> str:
    """What systemctl complains about."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == status, done
    return done.stderr


def journal(unit: Instance, *options: str) -> list[str]:
    """What the journal has of the unit; lines, unless the options say otherwise."""
    command = ["journalctl", "--quiet", "--output=cat", "--unit", unit.name, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_systemd_has_no_complaint_and_finds_it_closed_enough() -> None:
    install()
    for instance in ("preforkd@web.service", "preforkd@web.socket"):
        verify = ["systemd-analyze", "verify", "--man=no", instance]
        done = subprocess.run(verify, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), "its status is 0 for unknown keys"
    security = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=12"]
    done = subprocess.run([*security, str(SHIPPED / "preforkd@.service")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for path, kind in (
        (ETC, "0o40750 preforkd"),
        ("/etc/credstore", "0o40700 root"),
        ("/run/preforkd", "0o40755 root"),
    ):
        assert f"{oct(Path(path).stat().st_mode)} {Path(path).group()}" == kind


def test_a_reload_gives_systemctl_the_verdict_and_the_journal_the_reason() -> None:
    app = Path("/opt/app.py")
    app.write_text("from preforkd_workers.samples import Upper\n")
    with Instance(web(f"{app}:Upper")) as unit:
        assert unit.show("StatusText") == "4 workers: 0 busy, 4 idle; generation 1"
        assert Path(f"/proc/{unit.pid}").owner() == "preforkd"
        assert unit.ctl("ping").stdout.endswith(f"pid {unit.pid}\n")
        systemctl("reload", unit.name)
        assert ask_stream(ADDRESS) == b"QUESTION\n"
        app.write_text("broken(\n")
        fails("reload", unit.name)
        unit.log.wait_for(r"^SyntaxError: '\(' was never closed")
        unit.write("nonsense = 1\n")
        fails("reload", unit.name)
        unit.log.wait_for("unknown setting 'nonsense'")
        assert ask_stream(ADDRESS) == b"QUESTION\n"
        assert (unit.show("ActiveState"), unit.show("NFileDescriptorStore")) == ("active", "3")


def test_the_journal_has_one_line_an_event_by_priority() -> None:
    app = Path("/opt/app.py")
    app.write_text("from preforkd_workers.samples import Upper\n")
    with Instance(web(f"{app}:Upper")) as unit:
        app.write_text("broken(\n")
        fails("reload", unit.name)
        worker = unit.log.wait_for(r"^worker_ready service=web slot=2 .*pid=(\d+)")[1]
        os.kill(int(worker), signal.SIGKILL)
        unit.log.wait_for(r"^worker_ready service=web slot=2 ", times=2)
        bad = journal(unit, "--priority=err")
        for event in ("reload_rolled_back gen=2", "SyntaxError", f"worker_exit service=web slot=2 gen=1 pid={worker} "):
            assert len([line for line in bad if event in line]) >= 1
        assert not [line for line in bad if line.startswith(("worker_ready ", "ready ", "listening "))]
        lines = journal(unit)
        assert not [line for line in lines if line.startswith("<")]
        entries = map(json.loads, journal(unit, "--output=json"))
        events = [entry for entry in entries if entry["MESSAGE"].startswith(("worker_", "mold_", "reload_", "ready "))]
        assert {entry["SYSLOG_IDENTIFIER"] for entry in events} == {"preforkd@web"}
        assert all(len(entry["MESSAGE"].splitlines()) == 1 for entry in events)


def test_a_slow_reload_is_given_its_time() -> None:
    app = Path("/opt/app.py")
    app.write_text("from preforkd_workers.samples import Upper\n")
    with Instance(web(f"{app}:Upper"), TimeoutStartSec="4s") as unit:
        app.write_text("import time\ntime.sleep(6)\nfrom preforkd_workers.samples import Upper\n")
        systemctl("reload", unit.name)
        assert ask_stream(ADDRESS) == b"QUESTION\n"


def test_wrong_settings_are_named_and_not_tried_again() -> None:
    with Instance(web(":Upper", "nonsense = 1", "max_childen = 3"), start=False) as unit:
        fails("start", unit.name)
        unit.log.wait_for("unknown setting 'nonsense'")
        unit.log.wait_for("unknown setting 'max_childen'")
        assert unit.show("ActiveState") == "failed"
        assert (unit.show("ExecMainStatus"), unit.show("NRestarts")) == ("78", "0")


def test_a_target_that_does_not_load_is_tried_again_and_not_for_ever() -> None:
    with Instance(web(":Nobody"), start=False, RestartSec="0") as unit:
        drop_in(unit.name, "Unit", StartLimitBurst="2")
        systemctl("daemon-reload")
        fails("start", unit.name)
        eventually(lambda: unit.show("ActiveState") == "failed")
        assert unit.show("ExecMainStatus") == "70"
        unit.log.wait_for("has no 'Nobody'", times=2)


def test_the_type_notify_reload_is_for_a_systemd_that_knows_it() -> None:
    with Instance(web()) as unit:
        (UNITS / f"{unit.name}.d" / "notify-reload.conf").write_text((SHIPPED / "notify-reload.conf").read_text())
        systemctl("daemon-reload")
        version = int(systemctl("--version").split()[1])
        if version >= 253:
            systemctl("restart", unit.name)
            systemctl("reload", unit.name)
            unit.log.wait_for("^reload_done ")
            unit.write("nonsense = 1\n")
            systemctl("reload", unit.name)  # its protocol has no word for that
            unit.log.wait_for("^reload_refused ")
        else:
            assert unit.show("Type") == "notify"
            assert "not applicable" in fails("reload", unit.name, status=3)


def test_a_stop_ends_everybody_and_leaves_the_state_alone() -> None:
    with Instance(web(":Obey")) as unit:
        with socket.create_connection(ADDRESS, DEADLINE) as client, client.makefile("rb") as answers:
            client.sendall(b"until_eof\n")
            assert answers.readline() == b"waiting\n"
            stop = subprocess.Popen(["systemctl", "stop", unit.name])
            unit.log.wait_for("^stopping ")
            client.shutdown(socket.SHUT_WR)
            assert answers.readline() == b"eof after 0\n"
        assert stop.wait(DEADLINE) == 0
        assert (unit.show("Result"), unit.processes()) == ("success", [])
        assert Path("/var/lib/preforkd/web").owner() == "preforkd"
        assert not Path("/run/preforkd/web").exists()
