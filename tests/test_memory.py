"""The memory cgroup, of both versions and however it is mounted, read from files made like the kernel's; and ours."""

from math import inf
from pathlib import Path

import pytest

from preforkd.memory import SAME_MOMENT, Memory, find

MOUNT = "31 23 0:28 {root} {point} rw,relatime shared:9 - {kind} {source} {options}"
V1, V2 = {"kind": "cgroup", "options": "rw,memory"}, {"kind": "cgroup2", "options": "rw,nsdelegate"}


class System:
    """A /proc, and a hierarchy of cgroups beside it."""

    def __init__(self, directory: Path) -> None:
        self.proc, self.mount = directory / "proc", directory / "cg roup"
        (self.proc / "self").mkdir(parents=True)
        self.write(self.proc / "vmstat", "nr_free_pages 7\noom_kill 3\n")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def has(self, groups: str, version: dict[str, str], root: str = "/") -> None:
        """What /proc/self says of our cgroups, and one mount of them."""
        point = str(self.mount).replace(" ", "\\040")
        other = MOUNT.format(root="/", point="/nowhere", kind="cgroup", source="none", options="rw,cpu")
        mounted = MOUNT.format(root=root, point=point, source="cgroup", **version)
        self.write(self.proc / "self/cgroup", groups)
        self.write(self.proc / "self/mountinfo", f"{other}\n{mounted}\n")

    def group(self, path: str, **files: object) -> Path:
        directory = self.mount / path
        for name, content in files.items():
            self.write(directory / name.replace("__", "."), f"{content}\n")
        return directory

    def find(self) -> Memory:
        return find(self.proc)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_v2_the_least_of_what_is_left_counts_of_our_group_and_those_above(system: System) -> None:
    system.has("0::/pod/app\n", V2)
    system.group("pod/app", memory__max="max", memory__high=900, memory__current=500, memory__stat="inactive_file 0")
    assert system.find().headroom() == 400
    system.group("pod", memory__max=1000, memory__high="max", memory__current=800, memory__stat="inactive_file 50")
    assert system.find().headroom() == 250
    system.group("pod/app", memory__max=600)
    assert system.find().headroom() == 100
    system.group("pod/app", memory__stat="anon 400\ninactive_file 90")
    assert system.find().headroom() == 190


def test_v2_without_limits_there_is_plenty(system: System) -> None:
    system.has("0::/app\n", V2)
    system.group("app", memory__max="max", memory__high="max", memory__current=500)
    assert system.find().headroom() == inf


def test_v1_the_same_of_its_files(system: System) -> None:
    system.has("4:memory:/app\n1:cpu,cpuacct:/\n0::/\n", V1)
    files = {"memory__limit_in_bytes": 9223372036854771712, "memory__usage_in_bytes": 700}
    system.group("app", **files, memory__stat="inactive_file 1\ntotal_inactive_file 100")
    assert system.find().headroom() == inf
    system.group("app", memory__limit_in_bytes=1000)
    assert system.find().headroom() == 400


@pytest.mark.parametrize("root", ["/docker/abc", "/"])
def test_in_a_container_the_mount_is_ours_whatever_it_is_called_outside(system: System, root: str) -> None:
    system.has("0::/docker/abc\n", V2, root)
    system.group("", memory__max=1000, memory__current=400)
    assert system.find().headroom() == 600


@pytest.mark.parametrize("files", ["none", "nothing mounted", "nonsense"])
def test_where_nothing_can_be_read_there_is_plenty(system: System, files: str) -> None:
    if files == "nothing mounted":
        system.write(system.proc / "self/cgroup", "0::/\n")
        system.write(system.proc / "self/mountinfo", "1 2 0:3 / / rw - ext4 /dev/sda rw\n")
    elif files == "nonsense":
        system.has("0::/app\n", V2)
        system.group("app", memory__max="a lot", memory__current="", memory__stat="inactive_file x", memory__events="?")
    found = system.find()
    assert found.headroom() == inf
    assert not found.has_killed()
    system.write(system.proc / "vmstat", "oom_kill 4\n")
    assert found.has_killed()


@pytest.mark.parametrize(
    ("version", "name"),
    [(V2, "memory__events__local"), (V2, "memory__events"), (V1, "memory__oom_control")],
)
def test_a_kill_is_told_by_the_counter_of_our_group(system: System, version: dict[str, str], name: str) -> None:
    system.has("4:memory:/app\n" if version is V1 else "0::/app\n", version)
    system.group("app", **{name: "oom 2\noom_kill 2\noom_group_kill 0"})
    found = system.find()
    assert not found.has_killed()
    system.write(system.proc / "vmstat", "oom_kill 99\n")  # elsewhere on the machine
    assert not found.has_killed()
    system.group("app", **{name: "oom 4\noom_kill 4"})
    assert [found.has_killed() for _ in range(3)] == [True, True, False]


def test_a_kill_that_nobody_asked_about_for_long_is_not_that_of_the_next_who_dies(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("preforkd.memory.monotonic", lambda: now)
    system.has("0::/app\n", V2)
    system.group("app", memory__events="oom_kill 0")
    found = system.find()
    system.group("app", memory__events="oom_kill 3")
    assert found.has_killed()
    now += SAME_MOMENT
    assert found.has_killed()
    now += 0.001
    assert not found.has_killed()


def test_the_files_of_this_machine_are_understood() -> None:
    found = find(Path("/proc"))
    assert found.headroom() > 0
    assert not found.has_killed()
