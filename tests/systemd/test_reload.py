"""What systemd sees of a reload, and what its store keeps afterwards."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.daemon import eventually
from tests.systemd.unit import Clients, Unit, ask_stream, metrics, systemctl

HANDLER = "from preforkd_workers.samples import Upper\n"
TOML = """
metrics = "tcp://127.0.0.1:9109"
[services.upper]
target = "{directory}/app.py:Upper"
listen = ["tcp://127.0.0.1:{port}"]
probation = {probation}
"""


def write(directory: Path, port: int = 9000, probation: int = 0, code: str = HANDLER) -> str:
    (directory / "app.py").write_text(code)
    path = directory / "upper.toml"
    path.write_text(TOML.format(directory=directory, port=port, probation=probation))
    return str(path)


def test_a_unit_is_reloading_until_the_verdict_which_its_status_shows(tmp_path: Path) -> None:
    with Unit("-c", write(tmp_path)) as unit:
        before = unit.pid
        write(tmp_path, probation=3600)
        systemctl("reload", unit.name)
        worker = unit.log.wait_for(r"^worker_ready service=upper .*gen=2 pid=(\d+)")[1]
        eventually(lambda: unit.show("ActiveState") == "reloading")
        os.kill(int(worker), signal.SIGKILL)
        unit.log.wait_for("^reload_rolled_back gen=2 phase=probation ")
        eventually(lambda: unit.show("ActiveState") == "active")
        eventually(lambda: "; last reload: reload rolled_back: " in unit.show("StatusText"))
        write(tmp_path)
        systemctl("reload", unit.name)
        unit.log.wait_for("^reload_done gen=3 ")
        eventually(lambda: unit.show("StatusText").endswith("generation 3; last reload: reload done"))
        assert unit.pid == before


def test_the_store_keeps_the_listeners_of_the_last_reload_and_the_counters(tmp_path: Path) -> None:
    with Unit("-c", write(tmp_path)) as unit:
        kept = unit.show("NFileDescriptorStore")
        assert ask_stream(("127.0.0.1", 9000)) == b"QUESTION\n"
        write(tmp_path, port=9001)
        systemctl("reload", unit.name)
        unit.log.wait_for("^reload_done ")
        eventually(lambda: unit.show("NFileDescriptorStore") == kept)
        with Clients(partial(ask_stream, ("127.0.0.1", 9001)), b"QUESTION\n") as clients:
            clients.until_answered(50)
            systemctl("restart", unit.name)
            clients.until_answered(50)
            outcomes = clients.stop()
        assert outcomes == {"answered": outcomes["answered"]}
        counted = 'preforkd_requests_total{outcome="ok",service="upper"}'
        eventually(lambda: metrics(9109)[counted] == 1 + outcomes["answered"])


def test_what_failed_to_reload_is_forgotten_by_a_restart_that_keeps_the_counters(tmp_path: Path) -> None:
    with Unit("-c", write(tmp_path)) as unit:
        write(tmp_path, code="broken(\n")
        systemctl("reload", unit.name)
        unit.log.wait_for("^reload_rolled_back ")
        eventually(lambda: metrics(9109)["preforkd_last_reload_successful"] == 0)
        write(tmp_path)
        systemctl("restart", unit.name)
        eventually(lambda: metrics(9109)["preforkd_last_reload_successful"] == 1)
        assert metrics(9109)['preforkd_reloads_total{result="rolled_back"}'] == 1


def test_a_reload_by_preforkctl_gives_systemctl_the_verdict(tmp_path: Path) -> None:
    ctl = f"{sys.executable} -m preforkd.ctl -s /run/under-test/control.sock reload"
    with Unit("-c", write(tmp_path), ExecReload=ctl) as unit:
        write(tmp_path, code="broken(\n")
        assert (
            subprocess.run(["systemctl", "reload", unit.name], stderr=subprocess.DEVNULL, check=False).returncode == 1
        )
        unit.log.wait_for("^SyntaxError: '\\(' was never closed")
        assert ask_stream(("127.0.0.1", 9000)) == b"QUESTION\n"
        write(tmp_path)
        systemctl("reload", unit.name)
        assert unit.show("ActiveState") == "active"
