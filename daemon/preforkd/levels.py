"""Levels of loggers: what the settings say, and above that what an operator has chosen while the daemon runs.

Loggers are the target's, by name, ``root`` among them, and ``preforkd`` for the daemon's own events. Who has none here
has the level that the target has given it. Nothing is applied here.
"""

import json
from collections.abc import Mapping

from preforkd_workers.scoreboard import LEVELS_LENGTH

# Every level, as logging has them.
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

OWN = "preforkd"  # the logger of the daemon's own events
WHOLE = "debug"  # what that is if nobody has said it
DEFAULT = "default"  # in place of a level: what it would be without an operator


def check_level(name: object) -> str:
    """The level that is called so, in lower case. Raises ValueError with those that there are."""
    found = name.lower() if isinstance(name, str) else ""
    if found not in LEVELS:
        raise ValueError(f"one of {', '.join(LEVELS)}, not {name!r}")
    return found


def levels_in(raw: object) -> dict[str, str]:
    """Levels by logger, from a table or from text such as ``app.mail=debug,root=info``. Raises ValueError."""
    pairs = raw.replace(",", " ").split() if isinstance(raw, str) else raw
    if isinstance(pairs, list) and all(isinstance(pair, str) and "=" in pair for pair in pairs):
        pairs = dict(pair.rsplit("=", 1) for pair in pairs)
    if not isinstance(pairs, dict):
        raise ValueError(f'a table, or a list such as "app.mail=debug,root=info", not {raw!r}')
    found = {}
    for logger, level in pairs.items():
        try:
            found[check_name(logger)] = check_level(level)
        except ValueError as fault:
            raise ValueError(f"of {logger!r}: {fault}") from None
    check_length(found)
    return found


def check_name(logger: str) -> str:
    """The name of a logger, if it may be one. Raises ValueError."""
    if not logger.strip(".") or not logger.isprintable() or " " in logger:
        raise ValueError(f"the name of a logger, such as app.mail or root, not {logger!r}")
    return logger


def check_length(levels: Mapping[str, str]) -> None:
    """Raise ValueError when there are more levels than fit: the settings' and the operator's have half the room."""
    if len(json.dumps(levels)) > LEVELS_LENGTH // 2:
        raise ValueError(f"fewer loggers: their names and levels may have {LEVELS_LENGTH // 2} bytes")


class Levels:
    """Levels by logger. ``declared``: by the settings; ``chosen``: by an operator."""

    def __init__(self, declared: Mapping[str, str], chosen: Mapping[str, str] | None = None) -> None:
        self.declared = dict(declared)
        self.chosen = dict(chosen or {})

    @property
    def in_effect(self) -> dict[str, str]:
        return {**self.declared, **self.chosen}

    @property
    def of_targets(self) -> dict[str, int]:
        """As numbers, without the daemon's own."""
        return {logger: LEVELS[level] for logger, level in self.in_effect.items() if logger != OWN}

    @property
    def own(self) -> str | None:
        """That of the daemon's own events, if somebody has said it."""
        return self.in_effect.get(OWN)

    def choose(self, logger: str, level: str) -> None:
        """Have an operator's choice; DEFAULT takes it back. Raises ValueError, and then nothing has changed."""
        chosen = dict(self.chosen)
        chosen.pop(check_name(logger), None)
        if level.lower() != DEFAULT:
            chosen[logger] = check_level(level)
        check_length(chosen)
        self.chosen = chosen

    def declare(self, declared: Mapping[str, str]) -> None:
        """Have other settings. What an operator has chosen stays, but where they say something else than before."""
        changed = {name for name in {*declared, *self.declared} if declared.get(name) != self.declared.get(name)}
        self.chosen = {name: level for name, level in self.chosen.items() if name not in changed}
        self.declared = dict(declared)
