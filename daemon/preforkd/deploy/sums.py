"""What the deadlines and the sizes of services come to, taken together: rules of arithmetic, and nothing else."""

from collections.abc import Collection
from math import ceil

from preforkd.plan import KILL_TIMEOUT
from preforkd.roster import EXPORTER_SERVICE
from preforkd.settings import Service

# What we allow on top of every sum of deadlines, in seconds: the machine may be busy with just that.
ALLOWANCE = 5.0

# Descriptors of a worker beside those of its lanes: standard streams, listeners, epoll, libraries, an open file or two.
OWN_DESCRIPTORS = 64

# Threads of gevent's own in every worker (its threadpool, for names of hosts and files).
GEVENT_THREADS = 10


def stop_time(services: Collection[Service]) -> float:
    """The longest that a stop takes by the deadlines of the daemon itself, in whole seconds, with an allowance.

    All services stop at a time, each in three steps, of which the last is a signal that leaves the stacks and then one
    that nothing withstands. When the last has gone, the exporter leaves in the same way.
    """
    return ceil(max(map(_steps, services)) + _steps(EXPORTER_SERVICE) + ALLOWANCE)


def _steps(service: Service) -> float:
    return service.graceful_timeout + service.eof_timeout + KILL_TIMEOUT


def tasks(services: Collection[Service], old_generations: int) -> int:
    """Processes and threads, at most: while a reload replaces workers, and those of generations before still drain."""
    generations = 2 + old_generations
    exporter = 2 * generations
    return 1 + exporter + sum(generations * (1 + _crew(service) * _threads(service)) for service in services)


def _crew(service: Service) -> int:
    """Workers of one generation."""
    return service.max_children + service.spare_workers + service.max_surge


def _threads(service: Service) -> int:
    own = {"process": 0, "thread": service.lanes + service.spare_lanes, "gevent": GEVENT_THREADS}
    fresh = service.max_requests == 1  # beside its keeper
    return 1 + own[service.kind] + fresh


def descriptors(services: Collection[Service], old_generations: int, listeners: int) -> int:
    """Open files of the process that has most of them.

    The master needs two for a worker; a worker two for a lane: the client's connection, and one that its handler opens.
    """
    master = 2 * (2 + old_generations) * sum(map(_crew, services))
    worker = max(2 * (service.lanes + service.spare_lanes) for service in services)
    return max(master, worker) + listeners + OWN_DESCRIPTORS
