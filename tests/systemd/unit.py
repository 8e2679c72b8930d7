"""A unit under test, and clients that do not stop asking."""

import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Self

import preforkd
import preforkd_workers
from tests.conftest import TARGETS
from tests.daemon import DEADLINE, Log, eventually, samples, scrape

UNITS = Path("/run/systemd/system")
PYTHONPATH = ":".join(str(Path(str(each.__file__)).parents[1]) for each in (preforkd, preforkd_workers))

# What a unit of preforkd should say, and what the tests of one kind of restart or another change of it.
SETTINGS = {
    "Type": "notify",
    "ExecReload": "/bin/kill -HUP $MAINPID",
    "KillMode": "mixed",
    "ExitType": "cgroup",
    "Restart": "on-failure",
    "RestartSec": "100ms",
    "FileDescriptorStoreMax": "64",
    "RuntimeDirectory": "under-test",
    "RuntimeDirectoryPreserve": "restart",
}


def systemctl(*words: str) -> str:
    """What it prints. Raises CalledProcessError when it fails."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, f"systemctl {words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def serve(*arguments: object) -> str:
    """The command line; ``:name`` is a target of ``targets.py``."""
    words = [f"{TARGETS}{word}" if str(word).startswith(":") else str(word) for word in arguments]
    return " ".join([sys.executable, "-m", "preforkd", "serve", *words])


class Service:
    """A service unit that is there, started on entering and stopped at the end."""

    def __init__(self, name: str, *, start: bool = True) -> None:
        self.name = name
        self.starts = start

    def __enter__(self) -> Self:
        systemctl("daemon-reload")
        follow = ["journalctl", "--follow", "--lines=all", "--output=cat", "--unit", self.name]
        self._journal = subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.log = Log(self._journal.stdout)
        return self.start() if self.starts else self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["systemctl", "stop", self.name], timeout=DEADLINE, check=False)
        self._journal.kill()
        self._journal.wait()
        self.log.close()

    def start(self) -> Self:
        done = subprocess.run(["systemctl", "start", self.name], capture_output=True, text=True, timeout=DEADLINE)
        journal = ["journalctl", "--output=cat", "--unit", self.name]
        assert done.returncode == 0, subprocess.run(journal, capture_output=True, text=True, check=False).stdout
        return self

    def show(self, key: str) -> str:
        return systemctl("show", "--property", key, "--value", self.name)

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    def processes(self) -> list[int]:
        """Everybody in its control group."""
        group = self.show("ControlGroup")
        if not group:
            return []
        try:
            return [int(pid) for pid in Path(f"/sys/fs/cgroup{group}/cgroup.procs").read_text().split()]
        except OSError:
            return []

    def restarted(self, before: int) -> None:
        """Wait until it serves under another pid than before."""
        eventually(lambda: self.show("SubState") == "running" and self.pid not in (0, before), "it serves again")


class Unit(Service):
    """``preforkd serve ARGUMENTS`` as a service unit of the test's own."""

    def __init__(self, *arguments: object, start: bool = True, **settings: str) -> None:
        super().__init__("under-test", start=start)
        self.settings = {
            "ExecStart": serve(*arguments),
            "Environment": f"PYTHONPATH={PYTHONPATH} PYTHONUNBUFFERED=1",
            "WorkingDirectory": "/",
            **SETTINGS,
            **settings,
        }
        self.write("service", Service=self.settings)

    def change(self, **settings: str) -> None:
        """Let the unit say so from its next start on."""
        self.settings |= settings
        self.write("service", Service=self.settings)
        systemctl("daemon-reload")

    def write(self, kind: str, **sections: dict[str, str]) -> None:
        lines = [line for name, some in sections.items() for line in (f"[{name}]", *map("=".join, some.items()))]
        (UNITS / f"{self.name}.{kind}").write_text("\n".join(lines) + "\n")


def metrics(port: int) -> dict[str, float]:
    """All samples of the exporter."""
    return samples(scrape(f"http://127.0.0.1:{port}"))


class Clients:
    """Clients that ask, each in a thread, one question after the other, until they are told to stop."""

    def __init__(self, ask: Callable[[], bytes], expected: bytes, number: int = 8) -> None:
        self.ask, self.expected = ask, expected
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Condition()
        self._enough = False
        self._threads = [threading.Thread(target=self._run) for _ in range(number)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Counter[str]:
        """How it went for them."""
        self._enough = True
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive(), "a client still waits"
        return self.outcomes

    def _run(self) -> None:
        while not self._enough:
            try:
                answer = self.ask()
                outcome = "answered" if answer == self.expected else f"got {answer!r}"
            except OSError as error:
                outcome = type(error).__name__
            with self._lock:
                self.outcomes[outcome] += 1
                self._lock.notify_all()

    def until_answered(self, more: int) -> None:
        """Wait for so many more answers."""
        with self._lock:
            enough = self.outcomes["answered"] + more
            assert self._lock.wait_for(lambda: self.outcomes["answered"] >= enough, DEADLINE), self.outcomes


def ask_datagram(address: object) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE)
        client.connect(address)  # type: ignore[arg-type]
        client.send(b"question\n")
        return client.recv(99)


def ask_stream(address: object, family: int = socket.AF_INET) -> bytes:
    with socket.socket(family) as client:
        client.settimeout(DEADLINE)
        client.connect(address)  # type: ignore[arg-type]
        client.sendall(b"question\n")
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            return answer.read()
