"""A daemon whose standard output and error go where the test says: to a pipe that nobody reads, to a full device."""

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.daemon import DEADLINE, Daemon, preforkctl

TALK = f"{Path(__file__).parent / 'talkative.py'}:Talk"


class Unheard(Daemon):
    """``redirection`` is what a shell takes for one, such as ``2>&-``. It listens at a Unix socket."""

    def __init__(
        self, directory: Path, redirection: str, *arguments: object, target: str = TALK, **keywords: Any
    ) -> None:
        self.directory = directory
        self._ready, writer = os.pipe()
        shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
        own = ["--ready-fd", writer, "--control", directory / "control.sock", "--metrics", "tcp://127.0.0.1:0"]
        own += ["--set", "probation=0"]
        listen = [] if "-c" in arguments else [target, "--listen", f"unix:{directory}/talk.sock"]
        words: Sequence[object] = ["serve", *listen, *own, *arguments]
        try:
            super().__init__(words, directory, pass_fds=[writer], prefix=shell, **keywords)
        finally:
            os.close(writer)

    def ready(self) -> Self:
        with os.fdopen(self._ready, "rb") as told:
            assert told.readline() == b"\n"
        return self

    @property
    def control(self) -> str:
        return str(self.directory / "control.sock")

    def address(self, service: str | None = None, index: int = 0) -> tuple[str, int]:
        assert service == "metrics"
        report = json.loads(preforkctl("-s", self.control, "status", "--json").stdout)
        url = next(each for each in report["services"] if each["name"] == service)["listeners"][0]["url"]
        return "127.0.0.1", int(url.rpartition(":")[2])

    def say(self, *what: object) -> bytes:
        """Have a worker say it; the answer, when it has."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.connect(str(self.directory / "talk.sock"))
            client.sendall(f"{' '.join(map(str, what))}\n".encode())
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as answer:
                return answer.read()

    def dropped(self) -> dict[str, float]:
        """Lines that were dropped, by service."""
        name = "preforkd_log_dropped_lines_total"
        return {key.split('"')[1]: value for key, value in self.metrics().items() if key.startswith(f"{name}{{")}


class Fifo:
    """A pipe with a name whose reading side we hold, and read when the test says so."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> str:
        """All that is there."""
        found = b""
        try:
            while more := os.read(self._reader, 1 << 20):
                found += more
        except BlockingIOError:
            pass
        return found.decode()

    def leave(self) -> None:
        """Read no more."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
