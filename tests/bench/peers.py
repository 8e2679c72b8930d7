"""The peers written in Python, each as one process tree: `python -m tests.bench.peers NAME PROCESSES`.

Binds a free port of 127.0.0.1, prints "ready PORT" on standard output and serves until SIGTERM. Never imports
preforkd.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from socketserver import ForkingTCPServer, TCPServer, ThreadingTCPServer, ThreadingUDPServer
from typing import Any, NoReturn, cast

from tests.bench.forked import BACKLOG, announce, end_with_parent, run_forked
from tests.bench.handlers import Datagram, Echo, Talk


class Threading(ThreadingTCPServer):
    request_queue_size = BACKLOG


class Forking(ForkingTCPServer):
    request_queue_size = BACKLOG


class EchoProtocol(asyncio.Protocol):
    """Send back what came first, then hang up: asyncio's low level."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


async def echo_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what came first, then hang up: asyncio's high level."""
    writer.write(await reader.read(8192))
    await writer.drain()
    writer.close()


async def serve_streams(listener: socket.socket) -> None:
    async with await asyncio.start_server(echo_stream, sock=listener, backlog=BACKLOG) as server:
        await server.serve_forever()


async def serve_protocol(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    async with await loop.create_server(EchoProtocol, sock=listener, backlog=BACKLOG) as server:
        await server.serve_forever()


def run_socketserver(server: TCPServer) -> NoReturn:
    """Serve in this process, as the library's documentation shows it, until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    announce(server.socket.getsockname()[1])
    server.serve_forever()
    raise SystemExit(1)


def run_uvloop(serve: Callable[[socket.socket], Coroutine[Any, Any, None]], processes: int) -> NoReturn:
    """As many event loops that share one listening socket."""
    import uvloop  # a peer: the others run without it

    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    run_forked(lambda: uvloop.run(serve(listener)), listener.getsockname()[1], processes)


def main(name: str, processes: int) -> NoReturn:
    end_with_parent(signal.SIGTERM)
    address = ("127.0.0.1", 0)
    match name:
        case "threading":
            run_socketserver(Threading(address, Echo))
        case "threading-talk":
            run_socketserver(Threading(address, Talk))
        case "forking":
            run_socketserver(Forking(address, Echo))
        case "threading-udp":
            run_socketserver(ThreadingUDPServer(address, Datagram))
        case "uvloop-streams":
            run_uvloop(serve_streams, processes)
        case "uvloop-protocol":
            run_uvloop(serve_protocol, processes)
    raise SystemExit(f"peers: {name}: no such peer")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
