"""What tests with other people's clients share: a mark for those that need a program, and the daemon's own count."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon import DEADLINE, Daemon, eventually

SERVERS = Path(__file__).parent / "servers.py"
METRICS = ("--metrics", "tcp://127.0.0.1:0")


def needs(program: str, package: str) -> pytest.MarkDecorator:
    """Skip the test where this program is missing, and say which Debian package has it."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program} (Debian: {package})")


def run(*command: object, directory: Path | None = None, text: str = "", complaint: str = "") -> str:
    """What the program prints. It must succeed in time, and complain of nothing but what ``complaint`` matches."""
    done = subprocess.run(
        [*map(str, command)], input=text, capture_output=True, text=True, timeout=2 * DEADLINE, cwd=directory
    )
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert re.fullmatch(complaint, done.stderr.strip()), f"{command[0]} complains:\n{done.stderr}"
    return done.stdout


def outcomes(daemon: Daemon, service: str, at_least: int) -> dict[str, int]:
    """How many requests had which outcome, once so many have ended and none is under way."""

    def ended() -> dict[str, int]:
        names = ("ok", "error", "refused", "killed")
        metrics = daemon.metrics()
        if metrics[f'preforkd_workers{{service="{service}",state="busy"}}']:
            return {}
        return {
            name: int(metrics[f'preforkd_requests_total{{outcome="{name}",service="{service}"}}']) for name in names
        }

    eventually(lambda: sum(ended().values()) >= at_least, f"{at_least} requests of {service} counted")
    return {name: number for name, number in ended().items() if number}
