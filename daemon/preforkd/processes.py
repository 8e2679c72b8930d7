"""What workers use of the machine, asked from psutil and summed over a service."""

from collections.abc import Sequence
from time import monotonic

import psutil
from msgspec import Struct

from preforkd.recycling import PSS_EVERY


class Usage(Struct, frozen=True):
    """Sums over the workers of a service: bytes, seconds, and a number of descriptors; of their ratio the greatest."""

    rss: int
    pss: int
    cpu_seconds: float
    descriptors: int
    descriptors_ratio: float


class Processes:
    """Remembers, between scrapes, what is dear to ask or must never go backwards."""

    def __init__(self) -> None:
        self._pss: dict[str, tuple[float, int]] = {}
        self._cpu_seconds: dict[str, float] = {}

    def usage(self, service: str, pids: Sequence[int], reaped_cpu_seconds: float) -> Usage:
        """What these workers use now. CPU time counts from ``reaped_cpu_seconds``, that of the workers before them."""
        rss, cpu_seconds, descriptors, ratio = 0, reaped_cpu_seconds, 0, 0.0
        processes = []
        for pid in pids:
            try:
                process = psutil.Process(pid)
                with process.oneshot():
                    memory, times = process.memory_info().rss, process.cpu_times()
                    opened = process.num_fds()
            except psutil.Error:  # it has died since we read its row, or is none of ours to ask
                continue
            rss += memory
            descriptors += opened
            ratio = max(ratio, _ratio(process, opened))
            cpu_seconds += sum(times[:4])  # with that of the children it has waited for, as when it is reaped
            processes.append(process)
        # A worker reaped between two reads is for a moment in neither sum.
        self._cpu_seconds[service] = max(cpu_seconds, self._cpu_seconds.get(service, 0.0))
        return Usage(rss, self._proportional(service, processes), self._cpu_seconds[service], descriptors, ratio)

    def _proportional(self, service: str, processes: list[psutil.Process]) -> int:
        asked, pss = self._pss.get(service, (float("-inf"), 0))
        if monotonic() - asked < PSS_EVERY:
            return pss
        pss = sum(map(_pss, processes))
        self._pss[service] = monotonic(), pss
        return pss


def descriptors_ratio(pid: int) -> float:
    """Open descriptors as a part of the soft limit of this process; 0 when nobody tells us."""
    try:
        process = psutil.Process(pid)
        return _ratio(process, process.num_fds())
    except psutil.Error:
        return 0.0


def _ratio(process: psutil.Process, opened: int) -> float:
    try:
        limit, _ = process.rlimit(psutil.RLIMIT_NOFILE)  # one call, prlimit(2), where /proc would be a file to parse
    except psutil.Error:
        return 0.0
    return opened / limit if limit > 0 else 0.0  # -1: there is none


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
