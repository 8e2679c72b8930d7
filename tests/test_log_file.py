"""The log in a file: what is in it, and that it is followed when it is moved away, by everybody and without a loss."""

import glob
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually
from tests.unheard import TALK

TALKS = (TALK, "--listen", "tcp://127.0.0.1:0", "--set", "probation=0")


def has(path: Path, pattern: str) -> bool:
    return path.exists() and re.search(pattern, path.read_text(), re.MULTILINE) is not None


def holders(daemon: Daemon, path: Path) -> list[tuple[int, str]]:
    """Who of the daemon has this file open, by inode, and under which number."""
    wanted, found = path.stat(), []
    for pid in [daemon.pid, *daemon.family()]:
        for link in glob.glob(f"/proc/{pid}/fd/*"):
            with suppress(FileNotFoundError):  # it has left meanwhile, or closed it
                each = os.stat(link)
                if (each.st_dev, each.st_ino) == (wanted.st_dev, wanted.st_ino):
                    found.append((pid, os.path.basename(link)))
    return found


def test_everything_is_in_the_file_and_until_the_daemon_is_ready_where_it_was_started_too(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "talk.log"
    daemon = serve(*TALKS, "--set", "log_file=talk.log")
    assert daemon.ask(b"print 1 out\nstderr 1 err\nlibrary 1 lib\nlog 1 logged\nraise 1 raised\n") == b"said\n" * 4
    for pattern in ("^ready .* at=", "^out 0$", "^err 0$", "^lib 0 ", "^logged 0$", "^ValueError: raised 0$"):
        assert has(path, pattern), pattern
    assert path.stat().st_mode & 0o777 == 0o640 & ~current_umask()
    assert daemon.stop() == 0
    assert has(path, "^stopped ")
    assert daemon.out.lines == []
    assert daemon.log.lines[-1].startswith("ready ")


def current_umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_usr1_opens_the_file_anew_in_everybody(serve: Serve, tmp_path: Path) -> None:
    """Those that say nothing included, or the room on the disk would never be free again."""
    path, old = tmp_path / "talk.log", tmp_path / "talk.log.1"
    daemon = serve(*TALKS, "--set", f"log_file={path}", "--max-children", 3)
    path.rename(old)
    daemon.signal(signal.SIGUSR1)
    eventually(lambda: has(path, r"^lane service=Talk slot=2"), "the dump is in the new file")
    eventually(lambda: not holders(daemon, old), "nobody holds the old one")
    assert len({pid for pid, _ in holders(daemon, path)}) == 5  # the master, a mold, and three workers
    assert daemon.ask(b"print 1 after\n") == b"said\n"
    assert has(path, "^after 0$")


@pytest.mark.parametrize("removed", [False, True])
def test_a_file_that_was_moved_away_is_noticed(removed: bool, serve: Serve, tmp_path: Path) -> None:
    path, old = tmp_path / "talk.log", tmp_path / "talk.log.1"
    daemon = serve(*TALKS, "--set", f"log_file={path}")
    if removed:
        path.unlink()
    else:
        path.rename(old)
    eventually(path.exists, "there is another one", deadline=5.0)
    assert daemon.ask(b"print 1 after\n") == b"said\n"
    assert has(path, "^after 0$")
    if not removed:
        eventually(lambda: not holders(daemon, old), "nobody holds the old one")


def test_another_file_in_its_place_is_followed_at_the_next_line(serve: Serve, tmp_path: Path) -> None:
    path, other = tmp_path / "talk.log", tmp_path / "other"
    daemon = serve(*TALKS, "--set", f"log_file={path}")
    for number in range(20):
        other.touch()
        other.rename(path)
        assert daemon.ask(b"print 1 line%d\n" % number) == b"said\n"
        assert has(path, f"^line{number} 0$")


def test_where_it_cannot_be_made_anew_that_is_said_and_the_old_one_goes_on(serve: Serve, tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    path, moved = directory / "talk.log", tmp_path / "moved" / "talk.log"
    daemon = serve(*TALKS, "--set", f"log_file={path}")
    directory.rename(tmp_path / "moved")
    daemon.log.wait_for(rf'^log_file_lost path={path} reason="No such file or directory"')
    assert daemon.ask(b"print 1 meanwhile\n") == b"said\n"
    assert has(moved, "^meanwhile 0$")
    assert has(moved, "^log_file_lost ")
    directory.mkdir()
    eventually(path.exists, "it is made as soon as it can be")
    assert daemon.ask(b"print 1 afterwards\n") == b"said\n"
    assert has(path, "^afterwards 0$")
    assert len(daemon.log.matches("^log_file_lost")) == 1


def test_a_file_that_cannot_be_opened_is_a_fault_at_the_start(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(*TALKS, "--set", "log_file=nowhere/talk.log", ready=False)
    assert daemon.wait() == 1
    where = tmp_path / "nowhere"
    assert daemon.log.wait_for(f'^cannot_start reason="log_file: {where}/talk.log: no such directory: {where}"')


def test_check_finds_out_and_makes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "preforkd", "check", *TALKS, "--set"]
    (tmp_path / "directory").mkdir()
    cases = ("talk.log", 0), ("nowhere/talk.log", 78), ("directory", 78)
    for path, status in cases:
        done = subprocess.run(
            [*command, f"log_file={path}"], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE
        )
        assert (done.returncode, "preforkd: log_file: " in done.stderr) == (status, bool(status))
    assert [each.name for each in tmp_path.iterdir()] == ["directory"]


def configured(tmp_path: Path, **settings: str) -> Path:
    """The settings in a file."""
    file = tmp_path / "talk.toml"
    lines = [f'{key} = "{value}"' for key, value in settings.items()]
    module, _, name = TALK.partition(":")
    service = ["[services.Talk]", f'target = "{module}:{name}"', 'listen = ["tcp://127.0.0.1:0"]', "probation = 0"]
    file.write_text("\n".join([*lines, *service]) + "\n")
    return file


def test_a_reload_has_everybody_write_elsewhere_and_otherwise(serve: Serve, tmp_path: Path) -> None:
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    daemon = serve("-c", configured(tmp_path, log_file=str(first)))
    configured(tmp_path, log_file=str(second), log_format="json")
    assert daemon.ctl("reload").returncode == 0
    assert daemon.ask(b"print 1 new\nlog 1 logged\n") == b"said\n" * 2
    assert has(second, "^new 0$")
    assert has(second, r'^\{"at":"[^"]+","level":"info","event":"reload_done"')
    assert has(second, r'^\{"at": "[^"]+", "level": "warning", "event": "log", .*"message": "logged 0"')
    eventually(lambda: not holders(daemon, first), "nobody holds the first one")
    configured(tmp_path)
    assert daemon.ctl("reload").returncode == 0
    daemon.log.wait_for("^reload_done ")
    assert daemon.ask(b"print 1 newest\n") == b"said\n"
    daemon.out.wait_for("^newest 0$")


def test_a_reload_with_a_file_that_cannot_be_opened_is_refused(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "talk.log"
    daemon = serve("-c", configured(tmp_path, log_file=str(path)))
    configured(tmp_path, log_file=f"{tmp_path}/nowhere/talk.log", log_format="json")
    refused = daemon.ctl("reload")
    assert refused.returncode == 1
    assert "log_file: " in refused.stderr
    assert has(path, "^reload_refused ")
    assert daemon.ask(b"print 1 old\n") == b"said\n"
    assert has(path, "^old 0$")


def test_a_reload_that_fails_leaves_the_log_as_it_was(serve: Serve, tmp_path: Path) -> None:
    path, other = tmp_path / "talk.log", tmp_path / "other.log"
    daemon = serve("-c", configured(tmp_path, log_file=str(path)))
    file = configured(tmp_path, log_file=str(other))
    file.write_text(file.read_text().replace(":Talk", ":Nobody"))
    assert daemon.ctl("reload").returncode == 1
    assert has(path, "^reload_rolled_back ")
    mold = daemon.titled("mold Talk")[0]
    os.kill(mold, signal.SIGKILL)
    eventually(lambda: daemon.titled("mold Talk") not in ([mold], []), "there is another mold")
    (mold,) = daemon.titled("mold Talk")
    eventually(lambda: (mold, "1") in holders(daemon, path), "it writes where the old one did")
    assert daemon.ask(b"print 1 old\n") == b"said\n"
    assert has(path, "^old 0$")


def test_an_upgrade_keeps_the_file(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "talk.log"
    daemon = serve(*TALKS, "--set", f"log_file={path}")
    assert daemon.ctl("upgrade").returncode == 0
    assert has(path, "^upgrade_done ")
    assert daemon.ask(b"print 1 after\n") == b"said\n"
    assert has(path, "^after 0$")
    assert not daemon.log.matches("^upgrade")


# With the real logrotate, under load.

CONFIGURATION = """
{path} {{
    rotate 1000
    missingok
    {how}
}}
"""


class Rotation:
    """``logrotate`` of one log, as its timer has it run."""

    def __init__(self, path: Path, how: str) -> None:
        self.path = path
        self.file = path.parent / "rotation.conf"
        self.file.write_text(CONFIGURATION.format(path=path, how=how))
        self.file.chmod(0o644)

    def turn(self) -> None:
        state = self.path.parent / "rotation.state"
        done = subprocess.run(
            ["logrotate", "--force", "--state", state, self.file], capture_output=True, text=True, timeout=DEADLINE
        )
        assert (done.returncode, done.stderr) == (0, "")

    def lines(self) -> Iterator[str]:
        """Of all files that there are by now."""
        for each in self.path.parent.glob(f"{self.path.name}*"):
            text = subprocess.run(["zcat", "--force", each], capture_output=True, check=True).stdout
            yield from text.decode().splitlines()


@contextmanager
def load(daemon: Daemon, names: str, times: int) -> Iterator[Callable[[], bool]]:
    """Clients of these names, each of which has ``times`` lines said, one after the other.

    What is yielded waits until each has had one said from beginning to end, for else the writer may have been about it
    since the last rotation but one; it tells whether they go on.
    """
    said = dict.fromkeys(names, 0)

    def talk(name: str) -> None:
        for number in range(times):
            how = ("print", "stderr")[number % 2]
            assert daemon.ask(f"{how} 1 said-{name}-{number}\n".encode()) == b"said\n"
            said[name] += 1

    def goes_on() -> bool:
        before = dict(said)
        eventually(lambda: all(said[name] >= min(before[name] + 2, times) for name in names), "all go on")
        return min(said.values()) < times

    threads = [threading.Thread(target=talk, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    yield goes_on
    for thread in threads:
        thread.join()


SIGNAL = "    postrotate\n        kill -USR1 {pid}\n    endscript"

ROTATIONS = {
    "created, and told": "create\n" + SIGNAL,
    "created, and nobody told": "create",
    "not created, but told": "nocreate\n" + SIGNAL,
    "compressed one later": "create\n    compress\n    delaycompress\n" + SIGNAL,
}


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="there is no logrotate")
@pytest.mark.parametrize("how", ROTATIONS.values(), ids=ROTATIONS)
def test_a_rotation_loses_no_line(how: str, serve: Serve, tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir(mode=0o755)
    path = directory / "talk.log"
    daemon = serve(*TALKS, "--set", f"log_file={path}")
    rotation = Rotation(path, how.format(pid=daemon.pid))
    turns = 0
    with load(daemon, "abcd", 300) as goes_on:
        while goes_on():
            rotation.turn()
            turns += 1
    assert daemon.stop() == 0
    lines = [*rotation.lines()]
    said = [line for line in lines if line.startswith("said-")]
    assert sorted(said) == sorted(f"said-{name}-{number} 0" for name in "abcd" for number in range(300))
    assert turns > 2
    known = re.compile(r"[a-z_]+ \w+=\S|said-\w-\d+ 0$|(Talk#\d|talk)\| ")
    assert [line for line in lines if not known.match(line)] == []


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="there is no logrotate")
def test_what_is_written_after_a_copytruncate_begins_at_the_beginning(serve: Serve, tmp_path: Path) -> None:
    """logrotate itself loses what comes between its copy and its truncation; nobody makes holes in the file."""
    directory = tmp_path / "logs"
    directory.mkdir(mode=0o755)
    path = directory / "talk.log"
    daemon = serve(*TALKS, "--set", f"log_file={path}")
    rotation = Rotation(path, "copytruncate")
    for number in range(5):
        assert daemon.ask(b"print 5 said-%d\n" % number) == b"said\n"
        rotation.turn()
    with load(daemon, "abcd", 100) as goes_on:
        while goes_on():
            rotation.turn()
    assert daemon.stop() == 0
    lines = [*rotation.lines()]
    assert not any("\0" in line for line in lines)
    assert {f"said-{number} {index}" for number in range(5) for index in range(5)} <= {*lines}


def test_a_disk_that_is_full_is_told_of_once_and_when_it_has_room(serve: Serve, tmp_path: Path) -> None:
    """With a limit of the master's files in its place. What is to be told is not lost, nor does it fill the events."""
    path = tmp_path / "talk.log"
    daemon = serve(*TALKS, "--set", f"log_file={path}", "--metrics", "tcp://127.0.0.1:0")
    dropped = 'preforkd_log_dropped_lines_total{service=""}'
    none = resource.RLIM_INFINITY
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (path.stat().st_size, none))
    for _ in range(5):
        before = daemon.metrics()[dropped]
        daemon.signal(signal.SIGUSR1)
        eventually(lambda before=before: daemon.metrics()[dropped] > before, "its dump is dropped")  # type: ignore[misc]
    assert "log_dropped" not in daemon.ctl("events").stdout
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (none, none))
    eventually(lambda: has(path, "^log_dropped "), "it is told")
    lines = re.findall("^log_dropped lines=([0-9]+) ", path.read_text(), re.MULTILINE)
    assert [float(each) for each in lines] == [daemon.metrics()[dropped]]
    assert daemon.ctl("events").stdout.count("log_dropped") == 1


ON_A_FULL_DISK = """
import os, resource, sys
from preforkd import log
path, unlimited = sys.argv[1], resource.RLIM_INFINITY
log.begin("text", path)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(path).st_size, unlimited))
log.event("kill", pid=1)
log.event("kill", pid=2)
log.look_after()
log.event("kill", pid=3)
log.event("log_dropped", service="Talk", slot=0, lines=10)
log.event("log_dropped", service="Talk", slot=1, lines=5)
log.event("log_dropped", service="Other", slot=2, lines=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
log.event("kill", pid=4)
log.look_after()
"""


def test_what_was_lost_before_and_after_a_look_is_told_in_one(tmp_path: Path) -> None:
    """In one for each service: what could not be told is told with what was lost since."""
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", ON_A_FULL_DISK, path], capture_output=True, text=True, check=True)
    told = [line.rpartition(" at=")[0] for line in path.read_text().splitlines()]
    assert sorted(told) == [
        "kill pid=4",
        "log_dropped lines=3",
        "log_dropped service=Other lines=1",
        "log_dropped service=Talk lines=15",
    ]
