"""The metrics behind alerts: the worst worker's descriptors, slots held back, and how the last reload ended."""

import os
import resource
import signal
from pathlib import Path

from tests.clients.conftest import METRICS
from tests.conftest import Serve
from tests.daemon import eventually, opened
from tests.test_alerts import APP, LEAKED, TCP

OF_WORKERS, OF_MASTER = 'preforkd_worker_open_fds_ratio{service="Leak"}', "preforkd_master_open_fds_ratio"
HELD_BACK = 'preforkd_slots_held_back{service="Quiet"}'
RELOADED = "preforkd_last_reload_successful"


def test_the_worker_nearest_to_its_limit_tells_of_the_descriptors(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    daemon = serve("app:Leak", *TCP, *METRICS, "--max-children", "3", "--set", "rlimits=nofile=100")

    def tells(greatest: int) -> bool:
        return daemon.metrics()[OF_WORKERS] == greatest / 100 and most_opened() == greatest

    def most_opened() -> int:
        return max(len(opened(pid)) for pid in daemon.in_their_lanes())

    at_rest = most_opened()
    eventually(lambda: tells(at_rest), "all are at rest")
    with daemon.connect():
        eventually(lambda: tells(at_rest + LEAKED + 1), "one leaks, and has the connection")
        limit, _ = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        eventually(lambda: daemon.metrics()[OF_MASTER] == daemon.descriptors() / limit, "the master's")
        (tmp_path / "enough").touch()
    eventually(lambda: tells(at_rest), "it has closed them")


def test_a_slot_is_held_back_only_while_it_is(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    daemon = serve("app:Quiet", *TCP, *METRICS, "--max-children", "2", "--set", "on_worker_start=start")
    assert daemon.metrics()[HELD_BACK] == 0
    (tmp_path / "broken").touch()
    for pid in daemon.workers():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: daemon.metrics()[HELD_BACK] == 2, "both slots are held back")
    (tmp_path / "broken").unlink()
    eventually(lambda: len(daemon.workers()) == 2, "both slots are filled", 40)
    eventually(lambda: daemon.metrics()[HELD_BACK] == 0, "none is held back")


def test_the_last_reload_tells_whether_what_is_on_disk_serves(serve: Serve, tmp_path: Path) -> None:
    target, settings = tmp_path / "app.py", tmp_path / "site.toml"
    target.write_text(APP)
    sound = 'services.a = { target = "app:Quiet", listen = ["tcp://127.0.0.1:0"], probation = 0 }\n'
    settings.write_text(sound)
    daemon = serve("-c", "site.toml", *METRICS)
    assert daemon.metrics()[RELOADED] == 1
    for file, broken, mended in (target, "broken = (\n", APP), (settings, f"{sound}nonsense = 1\n", sound):
        file.write_text(broken)
        assert daemon.ctl("reload").returncode == 1
        assert daemon.metrics()[RELOADED] == 0
        file.write_text(mended)
        assert daemon.ctl("reload").returncode == 0
        assert daemon.metrics()[RELOADED] == 1


def test_an_upgrade_is_a_reload_as_well(serve: Serve, tmp_path: Path) -> None:
    target = tmp_path / "app.py"
    target.write_text(APP)
    daemon = serve("app:Quiet", *TCP, *METRICS, "--set", "probation=0")
    target.write_text("broken = (\n")
    assert daemon.ctl("reload").returncode == 1
    target.write_text(APP)
    assert daemon.ctl("upgrade").returncode == 0
    assert daemon.metrics()[RELOADED] == 1
