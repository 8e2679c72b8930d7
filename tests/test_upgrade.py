"""An upgrade: another program takes over under the same pid, or nothing has changed and the caller hears why.

What happens in the very middle of it is done by a script in the place of the new interpreter, which runs under the
master's pid before the successor does.
"""

import fcntl
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import preforkd
from preforkd.handover import STATE_VERSION
from preforkd.upgrade import Preflight
from tests.conftest import Serve
from tests.daemon import DEADLINE, eventually, kill, preforkctl
from tests.site import APP, Site, Talk, udp

TWO = 'max_children = 2\nprobation = "0s"'
METRICS = 'metrics = "tcp://127.0.0.1:0"'

# More that a handler may be asked to do, by a line that ``app.py`` does not know.
MORE = """
import glob
import resource
import subprocess


class Probe(Handler):
    def handle(self):
        for line in self.rfile:
            match line.decode().split():
                case ["environment"]:
                    answer = " ".join(os.environ)
                case ["program"]:  # what it inherits: variables, and what its descriptors lead to
                    script = 'import glob, os; print(*os.environ, *map(os.readlink, glob.glob("/proc/self/fd/*")[:-1]))'
                    command = [sys.executable, "-I", "-c", script]
                    answer = subprocess.run(command, close_fds=False, capture_output=True, text=True).stdout.strip()
                case ["limit"]:
                    answer = str(resource.getrlimit(resource.RLIMIT_NOFILE))
                case ["half"]:
                    say(b"half a ")
                    answer = "said"
                case ["line"]:
                    say(b"line\\n")
                    answer = "said"
                case ["linger"]:
                    self.wfile.write(b"waiting\\n")
                    self.rfile.read()
                    while os.path.exists("gate"):
                        time.sleep(0.01)
                    answer = "eof"
                case ["version"]:
                    answer = VERSION
                case ["pid"]:
                    answer = str(os.getpid())
            self.wfile.write(answer.encode() + b"\\n")


def say(text):
    for path in glob.glob("/proc/self/fd/*"):
        try:
            with socket.socket(fileno=os.dup(int(os.path.basename(path)))) as end:
                if end.family == socket.AF_UNIX and end.getpeername() == "":
                    end.send(text)
        except OSError:
            pass


def wait(server, slot):
    while os.path.exists("gate"):
        time.sleep(0.01)
"""

WAITS_AT_IMPORT = """
import os, time
while os.path.exists("gate"):
    time.sleep(0.01)
"""


