"""Forks: those of our own, and those that a target makes.

A process that a target forks is a copy of a worker and has no part in what that does: it writes to no row, takes no
request, keeps no line. Whoever has something that a copy is not to go on with says so here. Those that we fork go on
with it, and do nothing about it: whatever they touch is copied for them.
"""

import os
import posix  # for fork as it is: gevent has its own in os
from collections.abc import Callable

_undoings: list[Callable[[], None]] = []
_is_our_own = False


def undo_in_copies(undo: Callable[[], None]) -> None:
    """Have this done in every process that is forked from now on, but for our own."""
    _undoings.append(undo)


def fork() -> int:
    """Fork one of our own. Raises OSError."""
    global _is_our_own
    _is_our_own = True
    try:
        return posix.fork()
    finally:
        _is_our_own = False


def _begin() -> None:
    if not _is_our_own:
        for undo in _undoings:
            undo()


def _spare_threading() -> None:
    """Import threading so that what it does after a fork is not done in one of our own that has had no other thread.

    It makes new locks, for those that other threads may have held, and forgets the others (Lib/threading.py,
    ``_after_fork``). Where there was none this comes to nothing, but it copies pages and takes its time, for every
    worker and before every request of a keeper. Where threading is there already, it does as ever.
    """
    register = os.register_at_fork

    def register_sparingly(*, after_in_child: Callable[[], None] = lambda: None, **others: Callable[[], None]) -> None:
        def begin() -> None:
            if not _is_our_own or threading.active_count() > 1:
                after_in_child()

        register(after_in_child=begin, **others)

    os.register_at_fork = register_sparingly  # type: ignore[assignment]
    try:
        import threading
    finally:
        os.register_at_fork = register


os.register_at_fork(after_in_child=_begin)
_spare_threading()
