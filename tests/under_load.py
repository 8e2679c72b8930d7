"""For proofs under load: code that is deployed anew again and again, and the clients of ``load.py`` around it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Self

from tests.daemon import Daemon, eventually
from tests.load import DETAILS

ROOT = Path(__file__).parents[1]

# The code that is deployed: two modules that both know the generation, and answer as load.py wants it.
PART = "GENERATION = {generation}\n"
APP = """
import os
from socketserver import DatagramRequestHandler, StreamRequestHandler, TCPServer, UDPServer

import part

GENERATION = {generation}


def answer(serial, last=False):
    return b"%d %d %d %d%s\\n" % (GENERATION, int(serial), part.GENERATION, os.getpid(), b" last" if last else b"")


class StreamHandler(StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            word, serial = line.split()
            last = word == b"visit" or (word == b"talk" and self.server.draining)
            self.wfile.write(answer(serial, last))
            if last:
                break


class DatagramHandler(DatagramRequestHandler):
    def handle(self):
        self.wfile.write(answer(self.rfile.read().split()[1]))


class Stream(TCPServer):
    pass


class Datagrams(UDPServer):
    pass


def boot(server, slot):
    pass
"""

SERVICES = "stream", "datagrams"

# The target is a server class, so that broken code can override what runs in a worker only.
SETTINGS = """
metrics = "tcp://127.0.0.1:0"
{daemon}

[services.stream]
target = "app:Stream"
handler = "app:StreamHandler"
on_worker_start = "boot"
listen = ["tcp://127.0.0.1:0"]
max_children = {streams}
{service}

[services.datagrams]
target = "app:Datagrams"
handler = "app:DatagramHandler"
on_worker_start = "boot"
listen = ["udp://127.0.0.1:0"]
max_children = {datagrams}
{service}
"""


class Code:
    """The files of the target and the settings, in a directory, and which generation of them was written when."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.generation = 0
        self.written: dict[int, float] = {}  # generation: when, on the monotonic clock

    def deploy(self, after: str = "", *, before: str = "", part: str = PART) -> int:
        """Write the next generation, with this text ``before`` and ``after`` the app's own; which one it is."""
        self.generation += 1
        self.written[self.generation] = monotonic()
        app = before + APP + after
        self._write("part.py", part.replace("{generation}", str(self.generation)))
        self._write("app.py", app.replace("{generation}", str(self.generation)))
        return self.generation

    def settings(self, *, streams: int = 8, datagrams: int = 2, service: str = "", daemon: str = "") -> Path:
        words = {"streams": streams, "datagrams": datagrams, "service": service, "daemon": daemon}
        return self._write("preforkd.toml", SETTINGS.format(**words))

    def _write(self, name: str, text: str) -> Path:
        """Replace the file at once: nobody reads half of it."""
        path = self.directory / name
        fresh = path.with_suffix(".fresh")
        fresh.write_text(text)
        os.replace(fresh, path)
        return path


# Compiled modules are told apart by whole seconds and size (importlib): files that are rewritten faster need this.
NO_BYTECODE = {"PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Seen:
    """What became of the answers of one generation. Times are on the monotonic clock, which all processes share."""

    answers: int
    first_answer: float
    last_connect: float


@dataclass(frozen=True)
class Report:
    """What load.py has counted, by kind of client where there is a mapping."""

    refused: int
    reset: int
    unanswered: int
    wrong: int
    asked: dict[str, int]
    answered: dict[str, int]
    connected: dict[str, int]
    ended: dict[str, int]
    lost: dict[str, int]
    holders: list[int]
    open: int
    generations: dict[str, dict[str, Any]]
    details: list[dict[str, Any]]
    longest: float
    expired: bool
    seen: dict[int, Seen] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", {int(tag): Seen(**fields) for tag, fields in self.generations.items()})

    @property
    def faults(self) -> dict[str, int]:
        """The kinds of fault that there were."""
        counts = {name: getattr(self, name) for name in ("refused", "reset", "unanswered", "wrong")}
        return {name: count for name, count in counts.items() if count}

    def requests(self, service: str) -> int:
        """How many requests there were as the daemon counts them: a long-lived connection is one."""
        if service == "datagrams":
            return self.asked.get("datagram", 0)
        return self.asked.get("visit", 0) + self.connected.get("talk", 0) + self.connected.get("stay", 0)

    def unanswered_by(self, service: str) -> int:
        """Requests to this service that were lost, in whatever way."""
        return sum(count for kind, count in self.lost.items() if (kind == "datagram") == (service == "datagrams"))

    def text(self) -> str:
        """What went wrong."""
        lines = [" ".join(f"{key}={value}" for key, value in each.items()) for each in self.details]
        more = [f"(the first {DETAILS})"] if len(lines) == DETAILS else []
        return "\n".join([str(self.faults), *lines, *more])


def outcomes(daemon: Daemon, service: str) -> dict[str, int]:
    """Requests of the service by outcome as the daemon counts them, without those that are zero."""
    pattern = rf'preforkd_requests_total\{{outcome="(\w+)",service="{service}"\}}'
    found = {m[1]: int(value) for name, value in daemon.metrics().items() if (m := re.fullmatch(pattern, name))}
    return {outcome: count for outcome, count in found.items() if count}


def check_nothing_lost(daemon: Daemon, report: Report, *, with_errors: bool = False) -> None:
    """Every request was answered, rightly, and is counted so by the daemon, some perhaps as errors."""
    assert not report.faults, report.text()
    for service in SERVICES:
        asked = report.requests(service)

        def is_counted(service: str = service, asked: int = asked) -> bool:
            counted = outcomes(daemon, service)
            errors = counted.pop("error", 0) if with_errors else 0
            return counted == {"ok": asked - errors}

        eventually(is_counted, f"all {asked} requests of {service} are counted")  # the last ones only after the answer


def check_losses(daemon: Daemon, report: Report, kills: Mapping[str, int], *, holders: int = 0) -> None:
    """So many workers of a service were killed, each with the request that it held and no other.

    ``holders``: how many held a long-lived connection for certain. A worker that dies right after it has answered loses
    nothing, and is counted as if; one that dies right after it has taken a request loses one that nobody could count.
    """
    assert not report.wrong, report.text()
    assert not report.refused, report.text()
    for service in SERVICES:
        killed = kills.get(service, 0)
        asked = report.requests(service)
        eventually(lambda service=service, least=asked - killed: sum(outcomes(daemon, service).values()) >= least)  # type: ignore[misc]
        counted = outcomes(daemon, service)
        ended = counted.get("ok", 0) + counted.get("error", 0)
        assert counted.get("killed", 0) <= killed
        assert counted.get("killed", 0) >= holders or service == "datagrams"
        assert ended + counted.get("killed", 0) <= asked
        assert report.unanswered_by(service) <= min(killed, asked - ended), report.text()


class Load:
    """The program load.py at work on a daemon with the settings above, or with addresses of its own."""

    def __init__(
        self,
        daemon: Daemon,
        *,
        stream: str | None = "stream",
        datagram: str | None = "datagrams",
        clients: int = 64,
        talkers: int = 3,
        stayers: int = 2,
        **options: float,
    ) -> None:
        words: list[object] = ["--clients", clients, "--talkers", talkers, "--stayers", stayers]
        for name, service in (("--tcp", stream), ("--udp", datagram)):
            if service is not None:
                host, port = daemon.address(service)
                words += [name, f"{host}:{port}"]
        for option, value in options.items():
            words += [f"--{option.replace('_', '-')}", value]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.load", *map(str, words)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def report(self) -> Report:
        """The counts so far."""
        return self._ask("report")

    def after(self, answers: int, kind: str = "visit") -> Report:
        """The counts as soon as so many answers more have come."""
        return self._ask(f"after {kind} {answers}")

    def stop(self) -> Report:
        """Let all requests end; the counts of the whole."""
        report = self._ask("stop")
        assert self.process.wait(60) == 0
        assert report.open == 0
        assert not report.expired, "the load has ended by its own time limit"
        return report

    def _ask(self, word: str) -> Report:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the load ended with {self.process.wait()}"
        return Report(**json.loads(line))
