"""The listener as supervisord runs it, but fed by the test: real programs, and ticks that come when they are wanted."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Self

from tests.daemon import DEADLINE, Log, eventually, samples, scrape
from tests.supervisor.daemon import Supervisor

METRICS = ("--metrics", "tcp://127.0.0.1:0")


class Fed:
    """``preforkd supervisor listener WORDS`` beside the programs of a supervisord."""

    def __init__(self, supervisor: Supervisor, *words: object, environment: Mapping[str, str] | None = None) -> None:
        url = f"unix://{supervisor.socket}"
        ours = {"SUPERVISOR_ENABLED": "1", "SUPERVISOR_SERVER_URL": url}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "preforkd", "supervisor", "listener", *METRICS, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**supervisor.environment, **ours, **(environment or {})},
            cwd="/",
        )
        self.log = Log(self.process.stderr)
        self.serial = 0
        self.said = b""  # on standard output, all of it
        try:
            self._hear(b"READY\n")
            self.log.wait_for("^supervisord_(reached|unreachable)")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up, whereupon it leaves."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            assert self.process.wait(DEADLINE) == 0, self.log.text
        finally:
            self.process.kill()
            self.process.wait()
            self.log.close()

    def tell(self, event: str, payload: str, skipped: int = 0) -> None:
        """Send an event as supervisord does, and wait until it is acknowledged."""
        assert self.process.stdin is not None
        serial, self.serial = self.serial + skipped, self.serial + skipped + 1
        header = f"ver:3.0 server:supervisor serial:{serial} pool:preforkd poolserial:{serial} eventname:{event}"
        self.process.stdin.write(f"{header} len:{len(payload)}\n{payload}".encode())
        self.process.stdin.flush()
        self._hear(b"RESULT 2\nOKREADY\n")

    def _hear(self, wanted: bytes) -> None:
        assert self.process.stdout is not None
        said = b""
        while len(said) < len(wanted) and (more := os.read(self.process.stdout.fileno(), len(wanted) - len(said))):
            said += more
        self.said += said
        assert said == wanted, self.log.text

    def tick(self) -> None:
        self.tell("TICK_5", "when:1700000000")

    def state(self, name: str, to: str, rest: str = "") -> None:
        self.tell(f"PROCESS_STATE_{to}", f"processname:{name} groupname:{name} from_state:STARTING {rest}")

    def rounds(self, program: str, number: int) -> None:
        """Go rounds until this program has been asked so much oftener."""
        for _ in range(number):
            before = self.value("supervisor_healthchecks_total", program)
            self.tick()
            eventually(lambda before=before: self.value("supervisor_healthchecks_total", program) > before)  # type: ignore[misc]

    def page(self) -> str:
        return scrape(self.log.wait_for(r"^listening service=metrics url=tcp(://\S+)").expand(r"http\1"))

    def metrics(self) -> dict[str, float]:
        return samples(self.page())

    def value(self, metric: str, program: str, **more: str) -> float:
        labels = {"group": program, "name": program, **more}
        text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        return self.metrics()[f"{metric}{{{text}}}"]
