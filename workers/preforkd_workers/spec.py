"""What a mold is told of the service whose workers it forks."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from preforkd_workers.scoreboard import Scoreboard


@dataclass(frozen=True)
class Listener:
    """A bound socket, as those who serve it see it."""

    url: str
    socket: socket.socket


@dataclass(frozen=True)
class Spec:
    """A service in one generation. Times are in seconds."""

    service: str
    generation: int
    target: str
    handler: str | None
    listeners: tuple[Listener, ...]
    preload: bool
    max_packet_size: int  # bytes; 0: as the server class says
    graceful_timeout: float
    eof_timeout: float
    scoreboard: Scoreboard
    master: int  # its pid
    hooks: Mapping[str, str] = field(default_factory=dict)  # by setting: the names of those that there are
    is_rehearsal: bool = False  # find everything, but run no hook
