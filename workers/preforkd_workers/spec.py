"""What a mold is told of the service whose workers it forks."""

import socket
from dataclasses import dataclass

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
    lock: int = -1  # a descriptor that proves, as long as it is open anywhere, that somebody of us lives
