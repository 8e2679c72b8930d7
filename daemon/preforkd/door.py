"""Says in the log how many connections were closed at the door of a service: not each, and not all the time."""

from time import monotonic

from preforkd import log
from preforkd_workers.scoreboard import FULL, LIMITED, Service

# How often it is said, in seconds, if there is something to say.
EVERY = 10.0

# Why a connection was closed, in words, and the word of a row that counts it.
REASONS = {"max_per_client": LIMITED, "full": FULL}


class TurnedAway:
    """What was counted in the rows of a service and not told yet."""

    def __init__(self, name: str, board: Service) -> None:
        self.name = name
        self.board = board
        self._not_before = 0.0
        self._told = self._counts()

    def tell(self) -> None:
        if monotonic() < self._not_before or (counts := self._counts()) == self._told:
            return
        for reason, count in counts.items():
            if more := count - self._told[reason]:
                log.event("turned_away", service=self.name, reason=reason, connections=more)
        self._told, self._not_before = counts, monotonic() + EVERY

    def _counts(self) -> dict[str, int]:
        blocks = [*self.board.blocks()]
        return {reason: sum(rows.total(word) for rows in blocks) for reason, word in REASONS.items()}
