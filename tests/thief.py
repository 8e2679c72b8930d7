"""Run a command whose processes stand still now and then: ``python -m tests.thief PROGRAM ARGUMENTS``, pytest say.

So it is where a hypervisor takes the processor away: what two processes do one after the other, without anybody having
seen to that, sooner or later comes the other way round. Needs root and cgroup v2, by whose freezer it is done
(kernel doc, cgroup-v2, ``cgroup.freeze``).

A freeze interrupts waits, as a signal would that nobody hears: where a test counts context switches, or has the kernel
choose by who waits longest, it is this that is seen (test_hardship, "without burning CPU"; test_handover, "that it
woke"). Not for tests/systemd, whose cgroups would be changed.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

# How many are frozen at the same time, how long at most, and for how long each is left alone afterwards, in seconds.
CELLS, LONGEST, REST = 4, 0.2, 0.4

TICK = 0.003
HIERARCHIES = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")


class Group:
    """A cgroup, for as long as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def pids(self) -> list[int]:
        return [*map(int, (self.path / "cgroup.procs").read_text().split())]

    def take(self, pids: list[int]) -> None:
        for pid in pids:
            with suppress(OSError):  # it has left
                (self.path / "cgroup.procs").write_text(str(pid))

    def freeze(self, is_frozen: bool) -> None:
        (self.path / "cgroup.freeze").write_text("1" if is_frozen else "0")


class Thief:
    """Takes processes out of ``town``, where their children are born, into cells, and lets them go again."""

    def __init__(self, town: Group, cells: list[Group]) -> None:
        self.town = town
        self.releases = dict.fromkeys(cells, 0.0)  # monotonic; 0: nobody is there
        self.rests: dict[int, float] = {}

    def steal(self) -> None:
        now = monotonic()
        for cell, release in self.releases.items():
            if release and now >= release:
                self.let_go(cell)
            elif not release and random.random() < 0.3:
                self.catch(cell, [pid for pid in self.town.pids() if self.rests.get(pid, 0.0) < now])

    def catch(self, cell: Group, pids: list[int]) -> None:
        caught = random.sample(pids, min(len(pids), random.choice((1, 1, 1, 2, 3))))
        cell.take(caught)
        cell.freeze(True)
        self.releases[cell] = monotonic() + LONGEST * random.random() ** 2
        self.rests.update(dict.fromkeys(caught, monotonic() + REST))

    def let_go(self, cell: Group) -> None:
        cell.freeze(False)
        self.town.take(cell.pids())
        self.releases[cell] = 0.0


@contextmanager
def groups(count: int) -> Iterator[list[Group]]:
    """So many, side by side; who is in them afterwards is put where all others are."""
    hierarchy = next(path for path in HIERARCHIES if (path / "cgroup.controllers").exists())
    top = Group(hierarchy / f"thief-{os.getpid()}")
    made = [Group(top.path / str(number)) for number in range(count)]
    try:
        yield made
    finally:
        for group in made:
            group.freeze(False)
            for pid in group.pids():
                (hierarchy / "cgroup.procs").write_text(str(pid))
            group.path.rmdir()
        top.path.rmdir()


def main(words: list[str]) -> int:
    """The exit status of the command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with groups(1 + CELLS) as (town, *cells):
        thief = Thief(town, cells)
        join = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(town.path / "cgroup.procs")]
        with subprocess.Popen([*join, *words]) as command:
            try:
                while command.poll() is None:
                    thief.steal()
                    sleep(TICK)
            finally:
                for cell in cells:
                    thief.let_go(cell)
                command.terminate()
        return command.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
