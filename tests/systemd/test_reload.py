"""What systemd sees of a reload, and what its store keeps afterwards."""

import os
import signal
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
