"""How a peer of several processes runs: a parent that has bound and waits, and children that serve."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

BACKLOG = 1024  # for every peer: with socketserver's own 5, clients would wait for lost SYNs
PR_SET_PDEATHSIG = 1


def run_forked(serve: Callable[[], None], port: int, processes: int) -> NoReturn:
    """Fork so many that serve, say that we are ready, and wait for SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    parent = os.getpid()
    children = []
    for _ in range(processes):
        if pid := os.fork():
            children.append(pid)
            continue
        end_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            serve()
        os._exit(1)
    announce(port)
    signal.sigwait([signal.SIGTERM])
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise SystemExit(0)


def announce(port: int) -> None:
    sys.stdout.write(f"ready {port}\n")
    sys.stdout.flush()


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send us this signal when our parent is gone: whoever measures may be killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
