"""The exit statuses. The table in docs/reference.md is printed from here."""

from enum import IntEnum


class Exit(IntEnum):
    """Why preforkd has ended; the numbers from 64 on are those of sysexits.h."""

    STOPPED = 0
    SYSTEM = 1
    USAGE = 2
    TARGET = 70
    SETTINGS = 78


MEANING = {
    Exit.STOPPED: "stopped as asked",
    Exit.SYSTEM: "the system refused something at start: an address in use, a permission, a fork",
    Exit.USAGE: "wrong usage of the command line",
    Exit.TARGET: "the target could not be started: missing, not servable, or it raised, exited, hung or died at boot",
    Exit.SETTINGS: "wrong settings; every fault is named",
}


def reference() -> str:
    """The table as the reference shows it."""
    rows = [f"| {status.value} | {meaning} |" for status, meaning in MEANING.items()]
    return "\n".join(["| status | meaning |", "| --- | --- |", *rows])
