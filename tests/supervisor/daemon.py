"""A real supervisord under test: its programs, what they log, and everybody whom it has ever started."""

import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self
from xmlrpc.client import ServerProxy

import pytest
from supervisor.options import UnhosedConfigParser
from supervisor.xmlrpc import SupervisorTransport

import preforkd
import preforkd_workers
from tests.conftest import TARGETS
from tests.daemon import DEADLINE, Log, eventually

DEPLOY = Path(__file__).parents[2] / "deploy" / "supervisor"
PYTHONPATH = ":".join(str(Path(str(each.__file__)).parents[1]) for each in (preforkd, preforkd_workers))

# Of a configuration file: the options of each of its sections.
Sections = Mapping[str, Mapping[str, object]]


def preforkd_serve(*words: object) -> str:
    """A command line for ``command=``; ``:name`` is a target of ``targets.py``."""
    wanted = [f"{TARGETS}{word}" if str(word).startswith(":") else str(word) for word in words]
    return shlex.join([sys.executable, "-m", "preforkd", "serve", *wanted])


def shipped(file: str, places: Mapping[str, object] | None = None) -> dict[str, dict[str, object]]:
    """The sections of a file under ``deploy/supervisor/``, with nothing replaced but places and how to start us."""
    text = (DEPLOY / file).read_text()
    for place, other in {"preforkd serve": f"{sys.executable} -m preforkd serve", **(places or {})}.items():
        text = text.replace(place, str(other))
    parser = UnhosedConfigParser()
    parser.read_string(text)
    return {section: dict(parser.items(section)) for section in parser.sections()}


def _indented(value: object) -> str:
    """As an option is written, the lines of which after the first are told by their blanks."""
    return str(value).replace("\n", "\n ")


def needs(user: str) -> None:
    """Skip the test where this user cannot run this Python."""
    prefix = ["setpriv", f"--reuid={user}", "--clear-groups", "--"]  # twice, for the first has still root's rights
    try:
        command = [*prefix, "setpriv", "--", sys.executable, "-c", "import preforkd"]
        subprocess.run(command, check=True, capture_output=True, cwd="/", env={**os.environ, "PYTHONPATH": PYTHONPATH})
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{user} cannot run this Python: {error}")


def unused_port() -> int:
    """For what is to be had again and again: nobody has it now, nor is any client given it by the kernel (ip(7))."""
    return int(f"{unused_ten()}0")


