"""What the benchmark ran on: a name and a version for everything that may change a figure. Never measures."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("gevent", "gunicorn", "uvloop", "prometheus_client", "psutil")
PROGRAMS = {"gcc": "--version", "wrk": "--version"}
PATIENCE = 10.0  # seconds, for a program to tell its version


def in_one_line() -> str:
    return f"machine: {cpu_model()}, {cores()} cores, Linux {platform.release()}, {python()}"


def description() -> dict[str, str]:
    """One thing to an entry, as of now."""
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    found = {
        "CPU": f"{cpu_model()}, {cores()} cores, shared with the load generator",
        "memory": f"{gib:.0f} GiB",
        "kernel": f"Linux {platform.release()} {platform.machine()}",
        "Python": python(),
        "load average": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }
    packages = {name: release for name in PACKAGES if (release := package(name))}
    programs = {name: first_line([name, option]) for name, option in PROGRAMS.items() if shutil.which(name)}
    return found | packages | programs


def cores() -> int:
    return len(os.sched_getaffinity(0))


def python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def first_line(command: list[str]) -> str:
    """Of what a program says: wrk tells its version with a status of 1."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return next(iter((done.stdout + done.stderr).splitlines()), "")
