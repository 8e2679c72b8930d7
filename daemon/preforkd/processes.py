"""What workers use of the machine, asked from psutil and summed over a service."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import psutil

# Proportional memory makes the kernel walk all page tables of a process: ask at most this often, in seconds.
PSS_EVERY = 30.0


@dataclass(frozen=True)
class Usage:
    """Sums over the workers of a service: bytes, seconds, and a number of descriptors."""

    rss: int
    pss: int
    cpu_seconds: float
    descriptors: int


class Processes:
    """Remembers, between scrapes, what is dear to ask or must never go backwards."""

    def __init__(self) -> None:
        self._pss: dict[str, tuple[float, int]] = {}
        self._cpu_seconds: dict[str, float] = {}

    def usage(self, service: str, pids: Sequence[int], reaped_cpu_seconds: float) -> Usage:
        """What these workers use now. CPU time counts from ``reaped_cpu_seconds``, that of the workers before them."""
        rss, cpu_seconds, descriptors = 0, reaped_cpu_seconds, 0
        processes = []
        for pid in pids:
            try:
                process = psutil.Process(pid)
                with process.oneshot():
                    memory, times = process.memory_info().rss, process.cpu_times()
                    descriptors += process.num_fds()
            except psutil.Error:  # it has died since we read its row, or is none of ours to ask
                continue
            rss += memory
            cpu_seconds += times.user + times.system
            processes.append(process)
        # A worker reaped between two reads is for a moment in neither sum.
        self._cpu_seconds[service] = max(cpu_seconds, self._cpu_seconds.get(service, 0.0))
        return Usage(rss, self._proportional(service, processes), self._cpu_seconds[service], descriptors)

    def _proportional(self, service: str, processes: list[psutil.Process]) -> int:
        asked, pss = self._pss.get(service, (float("-inf"), 0))
        if monotonic() - asked < PSS_EVERY:
            return pss
        pss = sum(map(_pss, processes))
        self._pss[service] = monotonic(), pss
        return pss


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
