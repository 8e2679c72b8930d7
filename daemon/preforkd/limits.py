"""The limit on open descriptors: the master needs two for every worker, targets get what they were started with."""

import resource

_inherited = resource.getrlimit(resource.RLIMIT_NOFILE)


def use_all_descriptors() -> None:
    """Raise our soft limit to the hard one (setrlimit(2))."""
    _, hard = _inherited
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def restore() -> None:
    """Back to the limit that we were started with."""
    resource.setrlimit(resource.RLIMIT_NOFILE, _inherited)
