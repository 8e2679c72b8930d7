"""A real daemon under test: started as its users start it, watched through its log, and looked after when it ends."""

import errno
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, ClassVar, Self
from urllib.parse import urlsplit

import pytest

# How long a test waits for what should take milliseconds, in seconds; both cores may be loaded.
DEADLINE = 60.0


def eventually(condition: Callable[[], object], what: str = "", deadline: float = DEADLINE) -> None:
    """Wait until ``condition`` holds: only for what the kernel alone can tell. Anything else is waited for."""
    end = time.monotonic() + deadline
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"not within {deadline} s: {what or condition}"
        pause.wait(0.005)


def kill(pid: int) -> None:
    """SIGKILL, and wait for the end: who is just accepting a connection does that before it dies of it."""
    process = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([process], [], [], DEADLINE)[0], f"{pid} does not die"
    finally:
        os.close(process)


def opened(pid: int) -> list[str]:
    """What a process has open, as the links of its descriptors read (proc(5))."""
    links = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since
            links.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return links


def unprivileged() -> list[str]:
    """What to put before a command so that an ordinary user runs it. Skips the test if none can."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--reuid=61234", "--regid=61234", "--clear-groups"]
    try:
        subprocess.run([*prefix, sys.executable, "-c", "import preforkd"], check=True, capture_output=True, cwd="/")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ordinary user can run this Python: {error}")
    return prefix


def preforkctl(*words: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``preforkctl WORDS`` to its end."""
    command = [sys.executable, "-m", "preforkd.ctl", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, cwd="/")


