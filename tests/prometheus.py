"""A real Prometheus under test: with the configuration and the rules that we ship, in a hurry."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

from tests.daemon import DEADLINE, Daemon, Log, eventually

SHIPPED = Path(__file__).parent.parent / "deploy" / "prometheus"
RULES = (SHIPPED / "preforkd-rules.yml", SHIPPED / "preforkd-alerts.yml")

# How much faster than in our files time passes in tests: a scrape every half second in place of 15 s.
HASTE = 30

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def hurried(text: str) -> str:
    """The same file with every duration shortened: intervals, windows, and how long an alert waits."""
    pattern = r"(?<=: )\d+[smh]$|(?<=\[)\d+[smh](?=\])"
    return re.sub(pattern, lambda found: milliseconds(found[0]), text, flags=re.MULTILINE)


def milliseconds(duration: str) -> str:
    """A duration of our files as it is in a hurry: ``5m`` → ``10000ms``."""
    return f"{int(duration[:-1]) * _SECONDS[duration[-1]] * 1000 // HASTE}ms"


def scraping(daemon: Daemon, name: str = "preforkd") -> str:
    """The scrape config that we ship, for this daemon in place of the one at the usual port."""
    target = "{}:{}".format(*daemon.address("metrics"))
    return _job("preforkd", {"127.0.0.1:9109": target, "daemon: preforkd": f"daemon: {name}"})


def scraping_supervisor(target: str) -> str:
    """The same for the listener of supervisord."""
    return _job("preforkd-supervisor", {"127.0.0.1:9110": target})


def _job(name: str, changes: Mapping[str, str]) -> str:
    """One of the jobs of the scrape config."""
    heading, *jobs = re.split(r"(?m)^(?=  - job_name: )", (SHIPPED / "preforkd-scrape.yml").read_text())
    (text,) = (job for job in jobs if job.startswith(f"  - job_name: {name}\n"))
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return heading + text


class Prometheus:
    """``prometheus`` on a port of its choice, until the end of the block."""

    def __init__(self, directory: Path, scrape: str, rules: Sequence[Path] = RULES) -> None:
        directory.mkdir(exist_ok=True)
        for path in rules:
            (directory / path.name).write_text(hurried(path.read_text()))
        (directory / "prometheus.yml").write_text(
            f"global: {{evaluation_interval: {milliseconds('15s')}, scrape_timeout: {milliseconds('15s')}}}\n"
            f"rule_files: {[path.name for path in rules]}\n{hurried(scrape)}"
        )
        command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        self.process = subprocess.Popen(
            [*command, "--web.listen-address=127.0.0.1:0", "--query.lookback-delta=10s"],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.log = Log(self.process.stderr)
        self.address = ""

    def __enter__(self) -> Self:
        self.address = self.log.wait_for(r'msg="Listening on" address=(\S+)')[1]
        self.log.wait_for("Server is ready")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            self.process.wait()
            self.log.close()
        if kind is None:
            assert not self.log.matches("level=(error|warn)(?!.*Received SIGTERM)"), self.log.text

    def get(self, path: str, **parameters: object) -> Any:
        """What its API answers: the data of it."""
        try:
            with urlopen(f"http://{self.address}/api/v1/{path}?{urlencode(parameters)}", timeout=DEADLINE) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression at this moment: ``metric`` and ``value`` each."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def firing(self) -> dict[str, list[dict[str, Any]]]:
        """The alerts that fire, by name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in self.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found

    def wait_until_fires(self, name: str, deadline: float = 2 * DEADLINE) -> dict[str, Any]:
        """The alert of this name: the first of them."""
        eventually(lambda: name in self.firing(), f"{name} fires", deadline)
        return self.firing()[name][0]

    def wait_until_calm(self, name: str, deadline: float = 2 * DEADLINE) -> None:
        eventually(lambda: name not in self.firing(), f"{name} ends", deadline)

    def wait_until_scraped(self, times: int = 3) -> None:
        """Until every target was scraped so often."""
        counted = f"min(count_over_time(up[{DEADLINE:.0f}s]))"
        eventually(lambda: [int(each["value"][1]) >= times for each in self.query(counted)] == [True], "scraped")
