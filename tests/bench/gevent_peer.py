"""The peer written with gevent, as its documentation has it: `python -m tests.bench.gevent_peer MODE PROCESSES`.

Modes and output are those of server.c. Never imports preforkd.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before anything else is imported

import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from typing import NoReturn  # noqa: E402

from gevent.server import StreamServer  # noqa: E402

from tests.bench.forked import BACKLOG, end_with_parent, run_forked  # noqa: E402


def echo(connection: socket.socket, address: object) -> None:
    """Send back what came first; gevent hangs up."""
    connection.sendall(connection.recv(8192))


def talk(connection: socket.socket, address: object) -> None:
    """Send back whatever comes, until the client hangs up."""
    while data := connection.recv(8192):
        connection.sendall(data)


def main(mode: str, processes: int) -> NoReturn:
    end_with_parent(signal.SIGTERM)
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    listener.setblocking(False)  # as StreamServer has its own
    handle = {"connect": echo, "persistent": talk}[mode]
    run_forked(lambda: StreamServer(listener, handle).serve_forever(), listener.getsockname()[1], processes)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
