"""How long to leave alone what could not be started, pure: the clock is the caller's."""

# The longest pause before another attempt, in seconds.
LONGEST_PAUSE = 30.0


def pause(failed_starts: int) -> float:
    """How long to wait after n failed starts in a row, in seconds: 1.5ⁿ⁻¹ - 1, at most LONGEST_PAUSE.

    One failed start is an accident and costs no time.
    """
    return float(min(1.5 ** min(max(failed_starts - 1, 0), 20) - 1, LONGEST_PAUSE))


class HoldBack:
    """Of one thing to be started again and again, a slot's worker or a mold."""

    def __init__(self) -> None:
        self.failed_starts = 0  # in a row
        self.until = 0.0  # on the caller's clock, in seconds

    def fail(self, now: float) -> None:
        """One start more has failed."""
        self.failed_starts += 1
        self.until = now + pause(self.failed_starts)

    def forgive(self) -> None:
        """It has worked: start it again at once."""
        self.failed_starts, self.until = 0, 0.0

    def seconds(self, now: float) -> float:
        """For how long it is still left alone."""
        return max(0.0, self.until - now)
