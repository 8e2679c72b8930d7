"""The handbook, ``deploy/README.md``, as it is typed: its commands in order, on a machine with Debian's Python.

Outside, before the systemd boots, the wheels are made that ``pip install preforkd`` then finds; inside there is no
network but loopback, so ``apt-get`` finds everything installed already (tests/debian-packages.txt).
"""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import eventually
from tests.systemd.unit import systemctl

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What pip installs, made outside for those inside."""
    if "WITH_SYSTEMD" in os.environ:
        yield
        return
    version = subprocess.run([PYTHON, "-V"], capture_output=True, text=True, check=False).stdout
    if not version.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}."):
        pytest.skip(f"{PYTHON} is another version than this one, whose wheels do not fit")
    directory = tmp_path_factory.mktemp("wheels")
    make = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--wheel-dir", str(directory)]
    subprocess.run([*make, f"{ROOT}[supervisor]"], check=True, timeout=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(directory))
        yield


def blocks(chapter: str) -> list[str]:
    """What a chapter has one type, in order."""
    text = (ROOT / "deploy/README.md").read_text()
    (found,) = [each for each in re.split("^## ", text, flags=re.MULTILINE) if each.startswith(chapter)]
    return _BLOCK.findall(found)


class Shell:
    """Root's, on a machine that has nothing of it yet. Each command must succeed, unless it says that it fails."""

    def __init__(self) -> None:
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "PIP_FIND_LINKS": os.environ["PIP_FIND_LINKS"],
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        # What every Debian has, but not our private systemd; and an address, without which Alertmanager does not start.
        Path("/etc/tmpfiles.d").mkdir()
        subprocess.run(["ip", "address", "add", "10.0.0.1/32", "dev", "lo"], check=True)

    def type(self, block: str) -> str:
        """What it prints."""
        lines = [line for line in block.splitlines() if line != "apt-get update"]  # there is nobody to ask
        commands = [f"if {line.partition('#')[0]}; then exit 1; fi" if "# fails" in line else line for line in lines]
        done = subprocess.run(
            ["bash", "-euxc", "\n".join(commands)],
            env=self.environment,
            cwd="/root",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{journal()}"
        return done.stdout


def journal() -> str:
    """What there is to read when something went wrong."""
    logs = [str(path) for path in Path("/var/log").glob("*preforkd*")] + ["/var/log/supervisord.log"]
    command = f"journalctl --no-pager -n 60; tail -n 30 {' '.join(logs)}"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False).stdout


def upper(port: int, text: bytes = b"hello") -> bytes:
    """What the service of the handbook makes of it."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(text + b"\n")
        with client.makefile("rb") as answer:
            return answer.readline().strip()


@pytest.mark.timeout(240)
def test_from_nothing_to_scraped_alerted_and_restarted_at_boot() -> None:
    shell = Shell()
    install, write, start, look, deploy, kill, monitor, query, socket_unit = blocks("systemd, from nothing")
    shell.type(install)
    assert "is a handler class" in shell.type(write)
    shell.type(start)
    said = shell.type(look)
    assert re.search(r"^mail +/srv/mail/server\.py:Upper +1 +8 +8 +\d", said, re.MULTILINE)
    assert "HELLO" in said
    assert "ready pid=" in said

    said = shell.type(deploy)
    assert "SyntaxError" in said
    assert upper(25) == b"Hello"

    before = main_pid()
    shell.type(kill)
    eventually(lambda: main_pid() not in (before, 0), "it is started again")
    assert upper(25) == b"Hello"

    shell.type(monitor)
    eventually(lambda: answers("http://127.0.0.1:9090/-/ready") and answers("http://127.0.0.1:9093/-/ready"))
    eventually(lambda: "=> 1 @" in shell.type(query), "it is scraped", 40)
    assert re.search(r"^[1-9]\d*$", shell.type(query), re.MULTILINE), "the rules are not there"

    assert systemctl("is-enabled", "preforkd@mail") == "enabled"
    systemctl("stop", "preforkd@mail")
    systemctl("start", "multi-user.target")  # what a boot does
    assert systemctl("is-active", "preforkd@mail") == "active"

    said = shell.type(socket_unit)
    assert "Hello" in said
    assert said.splitlines()[-1] == "active"


def test_supervisord_from_nothing() -> None:
    shell = Shell()
    install, write, start, look = blocks("supervisord, from nothing")
    shell.type(install)
    shell.type(write)
    shell.type(start)
    try:
        eventually(lambda: upper_answers(2525))
    except AssertionError:
        pytest.fail(journal())
    assert upper(2525) == b"HELLO"
    eventually(lambda: b"RUNNING" in status(shell), "startsecs have passed", 30)
    said = shell.type(look)
    assert re.search(r"mail +RUNNING", said)
    assert "generation 2" in said
    assert re.search(r"^supervisor_up 1", said, re.MULTILINE)


def main_pid() -> int:
    return int(systemctl("show", "--property", "MainPID", "--value", "preforkd@mail"))


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=10).status == 200)
    except OSError:
        return False


def upper_answers(port: int) -> bool:
    try:
        return bool(upper(port))
    except OSError:
        return False


def status(shell: Shell) -> bytes:
    command = ["supervisorctl", "--configuration", "/etc/supervisord.conf", "status"]
    found = subprocess.run(command, env=shell.environment, capture_output=True, check=False).stdout
    return found if b"STARTING" not in found else b""
