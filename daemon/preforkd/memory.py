"""The memory cgroup that we are in: what is left of it, and whether the kernel has killed anybody for want of it.

Read from the files of cgroup v2 (admin-guide/cgroup-v2.rst) or v1 (admin-guide/cgroup-v1/memory.rst), wherever they are
mounted; where there are none, there is plenty, and the kernel's own counter tells of kills (``oom_kill`` in
/proc/vmstat). Nothing is ever written.
"""

from collections.abc import Iterator
from functools import cache
from os import PathLike, fspath
from os.path import dirname, exists, isdir, join
from time import monotonic

# How long after a look a kill by the kernel may still be that of the next worker that is found dead, in seconds.
SAME_MOMENT = 1.0

# More than this is what v1 says for "no limit".
_NO_LIMIT = 1 << 60

# By version: the files of the limits, that of what is used, and in memory.stat what of it can be had back at once.
_FILES = {
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}

# Where the kernel counts whom it has killed: the first that can be read.
_COUNTERS = "memory.events.local", "memory.events", "memory.oom_control"


class Memory:
    """What the files say. ``levels``: our cgroup and those above it, as far as they are mounted here; ours first."""

    def __init__(self, version: int, levels: list[str], vmstat: str) -> None:
        self._version = version
        self._levels = levels
        self._counters = [*(join(level, name) for level in levels[:1] for name in _COUNTERS), vmstat]
        self._seen = self._kills()
        self._unclaimed = 0
        self._claim_until = 0.0

    def headroom(self) -> float:
        """Bytes that can still be had before a limit of ours, or of a cgroup above, is reached; infinity: plenty.

        Cached files that nobody uses count as free: the kernel gives them up before it kills.
        """
        if not self._levels:
            return float("inf")
        limits, used, inactive = _FILES[self._version]
        left = float("inf")
        for level in self._levels:
            limit = min(
                (number for name in limits if (number := _number(join(level, name))) is not None), default=_NO_LIMIT
            )
            if limit < _NO_LIMIT:
                cached = _counted(join(level, "memory.stat"), inactive) or 0
                left = min(left, limit - (_number(join(level, used)) or 0) + cached)
        return left

    def has_killed(self) -> bool:
        """Whether the kernel has killed somebody since the last time, and so perhaps the one who was found dead.

        Of several kills each accounts for one death, if it is asked about at once.
        """
        kills, now = self._kills(), monotonic()
        if kills > self._seen:
            self._unclaimed, self._claim_until = kills - self._seen, now + SAME_MOMENT
            self._seen = kills
        if not self._unclaimed or now > self._claim_until:
            return False
        self._unclaimed -= 1
        return True

    def _kills(self) -> int:
        return next((found for path in self._counters if (found := _counted(path, "oom_kill")) is not None), 0)


@cache
def ours() -> Memory:
    """The memory of this process, found once. Ask early: kills count from then on."""
    return find("/proc")


def find(proc: str | PathLike[str]) -> Memory:
    """The memory of the process to which this directory shows ``self``, the system's /proc or one made like it."""
    version, levels = _place(fspath(proc))
    return Memory(version, levels, join(proc, "vmstat"))


def _place(proc: str) -> tuple[int, list[str]]:
    """The version, and the directories from our cgroup up to what is mounted; none where there is nothing to read."""
    try:
        groups = _content(join(proc, "self/cgroup")).splitlines()
        mounts = _content(join(proc, "self/mountinfo")).splitlines()
    except OSError:
        return 2, []
    # cgroups(7): "number:controllers:path", and for v2 "0::path". On a hybrid system v1 may have the memory.
    for line in sorted(groups, key=lambda line: line.startswith("0::")):
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 2 or "memory" in controllers.split(","):
            for mount in mounts:
                levels = [*_levels(mount, version, path)]
                if levels:
                    return version, levels
    return 2, []


def _levels(mount: str, version: int, path: str) -> Iterator[str]:
    """The directories of a cgroup below this mount, a line of mountinfo (proc(5)), if that has memory in it."""
    fields, _, (kind, _, options) = (
        part.split(" ") for part in (*mount.partition(" - ")[:2], mount.partition(" - ")[2])
    )
    if kind != {2: "cgroup2", 1: "cgroup"}[version] or (version == 1 and "memory" not in options.split(",")):
        return
    root, point = fields[3], _unescaped(fields[4])
    inside = path.removeprefix(root if root != "/" else "") if path.startswith(root) else "/"
    directory = join(point, inside.lstrip("/")).rstrip("/")
    if not isdir(directory):  # what we are told is from outside of our container
        directory = point
    level = directory
    while True:
        if any(exists(join(level, name)) for name in (*_COUNTERS, "memory.stat", _FILES[version][1])):
            yield level
        if level == point or dirname(level) == level:
            return
        level = dirname(level)


def _unescaped(path: str) -> str:
    return path.replace("\\040", " ")


def _number(path: str) -> int | None:
    """The number in a file; None for "max", and where there is none to read."""
    try:
        return int(_content(path))
    except (OSError, ValueError):
        return None


def _counted(path: str, name: str) -> int | None:
    """The number behind a name in a file of such lines."""
    try:
        for line in _content(path).splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


def _content(path: str) -> str:
    with open(path) as file:
        return file.read()
