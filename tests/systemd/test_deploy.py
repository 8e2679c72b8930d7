"""Units as ``preforkd deploy systemd`` fits them to settings, started."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import TARGETS
from tests.daemon import DEADLINE
from tests.systemd.unit import PYTHONPATH, ask_stream, systemctl

UNITS = Path("/etc/systemd/system")

# A place with everything that has to be quoted.
HOME = Path("/srv/50%n off, ${HOME}")
SETTINGS = """
metrics = "tcp://127.0.0.1:99"

[services.mail]
target = "targets.py:Upper"
listen = ["tcp://127.0.0.1:25", "unix:/run/post/x.sock?mode=0660&group=www-data", "fd:tls"]
max_children = 1
cpu_affinity = "spread"
graceful_timeout = "100s"

[services.bulk]
target = "preforkd_workers.samples:Upper"
listen = ["unix:/var/lib/bulk/x.sock"]
max_children = 1
"""
# What systemd cannot give where it has not got it itself, as in some containers.
RESOURCES = """
nice = -5
oom_score_adjust = -10
rlimits = { memlock = "unlimited" }
"""
CAP_SYS_RESOURCE = 24


def may_raise_limits() -> bool:
    """Whether this systemd may."""
    (rights,) = re.findall(r"CapEff:\s(\w+)", Path("/proc/1/status").read_text())
    return bool(int(rights, 16) >> CAP_SYS_RESOURCE & 1)


def install(settings: str, *arguments: str, name: str = "mail") -> str:
    """Fit the files to the settings and have them where they belong, with the user they want, who may read the code.

    Returns the name of the unit.
    """
    HOME.mkdir()
    (HOME / f"{name}.toml").write_text(settings)
    (HOME / "targets.py").write_bytes(TARGETS.read_bytes())
    deploy = [sys.executable, "-m", "preforkd", "deploy", "systemd", "-c", f"{name}.toml", *arguments, "--output"]
    subprocess.run([*deploy, str(UNITS)], cwd=HOME, check=True, timeout=DEADLINE)
    for kind in ("sysusers", "tmpfiles"):
        make = [f"systemd-{kind}", *(["--create"] if kind == "tmpfiles" else []), str(UNITS / f"preforkd.{kind}")]
        subprocess.run(make, check=True, timeout=DEADLINE)
    for path in (sys.prefix, sys.base_prefix, *PYTHONPATH.split(":")):  # of this throw-away system
        for parent in Path(path).parents:
            parent.chmod(parent.stat().st_mode | 0o11)
    (unit,) = UNITS.glob("preforkd@*.service")
    extra = UNITS / f"{unit.name}.d"
    extra.mkdir()
    (extra / "test.conf").write_text(f"[Service]\nEnvironment=PYTHONPATH={PYTHONPATH}\n")
    systemctl("daemon-reload")
    return unit.name


def worker() -> int:
    """The pid of the worker of the service ``mail``."""
    found = [path.parent.name for path in Path("/proc").glob("*/cmdline") if b"worker mail#" in path.read_bytes()]
    assert len(found) == 1
    return int(found[0])


def show(key: str) -> str:
    return systemctl("show", "--property", key, "--value", "preforkd@mail")


def test_a_daemon_has_what_its_settings_ask_for() -> None:
    install(SETTINGS + RESOURCES * may_raise_limits(), "--socket", "tls=tcp://127.0.0.1:443")
    systemctl("start", "preforkd@mail")
    for address in (("127.0.0.1", 25), ("127.0.0.1", 443)):
        assert ask_stream(address) == b"QUESTION\n"
    for path in ("/run/post/x.sock", "/var/lib/bulk/x.sock"):
        assert ask_stream(path, socket.AF_UNIX) == b"QUESTION\n"
    post = Path("/run/post/x.sock")
    assert (post.stat().st_mode & 0o777, post.owner(), post.group()) == (0o660, "preforkd", "www-data")
    assert show("TimeoutStopUSec") == "1min 54s"
    if may_raise_limits():
        (bulk,) = [path.parent for path in Path("/proc").glob("*/cmdline") if b"worker bulk#" in path.read_bytes()]
        assert os.getpriority(os.PRIO_PROCESS, int(bulk.name)) == -5
        assert (bulk / "oom_score_adj").read_text() == "-10\n"
    before = worker()
    assert Path(f"/proc/{before}").owner() == "preforkd"
    systemctl("reload", "preforkd@mail")
    assert worker() != before
    systemctl("restart", "preforkd@mail")
    assert ask_stream(("127.0.0.1", 443)) == b"QUESTION\n"
    systemctl("stop", "preforkd@mail")
    assert (show("SubState"), show("Result")) == ("dead", "success")


def test_a_daemon_may_have_an_odd_name() -> None:
    listen = 'target = "targets.py:Upper"\nlisten = ["tcp://127.0.0.1:2525"]\nmax_children = 1\n'
    unit = install(f"[services.mail]\n{listen}", name="a%n@wörd + 1")
    systemctl("start", unit)
    assert ask_stream(("127.0.0.1", 2525)) == b"QUESTION\n"
    before = worker()
    systemctl("reload", unit)
    assert worker() != before


def test_a_stop_that_leaves_workers_does_not_wait_for_them() -> None:
    """``block_on_close = false``: who is served is served to the end, and the unit is stopped meanwhile."""
    listen = 'target = "targets.py:Obey"\nlisten = ["tcp://127.0.0.1:2525"]\nmax_children = 1\nblock_on_close = false\n'
    unit = install(f"[services.mail]\n{listen}")
    systemctl("start", unit)
    with socket.create_connection(("127.0.0.1", 2525), DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(b"until_eof\n")
        assert answers.readline() == b"waiting\n"
        systemctl("stop", unit)
        assert (show("SubState"), show("Result")) == ("dead", "success")
        client.shutdown(socket.SHUT_WR)
        assert answers.readline() == b"eof after 0\n"
