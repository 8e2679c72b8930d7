"""A network of our own, for what an ordinary machine has not: two interfaces, and nobody else on them."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000  # linux/sched.h

COMMANDS = """
ip link set lo up
ip link add one type veth peer name far-one
ip link add two type veth peer name far-two
ip link set one up
ip link set two up
ip link set far-one up
ip link set far-two up
ip addr add 10.0.1.1/24 dev one
ip addr add 10.0.2.1/24 dev two
ip addr add fd00:1::1/64 dev one
ip addr add fd00:2::1/64 dev two
"""


@contextmanager
def namespace() -> Iterator[None]:
    """The thread, and all processes that it starts, are in a network namespace with interfaces ``one`` and ``two``.

    Skips the test where that may not be.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET):
            pytest.skip(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
        try:
            _furnish()
            yield
        finally:
            assert libc.setns(before, _CLONE_NEWNET) == 0
    finally:
        os.close(before)


def _furnish() -> None:
    for name in ("accept_dad", "dad_transmits"):  # addresses are there at once
        for conf in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{conf}/{name}").write_text("0")
    try:
        for command in COMMANDS.strip().splitlines():
            subprocess.run(command.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no interfaces can be made: {error}")
