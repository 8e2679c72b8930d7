"""What a server offers its handlers beside socketserver's own: ``extend_deadline`` and ``mark``.

A class that has something of its own by these names keeps it. Where there is nobody to hear, they do nothing.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

from preforkd_workers.tally import Tally, here


def extend_deadline(self: Any, seconds: float) -> None:
    """Let the request that the calling lane holds take ``seconds`` longer than ``request_timeout`` says."""


def mark(self: Any, text: str) -> None:
    """Have ``text``, 48 bytes of it, in what is said of the request that the calling lane holds, if it ends badly."""


def offer(server: Any, tallies: Sequence[Tally] = ()) -> None:
    """Have both on a server. ``tallies``: of the lanes of this worker; none: in a process that serves nobody."""

    def held_here() -> Tally | None:
        """A thread of the target's own is no lane, but if there is only one lane, it works for that."""
        found: Tally | None = getattr(here, "tally", tallies[0] if len(tallies) == 1 else None)
        return found

    def extend_deadline_here(self: Any, seconds: float) -> None:
        if (tally := held_here()) is not None:
            tally.extend(seconds)

    def mark_here(self: Any, text: str) -> None:
        if (tally := held_here()) is not None:
            tally.mark(text)

    for name, nothing, do in (("extend_deadline", extend_deadline, extend_deadline_here), ("mark", mark, mark_here)):
        own = getattr(getattr(server, name, nothing), "__func__", getattr(server, name, nothing))
        if own is nothing:
            setattr(server, name, MethodType(do if tallies else nothing, server))
