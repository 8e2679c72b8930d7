"""Each of these tests runs inside a real systemd of its own, a private and throw-away one.

Outside, a test does nothing but boot it and run itself inside, so that it reads like any other test. It must not use
fixtures of ours, for those are set up outside as well.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITH_SYSTEMD = Path(__file__).parent / "with-systemd"
NO_BOOT = 125
SOONER = 10  # seconds before pytest's own time-out, which would leave the systemd behind


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the test inside; skip it where that is not possible."""
    if "WITH_SYSTEMD" in os.environ:
        return None
    if os.geteuid() != 0:
        pytest.skip("only root can boot a systemd")
    marker = pyfuncitem.get_closest_marker("timeout")
    patience = float(marker.args[0] if marker else pyfuncitem.config.getini("timeout")) - SOONER
    boot = [sys.executable, str(WITH_SYSTEMD), "--timeout", f"{patience:g}", "--chdir", str(pyfuncitem.config.rootpath)]
    test = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    done = subprocess.run([*boot, "--", *test], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == NO_BOOT:
        pytest.skip(f"no systemd can be booted here: {done.stderr.strip()}")
    if done.returncode:
        pytest.fail(f"inside, with status {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
    return True
