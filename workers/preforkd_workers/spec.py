"""What a mold is told of the service whose workers it forks."""

import os
import socket
from collections.abc import Mapping

from msgspec import Struct, field

from preforkd_workers.resources import Resources
from preforkd_workers.scoreboard import Scoreboard


class Listener(Struct, frozen=True):
    """A bound socket, as those who serve it see it."""

    url: str
    socket: socket.socket


class Limits(Struct, frozen=True):
    """What a request, and what a client, may take of a service. Times are in seconds; 0: there is no such limit."""

    request_timeout: float = 0.0
    request_timeout_grace: float = 0.0
    idle_timeout: float = 0.0
    max_per_client: int = 0
    ipv4_prefix: int = 32  # how many bits of an address make a client
    ipv6_prefix: int = 64
    closes_when_full: bool = False

    @property
    def has_door(self) -> bool:
        """Whether it is asked after every accept if the connection may stay."""
        return bool(self.max_per_client) or self.closes_when_full


UNLIMITED = Limits()

DAEMONS_LOG = "-"  # in place of the path of an access log


class Log(Struct, frozen=True):
    """How the daemon's log is written."""

    format: str = "text"  # or "json", or "journal"
    file: str = ""  # its path; empty: it is standard error


class Spec(Struct, frozen=True):
    """A service in one generation. Times are in seconds."""

    service: str
    generation: int
    target: str
    handler: str | None
    listeners: tuple[Listener, ...]
    kind: str  # of worker: process, thread or gevent
    lanes: int  # of each worker
    preload: bool
    max_packet_size: int  # bytes; 0: as the server class says
    graceful_timeout: float
    eof_timeout: float
    scoreboard: Scoreboard
    master: int  # its pid
    resources: Resources = Resources()
    hooks: Mapping[str, str] = field(default_factory=dict)  # by setting: the names of those that there are
    fork_safety: str = "warn"  # or "refuse": what comes of what the audit finds
    limits: Limits = UNLIMITED
    is_rehearsal: bool = False  # find everything, but run no hook
    user_metrics: str = ""  # directory of the files in which the target's own metrics are kept; empty: they are not
    access_log: str = ""  # its path, or DAEMONS_LOG; empty: there is none
    access_log_format: str = ""  # as accessline.py has it
    args: tuple[str, ...] = ()  # of a script
    server: int = 1  # which of those that a script makes
    log: Log = Log()
    kept_files: tuple[str, ...] = ()  # socket files that a script must not remove, in the way of a reload


MODULE = "-m "  # so begins the target that is a module, to be run as ``python -m`` does


def is_script(target: str) -> bool:
    """Whether a target is run, as ``path/to/file.py`` and ``-m module`` are, and not looked up as ``module:name``."""
    is_file = ":" not in target and (target.endswith(".py") or os.sep in target)
    return is_file or target.startswith(MODULE)
