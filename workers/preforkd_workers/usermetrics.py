"""Metrics of the user's own: what a target counts with prometheus_client finds its way to the daemon's page.

A target that does not import prometheus_client pays nothing for it: all there is then is an entry in ``sys.meta_path``
that waits for the import. Never touches the environment, which every program that a handler runs would inherit.
"""

import os
from types import ModuleType
from typing import TYPE_CHECKING

from preforkd_workers.awaited import Awaited
from preforkd_workers.valuefile import MOLD

if TYPE_CHECKING:
    from preforkd_workers.slotvalues import Say, Values

_MODULE = "prometheus_client.values"

# By these the user has said to prometheus_client where to keep what is counted: then we have no part in it.
_THEIRS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


class UserMetrics:
    """In a mold and its workers. ``directory``: of the files; empty when there is no page to show them."""

    def __init__(self, directory: str, service: str, say: "Say") -> None:
        self.directory = directory
        self.service = service
        self._say = say
        self._slot: int | None = None  # in a worker
        self._values: Values | None = None  # once prometheus_client is imported

    def expect(self) -> None:
        """Take part in the import of prometheus_client, if there will be one."""
        if self.directory:
            Awaited(_MODULE, self._change).expect()

    @property
    def are_there(self) -> bool:
        """Whether the target has any by now."""
        return self._values is not None

    def _change(self, module: ModuleType) -> None:
        theirs = [variable for variable in _THEIRS if variable in os.environ]
        if theirs:
            advice = "unset it to have the target's metrics on this daemon's page"
            self._say("user_metrics_elsewhere", directory=os.environ[theirs[0]], variable=theirs[0], advice=advice)
            return
        from preforkd_workers import slotvalues

        module.ValueClass = slotvalues.Value  # type: ignore[attr-defined]
        self._values = slotvalues.VALUES
        self._attach()

    def keep_what_the_mold_counted(self) -> None:
        """Call in the mold after the import, and before anything is forked."""
        if self._values is not None:
            try:
                self._values.keep_what_the_mold_counted(self.directory, self.service, MOLD)
            except OSError as error:
                self._say("user_metrics_lost", reason=error.strerror)

    def belong_to(self, slot: int, say: "Say") -> None:
        """Call in a worker, as soon as the slot is its own."""
        self._slot, self._say = slot, say
        self._attach()

    def _attach(self) -> None:
        if self._values is not None and self._slot is not None:
            self._values.attach(self.directory, self.service, self._slot, self._say)
