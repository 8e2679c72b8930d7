"""Where the workers of a pool come from, as far as the pool knows: a mold in the daemon, a fork in the library."""

import socket
from collections.abc import Sequence
from typing import Protocol

from preforkd.children import Child
from preforkd.wear import Endurance
from preforkd_workers.spec import Limits


class Nursery(Protocol):
    """Of the workers of one generation."""

    @property
    def ready(self) -> bool:
        """Whether a worker can be asked for now."""
        ...

    @property
    def lanes(self) -> int:
        """How many lanes each of its workers has."""
        ...

    @property
    def limits(self) -> Limits:
        """What a request of theirs may take."""
        ...

    @property
    def urls(self) -> Sequence[str]:
        """Of their listeners, in the order in which they number them."""
        ...

    def endurance(self) -> Endurance:
        """What its next worker may come to before it is replaced."""
        ...

    @property
    def may_tell(self) -> bool:
        """Whether it may still tell the pid of a worker that it was asked for."""
        ...

    def spawn(self, child: Child, end: socket.socket) -> int | None:
        """Ask for a worker that keeps ``end`` as its end of the lifeline.

        Returns its pid, or None when ``spawned`` will tell it. Raises OSError when it cannot be had.
        """
        ...

    def lost(self, child: Child, cause: str, failure: str | None) -> None:
        """A worker has died, of a cause of CAUSES. ``failure``: why it could not boot, if it could not."""
        ...
