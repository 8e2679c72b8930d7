"""What the kernel says of processes: children, titles, CPU time, proportional memory. Never signals anyone."""

from __future__ import annotations

import ctypes
import os
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
MIB = 1024  # in KiB, which smaps_rollup counts in


def stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from field 3, the state, on. Raises OSError if there is no such process."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def children(pid: int) -> list[int]:
    """The children of `pid`, zombies included, in order of pid."""
    return sorted(family()[pid])


def descendants(pid: int) -> list[int]:
    """The children of `pid`, their children, and so on."""
    below = family()
    found = list(below[pid])
    for each in found:  # grows while it is gone through
        found.extend(below[each])
    return found


def family() -> defaultdict[int, list[int]]:
    """Every process's children. Processes that end meanwhile are left out."""
    below: defaultdict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                below[int(stat(int(entry.name))[1])].append(int(entry.name))
            except OSError:
                continue
    return below


def title(pid: int) -> str:
    """The command line, or what setproctitle made of it."""
    return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes, all threads, without that of their children, in seconds."""
    return sum(map(time.clock_gettime_ns, map(cpu_clock, pids))) / 1e9


def cpu_clock(pid: int) -> int:
    """The clock of a process's CPU time, which counts in ns: proc_pid_stat(5) does in hundredths of a second."""
    clock = ctypes.c_int()
    if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return clock.value


def pss_mib(pids: list[int]) -> float:
    """Proportional set size of these processes together, in MiB: a page shared by n counts 1/n in each.

    Processes that have ended meanwhile are left out.
    """
    total = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            total += pss_kib(pid)
    return total / MIB


def pss_kib(pid: int) -> int:
    lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
