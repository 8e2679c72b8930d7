"""Levels of the target's loggers, as the settings or an operator want them: the standard library's ``logging`` obeys.

They are said in the scoreboard, and looked at there when logging is imported, before a worker serves, and whenever the
master says LOOK. While no level is set, a worker pays nothing for it: its mold has looked. Handlers, filters and
formatters are the target's own, but for the last resort of logging, which writes what no handler is there for: it lets
pass what a level that is set here lets pass. Never configures anything else, so ``basicConfig`` and ``dictConfig`` work
as ever.
"""

import _thread
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from preforkd_workers.awaited import Awaited
from preforkd_workers.copies import undo_in_copies
from preforkd_workers.scoreboard import LAYOUT, Scoreboard

if TYPE_CHECKING:
    from logging import Logger, LogRecord

_MODULE = "logging"


class Levels:
    """In a mold and its workers. Loggers are known by their names, that of the root is ``root``."""

    def __init__(self, board: Scoreboard) -> None:
        self.board = board
        self._logging: Any = None  # the module, once it is imported
        self._seen = -1  # the directory of the scoreboard that was looked at last
        self._wanted: dict[str, int] = {}
        self._set: dict[str, tuple[int, int]] = {}  # by logger: the level that we gave it, and the one that it had
        self._last_resort: tuple[object, int] = None, 0  # the handler that we let more pass, and what it let pass
        self._be_alone()
        undo_in_copies(self._be_alone)  # a thread of the parent's may have been at it

    def _be_alone(self) -> None:
        self._changing = _thread.allocate_lock()

    def expect(self) -> None:
        """Take part in the import of logging, if there will be one."""
        if _MODULE in sys.modules:
            self._logging = sys.modules[_MODULE]
        else:
            Awaited(_MODULE, self._be_there).expect()

    def _be_there(self, logging: ModuleType) -> None:
        self._logging = logging
        self.apply()

    def look(self, complain: Callable[[str, str], object]) -> None:
        """Have the loggers have what the scoreboard says now. In a signal handler.

        A thread does it, for whoever was interrupted may hold a lock that logging wants. ``complain``: called with a
        reason and an advice if there cannot be one.
        """
        if self._logging is not None and self.board.daemon[LAYOUT] != self._seen:
            try:
                _thread.start_new_thread(self.apply, ())
            except RuntimeError as error:
                complain(str(error), "log levels stay as they are; check RLIMIT_NPROC (ulimit -u) and pids.max")

    def apply(self) -> None:
        """Have the loggers have what the scoreboard says, whatever the target has made of them since."""
        if self._logging is None or self._is_idle:
            return
        with self._changing:
            while True:
                self._seen, self._wanted = self.board.levels_now()
                for name in {*self._set, *self._wanted}:
                    self._have(name, self._logging.getLogger(name), self._wanted.get(name))
                if self._wanted:
                    self._open_last_resort()
                if self._seen == self.board.daemon[LAYOUT]:
                    return

    @property
    def _is_idle(self) -> bool:
        """Whether nobody wants a level, as the mold has seen already: a worker does not read that for itself."""
        return not self._set and not self._wanted and self._seen == self.board.daemon[LAYOUT]

    def _have(self, name: str, logger: "Logger", wanted: int | None) -> None:
        """Give a logger a level; None: its own again, unless the target has given it another one meanwhile."""
        ours, theirs = self._set.pop(name, (None, logger.level))
        if logger.level != ours:
            theirs = logger.level
        if wanted is not None:
            self._set[name] = wanted, theirs
        logger.setLevel(theirs if wanted is None else wanted)

    def _open_last_resort(self) -> None:
        handler = self._logging.lastResort
        if handler is not None and handler is not self._last_resort[0]:
            self._last_resort = handler, handler.level
            handler.addFilter(self._passes)
            handler.setLevel(self._logging.NOTSET)

    def _passes(self, record: "LogRecord") -> bool:
        """Whether the last resort writes this: what it would have written, and what a level of ours asks for."""
        if record.levelno >= self._last_resort[1]:
            return True
        logger = self._logging.getLogger(record.name)
        while logger.level == self._logging.NOTSET and logger.parent is not None:
            logger = logger.parent
        return logger.name in self._wanted