class Deployment(Site):
    """A site that is upgraded."""

    def __init__(self, directory: Path, serve: Serve) -> None:
        super().__init__(directory, serve)
        self.upgrades = 0
        self.gate = directory / "gate"

    def probes(self, text: str = TWO, daemon: str = "", **keywords: object) -> "Deployment":
        """Start with the handler of MORE."""
        self.write("one", f"import sys{MORE}")
        self.settings(text, daemon)
        settings = self.directory / "preforkd.toml"
        settings.write_text(settings.read_text().replace("app.py:Handler", "app.py:Probe"))
        self.daemon = self.serve("-c", "preforkd.toml", **keywords)
        return self

    def usr2(self) -> None:
        self.daemon.signal(signal.SIGUSR2)

    def upgrade(self, *words: object) -> subprocess.CompletedProcess[str]:
        """By preforkctl, which waits through it; it has been done."""
        done = self.daemon.ctl("upgrade", *words)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr + self.daemon.log.text
        self.upgraded()
        return done

    def upgraded(self, result: str = "done") -> None:
        """Wait for the end of the next upgrade."""
        self.upgrades += 1
        ends = "^upgrade_(done|without_reload|refused) "
        assert self.daemon.log.wait_for(ends, self.upgrades)[1] == result, self.daemon.log.text

    def asks_to_upgrade(self, *words: object) -> "subprocess.Popen[str]":
        """preforkctl, in the background."""
        command = [sys.executable, "-m", "preforkd.ctl", "-s", self.daemon.control, "upgrade", *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")

    def is_settled(self, workers: int = 2) -> bool:
        """Whether there are so many workers, one mold, and nobody else."""
        molds, serving = self.daemon.titled("mold app"), self.daemon.titled("worker app#")
        return (len(molds), len(serving), len(self.daemon.family())) == (1, workers, 1 + workers)

    def script(self, middle: str = "", first: str = "") -> Path:
        """An interpreter that does more: ``middle`` between the execv and the successor, ``first`` in any case."""
        path = self.directory / "python"
        path.write_text(
            f'#!/bin/sh\n{first}\ncase " $* " in *" serve "*)\n{middle}\n:\nesac\nexec {sys.executable} "$@"\n'
        )
        path.chmod(0o755)
        return path


@pytest.fixture
def site(tmp_path: Path, serve: Serve) -> Deployment:
    return Deployment(tmp_path, serve)


def sources(directory: Path, *edits: tuple[str, str, str]) -> Path:
    """A copy of the package with some of it changed: file, what is there, what is to be there."""
    shutil.copytree(Path(str(preforkd.__file__)).parent, directory / "preforkd", ignore=shutil.ignore_patterns("*.pyc"))
    for name, old, new in edits:
        file = directory / "preforkd" / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    return directory


def installed(directory: Path, *edits: tuple[str, str, str]) -> Path:
    """The interpreter of a virtual environment in which another release is installed."""
    copy = sources(directory / "source", *edits)
    library = directory / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    library.mkdir(parents=True)
    path = [str(copy), *sys.path[1:]]
    (library / "other.pth").write_text(f"import sys; sys.path[:0] = {path}\n")
    (directory / "pyvenv.cfg").write_text(f"home = {Path(sys._base_executable).parent}\n")  # type: ignore[attr-defined]
    python = directory / "bin/python"
    python.parent.mkdir()
    python.symlink_to(Path(sys._base_executable).resolve())  # type: ignore[attr-defined]
    return python


def failing(directory: Path) -> Path:
    """A release that fails when it has taken over everything, which no preflight could tell."""
    line = "    master.resume(inherited.release, around, handed.refusal)\n"
    return installed(directory, ("serve.py", line, f'{line}    raise RuntimeError("not today")\n'))


def sockets(pid: int) -> dict[str, str]:
    """The flags of every socket and memfd of a process, by what it is; pairs come and go with workers."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        leads = os.readlink(f"/proc/{pid}/fd/{name}")
        if leads.startswith(("socket:", "/memfd:", "/")):
            match = re.search(r"flags:\s*(\d+)", Path(f"/proc/{pid}/fdinfo/{name}").read_text())
            assert match
            status = os.stat(f"/proc/{pid}/fd/{name}")
            found[f"{leads} {status.st_ino}"] = match[1]
    return found


# What stays.


LISTENERS = """
{metrics}
[services.app]
target = "app.py:Handler"
max_children = 2
probation = "0s"
listen = ["tcp://127.0.0.1:0", "unix:{path}", "unix:@{name}", "fd:{number}"]
[services.datagrams]
target = "app.py:Datagram"
max_children = 1
probation = "0s"
listen = ["udp://127.0.0.1:0"]
"""


def ask_at(address: object, family: int) -> str:
    with socket.socket(family) as client:
        client.settimeout(DEADLINE)
        client.connect(address)  # type: ignore[arg-type]
        client.sendall(b"version\n")
        return client.makefile().readline().strip()


def test_the_new_code_serves_at_the_same_listeners_with_the_same_counters(site: Deployment, tmp_path: Path) -> None:
    name = f"preforkd-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as passed:
        number = passed.fileno()
        text = LISTENERS.format(metrics=METRICS, path=tmp_path / "x", name=name, number=number)
        (tmp_path / "preforkd.toml").write_text(text)
        site.write("one")
        daemon = site.daemon = site.serve("-c", "preforkd.toml", pass_fds=[number])
        ways: list[tuple[Any, int]] = [
            (daemon.address("app"), socket.AF_INET),
            (str(tmp_path / "x"), socket.AF_UNIX),
            (f"\0{name}", socket.AF_UNIX),
            (passed.getsockname(), socket.AF_INET),
        ]

        def answers() -> list[str]:
            with udp(daemon.address("datagrams")) as client:
                client.send(b"?")
                datagram = client.recv(99).decode()
            return [*(ask_at(*way) for way in ways), datagram]

        assert answers() == ["one"] * 5
        before = daemon.metrics()
        open_before = sockets(daemon.pid)
        lock = os.stat(f"{daemon.control}.lock").st_ino
        site.write("two")
        release = preforkd.__version__
        done = site.upgrade()
        assert f"upgrade: done from={release} to={release} generation=2 " in done.stdout
        assert answers() == ["two"] * 5
        # The same descriptors with the same flags: who waits, and what programs inherit.
        open_after = sockets(daemon.pid)
        kept = [what for what in open_before if what in open_after]
        listeners = 5 + 2  # the exporter's and the control socket
        assert len([what for what in kept if what.startswith("socket:")]) >= listeners
        assert any("scoreboard" in what for what in kept)
        assert {what: open_after[what] for what in kept} == {what: open_before[what] for what in kept}
        after = daemon.metrics()
    counted = 'preforkd_requests_total{outcome="ok",service="app"}'
    eventually(lambda: daemon.metrics()[counted] == 8, "counted on")
    assert before["preforkd_start_time_seconds"] == after["preforkd_start_time_seconds"]
    assert preforkctl("-s", daemon.control, "ping").stdout.endswith(f"pid {daemon.pid}\n")
    assert os.stat(f"{daemon.control}.lock").st_ino == lock
    with open(f"{daemon.control}.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_conversation_goes_on_and_its_worker_leaves_when_it_ends(site: Deployment) -> None:
    site.start(TWO)
    with Talk(site.daemon) as talk:
        site.write("two")
        site.upgrade()
        assert talk.ask("version") == "one"
        assert site.versions() == {"two"}
    site.daemon.log.wait_for(rf"^worker_exit .*pid={talk.pid} cause=drained status=0 ")
    eventually(site.is_settled)


def test_those_who_drain_and_their_molds_are_adopted_with_their_deadlines(site: Deployment) -> None:
    site.gate.touch()
    site.probes(f'{TWO}\ngraceful_timeout = "500ms"\neof_timeout = "60s"')
    with Talk(site.daemon) as talk:
        assert talk.ask("linger") == "waiting"
        site.reload()
        site.daemon.log.wait_for(rf"^end_of_file .*pid={talk.pid}")
        site.upgrade()
        site.gate.unlink()
        assert talk.answers.readline() == b"eof\n"
    site.daemon.log.wait_for(rf"^worker_exit .*pid={talk.pid} cause=eof ")
    eventually(site.is_settled)


def test_the_patience_with_a_service_that_was_removed_is_still_its_own(site: Deployment) -> None:
    gone = 'graceful_timeout = "2s"\neof_timeout = "100ms"'
    site.start(
        f'{TWO}\n[services.gone]\ntarget = "app.py:Handler"\nlisten = ["tcp://127.0.0.1:0"]\nmax_children = 1\n{gone}'
    )
    with Talk(site.daemon, "gone") as talk:
        assert talk.ask("forever") == "waiting"
        site.settings(TWO)
        site.reload()
        site.upgrade()
        # After 35 s by default.
        site.daemon.log.wait_for(rf"^worker_exit service=gone .*pid={talk.pid} cause=deadline ")
    eventually(site.is_settled)


def test_a_worker_that_boots_and_one_that_is_being_forked_are_adopted(site: Deployment) -> None:
    site.write("one", MORE)
    site.settings(f'{TWO}\non_worker_start = "wait"')
    daemon = site.daemon = site.serve("-c", "preforkd.toml")
    site.gate.touch()
    first, second = daemon.workers()
    (mold,) = daemon.titled("mold app")
    kill(first)
    daemon.log.wait_for(rf"^worker_exit .*pid={first}\b")
    eventually(lambda: len(daemon.titled("worker app#")) == 2, "one boots")
    os.kill(mold, signal.SIGSTOP)
    kill(second)
    daemon.log.wait_for(rf"^worker_exit .*pid={second}\b")
    (boots,) = daemon.titled("worker app#")
    site.usr2()
    daemon.log.wait_for("^upgraded ")
    os.kill(mold, signal.SIGCONT)
    site.gate.unlink()
    site.upgraded()
    assert daemon.log.matches(rf"^worker_(ready|exit) .*pid={boots}\b")
    eventually(site.is_settled)
    assert site.versions() == {"one"}


def test_a_line_that_was_half_said_is_heard_as_a_whole(site: Deployment) -> None:
    site.probes()
    with Talk(site.daemon) as talk:
        assert talk.ask("half") == "said"
        refused = site.daemon.ctl("upgrade", site.script("echo broken > app.py"))  # or else it says that it leaves
        assert refused.stderr.startswith("upgrade without reload: ")
        assert talk.ask("line") == "said"
        site.daemon.log.wait_for(r"^app#\d\| half a line$")


def test_a_drained_daemon_stays_drained_and_a_scaled_one_scaled(site: Deployment) -> None:
    site.start(TWO)
    assert site.daemon.ctl("scale", "app", 3).returncode == 0
    site.upgrade()
    eventually(lambda: site.is_settled(3))
    assert site.daemon.ctl("drain").returncode == 0
    site.upgrade()
    assert not site.daemon.workers()
    assert "drained" in site.daemon.ctl("status").stdout
    assert site.daemon.ctl("refill").returncode == 0
    eventually(lambda: site.is_settled(3))


def test_many_upgrades_leave_nothing_behind_and_tell_programs_nothing(site: Deployment) -> None:
    limit = ["prlimit", "--nofile=300:400"]
    site.probes(TWO, prefix=limit)
    told = {word: set(site.ask(word).split()) for word in ("environment", "limit")}
    assert site.ask("limit") == "(300, 400)"

    def inherited() -> set[str]:
        return {re.sub(r"\d+", "N", word) for word in site.ask("program").split()}

    told_programs = inherited()
    site.upgrade()
    eventually(site.is_settled)
    descriptors = site.daemon.descriptors()
    for _ in range(9):
        site.usr2()
        site.upgraded()
    eventually(site.is_settled)
    assert site.daemon.descriptors() == descriptors
    assert {word: set(site.ask(word).split()) for word in told} == told
    assert inherited() == told_programs
    eventually(lambda: not site.daemon.zombies(), "no zombie")


def test_settings_that_have_changed_are_taken_up(site: Deployment) -> None:
    site.start(TWO)
    more = '[services.more]\ntarget = "app.py:Handler"\nlisten = ["tcp://127.0.0.1:0"]\n'
    more += 'max_children = 1\nprobation = "0s"'
    site.settings(f'max_children = 3\nprobation = "0s"\n{more}')
    site.upgrade()
    eventually(lambda: (len(site.daemon.workers("app")), len(site.daemon.workers("more"))) == (3, 1))
    assert site.ask("version", "app") == site.ask("version", "more") == "one"


def test_a_listener_is_given_to_a_server_class_as_before(site: Deployment) -> None:
    """In non-blocking mode: the other mode would be that of everybody who holds it, those that serve included."""
    site.write(
        "one",
        """
class Server(TCPServer):
    def server_activate(self):
        self.given = self.socket.gettimeout()
        super().server_activate()


class Given(StreamRequestHandler):
    def handle(self):
        self.rfile.read()
        self.wfile.write(str(self.server.given).encode())
""",
    )
    listen = ("--listen", "tcp://127.0.0.1:0", "--set", "probation=0s")
    site.daemon = site.serve("app.py:Server", "--handler", "app.py:Given", *listen)
    assert site.ask() == "0.0"
    site.upgrade()
    assert site.ask() == "0.0"


# From one to another.


def test_another_release_takes_over_and_both_are_reported(site: Deployment, tmp_path: Path) -> None:
    release = f'__version__ = "{preforkd.__version__}"'
    python = installed(tmp_path / "venv", ("__init__.py", release, '__version__ = "99.1"'))
    site.start(TWO)
    done = site.upgrade(python)
    assert f" from={preforkd.__version__} to=99.1 " in done.stdout
    assert "preforkd 99.1 on CPython" in site.daemon.ctl("ping").stdout
    site.upgrade()
    assert "preforkd 99.1 on CPython" in site.daemon.ctl("ping").stdout
    assert f" from=99.1 to={preforkd.__version__} " in site.upgrade(sys.executable).stdout


def other_python() -> str:
    """An interpreter of another version that has what preforkd needs; ``OTHER_PYTHON`` may say which."""
    names = [f"python3.{minor}" for minor in range(11, 16)]
    found = [os.environ.get("OTHER_PYTHON"), *(shutil.which(name) for name in names)]
    script = "import preforkd.serve, preforkd_workers, sys; print(sys.version_info[:2])"
    for python in filter(None, found):
        said = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
        if said.returncode == 0 and said.stdout.strip() != str(sys.version_info[:2]):
            return python
    pytest.skip("there is no other Python with what preforkd needs (OTHER_PYTHON)")


def test_another_python_takes_over(site: Deployment) -> None:
    python = other_python()
    site.start(TWO)
    before = site.daemon.ctl("ping").stdout
    with Talk(site.daemon) as talk:
        site.upgrade(python)
        assert talk.ask("version") == "one"
    after = site.daemon.ctl("ping").stdout
    assert before != after
    assert before.rpartition(" ")[2] == after.rpartition(" ")[2] == f"{site.daemon.pid}\n"
    assert site.versions() == {"one"}
    site.upgrade(sys.executable)
    assert site.daemon.ctl("ping").stdout == before


# In the middle.


def test_who_dies_during_the_exec_is_reaped_and_replaced(site: Deployment) -> None:
    site.start(TWO)
    worker, _ = site.daemon.workers()
    (mold,) = site.daemon.titled("mold app")
    site.upgrade(site.script(f"kill -9 {worker} {mold}"))
    said = site.daemon.log.wait_for(rf"^worker_exit .*pid={worker} cause=\w+ signal=SIGKILL ")
    assert site.daemon.log.lines.index(said.string) > site.daemon.log.lines.index(
        site.daemon.log.wait_for("^upgraded ").string
    )
    eventually(site.is_settled)
    eventually(lambda: not site.daemon.zombies(), "no zombie")
    assert not site.daemon.log.matches("^stranger_reaped")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("HUP", "^reload_done gen=3"),
        ("USR1", "^lane "),
        ("TTIN", "^resized .* workers=3"),
        ("WINCH", "^draining"),
        ("USR2", "^upgrade_preflight .*"),
        ("TERM", "^stopped status=0"),
        ("QUIT", "^stopped status=0"),
    ],
)
@pytest.mark.parametrize("when", ["in the middle", "just before"])
def test_a_signal_is_answered_by_the_successor(
    site: Deployment, tmp_path: Path, name: str, answer: str, when: str
) -> None:
    if when == "in the middle":
        site.start(TWO)
        python = site.script(f"kill -{name} $$")
    else:  # it has come, but the loop does not turn any more
        line = "        state, needed = self.write_state()\n        if self.watcher"
        sent = f"        os.environ.setdefault('SENT', '') or os.kill(os.getpid(), signal.SIG{name})\n"
        sent += "        os.environ['SENT'] = 'once'\n"
        copy = sources(tmp_path / "copy", ("master.py", line, sent + line))
        path = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
        site.start(TWO, environment={"PYTHONPATH": path})
        python = Path(sys.executable)
    assert site.daemon.ctl("upgrade", "--no-wait", python).returncode == 0
    site.daemon.log.wait_for("^upgraded ")
    site.daemon.log.wait_for(answer, 2 if name == "USR2" else 1)
    if name in ("TERM", "QUIT"):
        assert site.daemon.wait() == 0


def test_what_is_asked_for_during_the_preflight_comes_afterwards(site: Deployment) -> None:
    site.start(TWO)
    site.write("two", WAITS_AT_IMPORT)
    site.gate.touch()
    script = site.script()
    asked = [site.asks_to_upgrade()]
    site.daemon.log.wait_for("^upgrade_preflight ")
    site.daemon.signal(signal.SIGHUP)
    asked += [site.asks_to_upgrade(script)]
    site.daemon.log.wait_for("^command do=upgrade ", 2)
    site.gate.unlink()
    site.upgraded()
    site.upgraded()
    site.daemon.log.wait_for(rf"^handing_over python={script} ")
    for each in asked:
        said, complaint = each.communicate(timeout=DEADLINE)
        assert (each.returncode, complaint) == (0, "")
        assert said.startswith("upgrade: done ")
    assert len(site.daemon.log.matches("^handing_over")) == 2
    assert site.versions() == {"two"}


def test_a_reload_that_is_cut_off_by_an_upgrade_hears_how_that_has_ended(site: Deployment) -> None:
    site.start(TWO)
    site.write("two", WAITS_AT_IMPORT)
    site.gate.touch()
    site.usr2()
    site.daemon.log.wait_for("^upgrade_preflight ")
    command = [sys.executable, "-m", "preforkd.ctl", "-s", site.daemon.control, "reload"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reload:
        site.daemon.log.wait_for("^command do=reload ")
        site.gate.unlink()
        assert reload.communicate(timeout=DEADLINE)[0].startswith("upgrade: done ")
    assert reload.returncode == 0


def test_an_upgrade_asked_for_during_a_reload_comes_after_it(site: Deployment) -> None:
    site.start(TWO)
    site.write("two", WAITS_AT_IMPORT)
    site.gate.touch()
    site.hup()
    site.daemon.log.wait_for("^reload_started ")
    site.usr2()
    site.daemon.signal(signal.SIGTTIN)
    site.daemon.log.wait_for("^resized ")
    assert not site.daemon.log.matches("^upgrade_preflight")
    site.gate.unlink()
    site.upgraded()
    assert len(site.daemon.log.matches("^reload_done ")) == 2
    eventually(lambda: site.is_settled(3))


def test_a_stop_during_the_preflight_ends_it(site: Deployment) -> None:
    site.start(TWO)
    site.write("two", WAITS_AT_IMPORT)
    site.gate.touch()
    asked = site.asks_to_upgrade()
    site.daemon.log.wait_for("^upgrade_preflight ")
    assert site.daemon.stop() == 0
    _, complaint = asked.communicate(timeout=DEADLINE)
    assert (asked.returncode, complaint) == (1, "preforkctl: upgrade refused: the daemon is told to stop\n")


def test_a_stop_that_comes_with_the_end_of_the_preflight_is_a_stop(site: Deployment) -> None:
    site.start(TWO)
    site.write("two", WAITS_AT_IMPORT)
    site.gate.touch()
    site.usr2()
    preflight = int(site.daemon.log.wait_for(r"^upgrade_preflight pid=(\d+)")[1])
    site.daemon.signal(signal.SIGSTOP)
    site.gate.unlink()
    eventually(lambda: preflight in site.daemon.zombies())
    site.daemon.signal(signal.SIGTERM)
    site.daemon.signal(signal.SIGCONT)
    assert site.daemon.wait() == 0
    assert not site.daemon.log.matches("^handing_over")


@pytest.mark.parametrize("end", [lambda preflight: preflight.reap(preflight.pid), Preflight.let_go])
def test_a_preflight_that_ends_as_it_is_heard_is_heard_no_more(end: Callable[[Preflight], object]) -> None:
    with selectors.DefaultSelector() as selector:
        preflight = Preflight("/bin/echo", os.memfd_create("state"), 0.0, selector)
        os.waitid(os.P_PID, preflight.pid, os.WEXITED | os.WNOWAIT)
        ready = selector.select(DEADLINE)
        end(preflight)
        assert len(ready) == 1
        for key, _ in ready:
            key.data()
    with suppress(ChildProcessError):
        os.waitpid(preflight.pid, 0)


# What fails, and costs nothing.


def test_code_that_breaks_during_the_exec_leaves_the_old_code_serving(site: Deployment) -> None:
    site.start(TWO)
    before = site.daemon.workers()
    refused = site.daemon.ctl("upgrade", site.script("echo 'raise ValueError(\"broken\")' > app.py"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("upgrade without reload: services.app:\nTraceback ")
    assert refused.stderr.endswith("ValueError: broken\n")
    assert site.daemon.workers() == before
    assert site.versions() == {"one"}


@pytest.mark.parametrize("again", [False, True])
def test_a_successor_that_cannot_take_over_goes_back(site: Deployment, tmp_path: Path, again: bool) -> None:
    site.start(TWO, METRICS)
    site.ask()
    eventually(lambda: site.daemon.metrics()['preforkd_requests_total{outcome="ok",service="app"}'] == 1)
    before, descriptors = site.daemon.workers(), site.daemon.descriptors()
    python = failing(tmp_path / "venv")
    with Talk(site.daemon) as talk:
        for _ in range(1 + again):
            refused = site.daemon.ctl("upgrade", python)
            assert refused.returncode == 1
            assert refused.stderr.startswith("upgrade refused: Traceback ")
            assert refused.stderr.endswith("RuntimeError: not today\n")
        assert talk.ask("pid") == str(talk.pid)
    site.upgrades += 1 + again
    assert site.daemon.workers() == before
    eventually(lambda: site.daemon.descriptors() == descriptors)
    assert site.versions() == {"one"}
    counted = 'preforkd_requests_total{outcome="ok",service="app"}'
    eventually(lambda: site.daemon.metrics()[counted] == 14)
    site.write("two")
    site.upgrade()
    assert site.versions() == {"two"}


def test_where_there_is_nobody_to_go_back_to_the_workers_finish(site: Deployment, tmp_path: Path) -> None:
    """Both the successor and the one that it goes back to fail: then it is as if the master had died."""
    python = failing(tmp_path / "venv")
    site.start(TWO)
    with Talk(site.daemon) as talk:
        failed = site.daemon.ctl("upgrade", site.script(f'export _PREFORKD_BEFORE={python}; exec {python} "$@"'))
        assert (failed.returncode, site.daemon.wait()) == (1, 1)
        assert talk.ask("pid") == str(talk.pid)
    assert len(site.daemon.log.matches("RuntimeError: not today")) >= 2


def no_change(_: Deployment) -> str | Path:
    return sys.executable


def broken_target(site: Deployment) -> str | Path:
    site.write("two", "raise ValueError('broken')")
    return sys.executable


def broken_settings(site: Deployment) -> str | Path:
    site.settings("max_childrn = 2")
    return sys.executable


def no_execution(site: Deployment) -> str | Path:
    path = site.script()
    path.chmod(0o644)
    if os.access(path, os.X_OK):
        pytest.skip("everything is executable")
    return path


def newer_state(site: Deployment) -> str | Path:
    change = f"STATE_VERSION = {STATE_VERSION}", f"STATE_VERSION = {STATE_VERSION + 1}"
    return installed(site.directory / "venv", ("handover.py", *change))


def other_state(site: Deployment) -> str | Path:
    """The same version by mistake, but one thing more is wanted."""
    return installed(
        site.directory / "venv",
        ("handover.py", "    started: float\n    board", "    started: float\n    more: int\n    board"),
    )


def no_import(site: Deployment) -> str | Path:
    """What only who serves would import is missing."""
    (python := installed(site.directory / "venv")).parents[1].joinpath("source/preforkd/control.py").unlink()
    return python


FAILURES: dict[str, tuple[Callable[[Deployment], str | Path], str]] = {
    "the target is broken": (broken_target, r"ValueError: broken\n$"),
    "the settings are broken": (broken_settings, r"unknown setting 'max_childrn'; did you mean max_children\?\n$"),
    "the interpreter is missing": (lambda _: "/no/such/python", r"/no/such/python.* No such file or directory"),
    "it is not absolute": (lambda _: "python3", r"want an absolute path, not 'python3'\n$"),
    "it is a directory": (lambda _: "/tmp", r"Permission denied"),
    "it is not executable": (no_execution, r"Permission denied"),
    "it does nothing": (lambda _: "/bin/true", r"/bin/true does not run preforkd\n$"),
    "it is not Python": (lambda _: "/bin/echo", r"/bin/echo does not run preforkd\n$"),
    "it has no preforkd": (
        lambda site: site.script(first=f'exec {sys.executable} -I -S "$@"'),
        r"No module named '?preforkd'?\n$",
    ),
    "it dies": (lambda site: site.script(first="kill -9 $$"), r"python ended with status -9\n$"),
    "it talks a lot": (
        lambda site: site.script(first="yes | head -c 3000000; echo at last >&2; exit 3"),
        r"y\nat last\n$",
    ),
    "it knows only a newer state": (
        newer_state,
        rf"a state of version {STATE_VERSION}, and this takes over version {STATE_VERSION + 1}; restart the daemon",
    ),
    "it knows another state": (other_state, r"missing required field `more`; restart the daemon"),
    "it lacks a module": (no_import, r"No module named 'preforkd.control'\n$"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_in_the_preflight_changes_nothing(site: Deployment, what: str) -> None:
    fail, reason = FAILURES[what]
    site.start(f'{TWO}\nboot_timeout = "5s"')
    eventually(site.is_settled)
    family, descriptors = site.daemon.family(), site.daemon.descriptors()
    python = fail(site)
    refused = site.daemon.ctl("upgrade", python)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert re.search(reason, refused.stderr), refused.stderr
    assert not site.daemon.log.matches("^handing_over")
    eventually(lambda: site.daemon.family() == family)
    eventually(lambda: site.daemon.descriptors() == descriptors)  # the connection of who has asked may go last
    assert site.versions() == {"one"}


@pytest.mark.parametrize("does", ["exec sleep 600", "exec yes"])
def test_an_interpreter_that_does_not_end_is_killed_and_the_daemon_answers_meanwhile(
    site: Deployment, does: str
) -> None:
    site.start(f'{TWO}\nboot_timeout = "2s"')
    eventually(site.is_settled)
    family, descriptors = site.daemon.family(), site.daemon.descriptors()
    with site.asks_to_upgrade(site.script(first=does)) as asked:
        site.daemon.log.wait_for("^upgrade_preflight ")
        for _ in range(3):
            assert site.daemon.ctl("ping").returncode == 0
            assert site.versions(1) == {"one"}
        _, complaint = asked.communicate(timeout=2 * DEADLINE)
    assert asked.returncode == 1
    assert complaint.endswith("the new interpreter has not come to an end in time\n")
    assert site.daemon.family() == family
    assert site.daemon.descriptors() == descriptors


def test_a_name_that_is_no_text_makes_an_upgrade_impossible_but_kills_nobody(tmp_path: Path, serve: Serve) -> None:
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(directory)
    Path(directory, "app.py").write_text(APP)
    daemon = serve(f"{directory}/app.py:Handler", "--listen", "tcp://127.0.0.1:0", "--max-children", "1")
    refused = daemon.ctl("upgrade")
    assert refused.returncode == 1
    assert "surrogates not allowed" in refused.stderr
    assert daemon.ask(b"pid\n")


def test_options_behind_two_dashes_stay_there(site: Deployment) -> None:
    site.write("one")
    words = ["--listen", "tcp://127.0.0.1:0", "--set", "probation=0s", "--max-children", "2", "--", "app.py:Handler"]
    site.daemon = site.serve(*words)
    site.write("two")
    site.upgrade()
    assert site.versions() == {"two"}