def unused_ten() -> str:
    """All but the last digit of ports of which nobody has the first two; as ``unused_port``."""
    lowest_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        ten = random.randrange(103, max(lowest_of_clients, 9999) // 10)
        with ExitStack() as taken, suppress(OSError):
            for port in (10 * ten, 10 * ten + 1):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
            return str(ten)


def listening(metrics: str, directory: Path) -> Sections:
    """The listener as it is shipped, with its metrics at this host and port, and its log in this directory."""
    section = shipped("preforkd-listener.conf")["eventlistener:preforkd"]
    words = ["supervisor", "listener", "--metrics", f"tcp://{metrics}", "--grace", "0"]
    command, log = [sys.executable, "-m", "preforkd", *words], directory / "listener.log"
    return {"eventlistener:preforkd": {**section, "command": shlex.join(command), "stderr_logfile": log}}


class Supervisor:
    """``supervisord -n`` in a directory and a session of its own, reached over a Unix socket.

    ``sections`` are its programs, and whatever else its file is to say. Programs find ``environment``, and an
    ``XDG_RUNTIME_DIR`` of this supervisord alone unless that says otherwise. ``prefix`` comes before its command line.
    """

    def __init__(
        self,
        directory: Path,
        sections: Sections,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.directory, self.prefix = directory, [*prefix]
        self.runtime = Path(tempfile.mkdtemp(prefix="supervisord-"))  # short: a socket's address has 107 bytes
        foreign = "PREFORKD_", "NOTIFY_", "JOURNAL_", "LISTEN_", "WATCHDOG_", "RUNTIME_", "SUPERVISOR_", "XDG_RUNTIME_"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment = {
            **inherited,
            "PYTHONPATH": PYTHONPATH,
            "PYTHONUNBUFFERED": "1",
            "XDG_RUNTIME_DIR": str(self.runtime),
            **(environment or {}),
        }
        self.socket = self.runtime / "supervisor.sock"
        self.configuration = self.runtime / "supervisord.conf"
        self.sections: dict[str, Mapping[str, object]] = {
            "supervisord": {"logfile": self.runtime / "supervisord.log", "childlogdir": self.runtime},
            "unix_http_server": {"file": self.socket},
            "supervisorctl": {"serverurl": f"unix://{self.socket}"},
            "rpcinterface:supervisor": {
                "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
            },
        }
        self.change(sections)
        self._sessions: list[subprocess.Popen[bytes]] = []
        self._said: list[Log] = []  # in each of these
        self._tails: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, Log] = {}

    def change(self, sections: Sections) -> None:
        """Let its file say so as well, from its next start, or ``supervisorctl update``, on."""
        for name, options in sections.items():
            self.sections[name] = {**self.sections.get(name, {}), **options}
        lines = (
            line
            for name, options in self.sections.items()
            for line in (f"[{name}]", *(f"{key}={_indented(value)}" for key, value in options.items()))
        )
        self.configuration.write_text("\n".join(lines) + "\n")

    def make_way_for(self, user: str) -> None:
        """What root does for a program with ``user=``, once a boot, as the files say that we ship."""
        self.runtime.chmod(0o755)
        (self.runtime / "preforkd").mkdir()
        for name in ("x", "x-0", "x-1"):
            directory = self.runtime / "preforkd" / name
            directory.mkdir(0o700)
            shutil.chown(directory, user)

    # Its life.

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        self.socket.unlink(missing_ok=True)
        module = [sys.executable, "-m", "supervisor.supervisord"]
        self.process = subprocess.Popen(
            [*self.prefix, *module, "-n", "-c", str(self.configuration)],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._sessions.append(self.process)
        self._said.append(Log(self.process.stdout))
        self.said.wait_for(r"supervisord started with pid")
        return self

    @property
    def said(self) -> Log:
        """What it prints, since its last start."""
        return self._said[-1]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        """End it and its programs, and see to it that nobody is left behind."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)
                self.process.send_signal(signal.SIGTERM)
            self.process.wait(DEADLINE)
            if kind is None:
                eventually(lambda: not self.family(), "everybody has left")
        finally:
            for pid in self.family():
                os.kill(pid, signal.SIGKILL)
            for process in (*self._sessions, *self._tails.values()):
                if process.poll() is None:
                    process.kill()
                process.wait()
            for log in (*self._said, *self._logs.values()):
                log.close()
            shutil.rmtree(self.runtime)

    def kill(self) -> None:
        """What becomes of its programs then is for the test to see."""
        self.process.kill()
        self.process.wait(DEADLINE)

    @property
    def places(self) -> dict[str, object]:
        """Where the programs that we ship have what they use, and where they have it under test."""
        return {
            "/etc/preforkd": self.runtime,
            "/srv/%(program_name)s": self.directory,
            "/run/preforkd": self.runtime / "preforkd",
            "/var/log": self.runtime,
            "127.0.0.1:911%": f"127.0.0.1:{unused_ten()}%",  # the exporters of a fcgi-program
        }

    def family(self) -> list[int]:
        """Everybody in its sessions but itself, zombies included."""
        sessions = {process.pid for process in self._sessions}
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in sessions and int(name) not in sessions:
                found.append(int(name))
        return found

    def commands(self) -> list[str]:
        """The names of everybody in its sessions (proc(5), comm)."""
        found = []
        for pid in self.family():
            with suppress(OSError):
                found.append(Path(f"/proc/{pid}/comm").read_text().strip())
        return found

    # What it is asked.

    @property
    def rpc(self) -> Any:
        """Its XML-RPC: ``with supervisor.rpc as rpc: rpc.supervisor.getProcessInfo("x")``."""
        return ServerProxy("http://127.0.0.1", transport=SupervisorTransport(None, None, f"unix://{self.socket}"))

    def ctl(self, *words: object) -> subprocess.CompletedProcess[str]:
        """``supervisorctl WORDS``, to its end."""
        command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(self.configuration), *map(str, words)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=DEADLINE)

    def info(self, program: str) -> dict[str, Any]:
        with self.rpc as rpc:
            found: dict[str, Any] = rpc.supervisor.getProcessInfo(program)
        return found

    def state(self, program: str) -> str:
        """``RUNNING``, ``FATAL`` …"""
        return str(self.info(program)["statename"])

    def pid(self, program: str) -> int:
        """That of the master, which is the one that supervisord knows; 0 when it has none."""
        return int(self.info(program)["pid"])

    def until(self, program: str, state: str) -> None:
        """Wait for the state, which supervisord alone can tell."""
        eventually(lambda: self.state(program) == state, f"{program} is {state}")

    # What its programs say.

    def log(self, program: str, stream: str = "stdout") -> Log:
        """What a program has logged, and will: the file that supervisord writes, followed through its rotation."""
        key = f"{program} {stream}"
        if key not in self._logs:
            path = self.info(program)[f"{stream}_logfile"]
            command = ["tail", "-q", "-n", "+1", "--follow=name", "--retry", path]
            tail = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self._tails[key], self._logs[key] = tail, Log(tail.stdout)
        return self._logs[key]

    def address(self, program: str) -> tuple[str, int]:
        """Where its last master listens, of those that bind TCP themselves."""
        log = self.log(program)
        log.wait_for(r"^ready ")
        host, _, port = log.matches(r"^listening service=(?!metrics )\S+ url=tcp://(\S+)")[-1][1].rpartition(":")
        return re.sub(r"[\[\]]", "", host), int(port)
