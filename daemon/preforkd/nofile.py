"""The limit on open descriptors: the master needs two for every worker, targets get what they were started with."""

import resource

_inherited = resource.getrlimit(resource.RLIMIT_NOFILE)


def use_all(inherited: tuple[int, int] | None = None) -> None:
    """Raise our soft limit to the hard one (setrlimit(2)). ``inherited``: with what a master before us was started."""
    global _inherited
    _inherited = (inherited[0], inherited[1]) if inherited else _inherited
    resource.setrlimit(resource.RLIMIT_NOFILE, (_inherited[1], _inherited[1]))


def inherited() -> tuple[int, int]:
    """The limit that we were started with, soft and hard."""
    return _inherited


def restore() -> None:
    """Back to the limit that we were started with, or what somebody has left of it since (prlimit(1))."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_inherited[0], hard), min(_inherited[1], hard)))