def scrape(url: str) -> str:
    """The page of an exporter."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=DEADLINE) as page:
        text: str = page.read().decode()
    return text


def samples(page: str) -> dict[str, float]:
    """All values of a page, as ``name{labels}`` with the labels sorted."""
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


class Log:
    """The lines of a pipe, to be waited for. Whoever asks meets all that has been written by then."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._pipe = pipe
        self._number = pipe.fileno()
        os.set_blocking(self._number, False)
        self._rest = b""
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._number, select.POLLIN)
        while not self._ended:
            poll.poll()
            with self._changed:
                self._take()

    def _take(self) -> None:
        """Read what is there."""
        while not self._ended:
            try:
                data = os.read(self._number, 1 << 16)
            except BlockingIOError:
                return
            *whole, self._rest = (self._rest + data).split(b"\n")
            if not data:
                self._ended = True
                whole = [self._rest] if self._rest else []
            self._lines += [line.decode(errors="replace") for line in whole]
            self._changed.notify_all()

    @property
    def lines(self) -> list[str]:
        with self._changed:
            self._take()
            return list(self._lines)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def matches(self, pattern: str) -> list[re.Match[str]]:
        return [match for line in self.lines if (match := re.search(pattern, line))]

    def wait_for(self, pattern: str, times: int = 1, deadline: float = DEADLINE) -> re.Match[str]:
        """The line that matches, the ``times``-th of them."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._find(pattern, times) or self._ended, deadline)
            match = self._find(pattern, times)
        assert arrived, f"no {pattern!r} within {deadline} s in:\n{self.text}"
        assert match, f"ended without {pattern!r}:\n{self.text}"
        return match

    def _find(self, pattern: str, times: int) -> re.Match[str] | None:
        matches = (match for line in self._lines if (match := re.search(pattern, line)))
        return next(islice(matches, times - 1, None), None)

    def finish(self) -> None:
        """Wait until the pipe is closed on the other side by all who had it."""
        self._thread.join(DEADLINE)
        assert self._ended, f"somebody still holds the log:\n{self.text}"

    def close(self) -> None:
        """Call when nobody is left who might write."""
        self.finish()
        self._pipe.close()


def exchange(client: socket.socket, question: bytes) -> bytes:
    """Send, end the sending side, and return all that comes back: nothing, if it was refused with that unread."""
    try:
        client.sendall(question)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            return answer.read()
    except OSError as error:  # which resets the connection
        if error.errno not in (errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE):
            raise
        return b""


class Conversation:
    """A connection that stays open, and what is answered on it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.answers = connection.makefile("rb")

    def close(self) -> None:
        self.answers.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Daemon:
    """``python -m preforkd serve …`` in a directory and a session of its own."""

    kind: ClassVar[dict[str, str]] = {}  # of worker, where a test does not say: a variable for the environment

    def __init__(
        self,
        arguments: Sequence[object],
        directory: Path,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        prefix: Sequence[str] = (),
        runtime: str | None = None,
    ) -> None:
        command = [*prefix, sys.executable, "-m", "preforkd", *map(str, arguments)]
        foreign = "PREFORKD_", "NOTIFY_", "JOURNAL_", "LISTEN_", "WATCHDOG_", "RUNTIME_"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        # Short, for a socket's address has 107 bytes; and a place of its own, so that no test touches the system's.
        self.runtime = runtime or tempfile.mkdtemp(prefix="preforkd-")
        self.has_own_runtime = runtime is None
        if prefix:  # another user
            os.chmod(self.runtime, 0o777)
        self.environment = {**inherited, "XDG_RUNTIME_DIR": self.runtime, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env={**self.kind, **self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self.log = Log(self.process.stderr)
        self.out = Log(self.process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End it if it still runs, and see to it that nobody is left behind."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            self.wait()
            if kind is None:
                eventually(lambda: not self.family(), "everybody has left")
                self.log.finish()
        finally:
            for pid in self.family():
                os.kill(pid, signal.SIGKILL)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            if not self.family():
                self.log.close()
                self.out.close()
            sys.stderr.write(self.log.text)  # which pytest shows of a test that has failed
            if self.has_own_runtime:
                shutil.rmtree(self.runtime)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self) -> Self:
        self.log.wait_for(r"^ready\b")
        return self

    def wait(self, deadline: float = DEADLINE) -> int:
        """Its exit status, when it has ended by itself or by a signal sent before."""
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline} s:\n{self.log.text}") from None

    def stop(self, number: signal.Signals = signal.SIGTERM, deadline: float = DEADLINE) -> int:
        self.process.send_signal(number)
        return self.wait(deadline)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    # Where it listens.

    def url(self, service: str | None = None, index: int = 0) -> str:
        """A URL that it listens on: of this service, or of the first one."""
        name = re.escape(service) if service else r"\S+"
        pattern = rf"^listening service={name} url=(\S+)"
        return self.log.wait_for(pattern, index + 1)[1]

    def address(self, service: str | None = None, index: int = 0) -> tuple[str, int]:
        parts = urlsplit(self.url(service, index))
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def connect(self, service: str | None = None) -> socket.socket:
        return socket.create_connection(self.address(service), DEADLINE)

    def ask(self, question: bytes, service: str | None = None) -> bytes:
        """Send, end the sending side, and return all that comes back."""
        with self.connect(service) as client:
            return exchange(client, question)

    # What it says of itself.

    @property
    def control(self) -> str:
        """The path of its control socket."""
        return self.log.wait_for(r"^control path=(\S+)")[1]

    def ctl(self, *words: object) -> subprocess.CompletedProcess[str]:
        """What ``preforkctl WORDS`` has to say to it."""
        return preforkctl("-s", self.control, *words, environment=self.environment)

    def metrics(self) -> dict[str, float]:
        """All samples of the exporter, as ``name{labels}`` with the labels sorted."""
        host, port = self.address("metrics")
        return samples(scrape(f"http://{host}:{port}"))

    # Its processes.

    def family(self) -> list[int]:
        """Everybody in its session but itself, zombies included."""
        return [pid for pid, fields in _processes() if int(fields[3]) == self.pid and pid != self.pid]

    def alive(self) -> list[int]:
        """Those who are not merely waiting for somebody to collect their exit status."""
        return [pid for pid in self.family() if _is_alive(pid)]

    def titled(self, title: str) -> list[int]:
        """The pids in its session whose process title begins so: ``worker Upper#``, ``mold Upper``."""
        found = []
        for pid in self.family():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(f"preforkd: {title}".encode()):
                found.append(pid)
        return sorted(found)

    def workers(self, service: str | None = None) -> list[int]:
        """The pids of the workers that are ready and alive."""
        name = re.escape(service) if service else r"(?!metrics )\S+"
        said = self.log.matches(rf"^worker_ready service={name} .*\bpid=(\d+)")
        return [int(match[1]) for match in said if _is_alive(int(match[1]))]

    def in_their_lanes(self, service: str | None = None) -> list[int]:
        """The same pids, once each worker waits for clients, and so has every descriptor that it needs for that."""
        pids = self.workers(service)
        eventually(lambda: all("anon_inode:[eventpoll]" in opened(pid) for pid in pids), "all wait for clients")
        return pids

    def descriptors(self) -> int:
        """How many descriptors the master has open."""
        return len(opened(self.pid))

    def zombies(self) -> list[int]:
        return [pid for pid, fields in _processes() if fields[0] == "Z" and int(fields[3]) == self.pid]


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Every process with the fields of its ``/proc/PID/stat`` from the state on (proc(5))."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except OSError:
                continue
            yield int(name), stat.rpartition(")")[2].split()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
