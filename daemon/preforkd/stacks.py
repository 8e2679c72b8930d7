"""Which lines of a stack are worth reading: it begins with what a worker does, and ends with how that was forked.

And which belong together: faulthandler writes line by line, and nothing at the end.
"""

import os
import re
from collections.abc import Callable
from time import monotonic

import preforkd
import preforkd_workers
from preforkd.log import Journal

# How long after a line another one belongs to the same stack, in seconds.
PAUSE = 0.05

# How long to wait for the first line of a stack that was asked for, in seconds.
PATIENCE = 1.0

_MASTERS, _WORKERS = (re.escape(os.path.dirname(str(each.__file__))) for each in (preforkd, preforkd_workers))
_RUNNERS = r'.*/bin/preforkd"|<frozen (?:runpy|importlib\._bootstrap(?:_external)?)>'
_PLUMBING = re.compile(rf'  File "(?:{_MASTERS}/|{_WORKERS}/(?!lane\.py|samples\.py)|{_RUNNERS})')


def is_plumbing(line: str) -> bool:
    """Whether a line of a stack is about how the code came to run, and not about what it does."""
    return _PLUMBING.match(line) is not None


class Stacks:
    """Lines of stacks, by whose they are, until no more of them come: a stack is logged as one text."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lines: dict[str, list[str]] = {}
        self._due: dict[str, float] = {}  # on the monotonic clock
        self._asked: dict[str, tuple[float, Callable[[], None]]] = {}  # whose we wait for: until when, and what then

    def expect(self, of: str, otherwise: Callable[[], None]) -> None:
        """Somebody was asked for its stacks. If it has not begun to tell them within PATIENCE, do this."""
        self._asked[of] = monotonic() + PATIENCE, otherwise

    def add(self, of: str, line: str) -> None:
        self._asked.pop(of, None)
        self._lines.setdefault(of, []).append(line)
        self._due[of] = monotonic() + PAUSE

    def settle(self, now: float) -> None:
        """Log those that are whole, and ask for those that are missing."""
        for of, (until, otherwise) in [*self._asked.items()]:
            if until <= now:
                del self._asked[of]
                otherwise()
        for of in [of for of, due in self._due.items() if due <= now]:
            self.tell(of)

    def wake_at(self) -> float:
        return min([*self._due.values(), *(until for until, _ in self._asked.values())], default=float("inf"))

    def tell(self, of: str | None = None) -> None:
        """Log what there is: of one, or of all."""
        for each in [*self._lines] if of is None else [of]:
            lines = self._lines.pop(each, [])
            self._due.pop(each, None)
            self._asked.pop(each, None)
            if lines:
                self._journal.text(each, "\n".join(lines))
