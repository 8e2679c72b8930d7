"""Metrics of the user's own on the exporter's page: the files of all slots, merged anew for every scrape."""

import os
from collections.abc import Iterator
from urllib.parse import unquote

from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from preforkd import log
from preforkd_workers.scoreboard import Scoreboard
from preforkd_workers.valuefile import Damaged, entries, kind_of, read

# Names that begin so are the daemon's.
OURS = "preforkd_"


class UserMetrics:
    """What the targets count with prometheus_client, added up over slots and services."""

    def __init__(self, board: Scoreboard) -> None:
        self._board = board
        self._told: set[str] = set()

    def merge(self) -> tuple[int, list[Metric]]:
        """How many files are damaged, and the families of all others.

        Kinds are merged apart: should two generations of a target, or two services, mean different things by one name,
        the page shows the one whose kind comes first, and the log says so.
        """
        by_kind, bad = self._examine()
        families: list[Metric] = []
        taken: set[str] = set()
        for kind in sorted(by_kind):
            for metric in self._merged(kind, by_kind[kind]):
                names = {metric.name, *(sample.name for sample in metric.samples)}
                if metric.name.startswith(OURS):
                    self._leave_out(metric.name, "the name is the daemon's")
                elif names & taken:
                    self._leave_out(metric.name, f"another kind than {kind} has the name; a restart frees it")
                else:
                    taken |= names
                    families.append(metric)
        for metric in families:
            for sample in metric.samples if metric.type == "gauge" else ():
                if "pid" in sample.labels:
                    sample.labels["pid"] = unquote(sample.labels["pid"])
        return bad, families

    def _merged(self, kind: str, files: list[str]) -> list[Metric]:
        try:
            return [*MultiProcessCollector.merge(files)]  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever is in the files, the daemon's own metrics are shown
            self._leave_out(kind, f"{type(error).__name__}: {error}")
            return []

    def _examine(self) -> tuple[dict[str, list[str]], int]:
        """The sound files by kind, and how many are damaged."""
        by_kind: dict[str, list[str]] = {}
        bad = 0
        for path in self._files():
            try:
                kind = kind_of(os.path.basename(path))
                for _ in entries(read(path)):
                    pass
            except FileNotFoundError:  # the gauges of a process that has just died
                continue
            except (Damaged, OSError) as error:
                bad += 1
                if path not in self._told:
                    self._told.add(path)
                    log.event("user_metrics_file_skipped", file=path, reason=str(error))
                continue
            by_kind.setdefault(kind, []).append(path)
        return by_kind, bad

    def _files(self) -> Iterator[str]:
        if self._board.user_metrics:
            try:
                names = sorted(os.listdir(self._board.user_metrics))
            except OSError:  # it has been removed under us
                return
            yield from (os.path.join(self._board.user_metrics, name) for name in names if name.endswith(".db"))

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self._told:
            self._told.add(name)
            log.event("user_metric_skipped", name=name, reason=reason)
