"""The library's pool of threads as a process: `python -m tests.bench.library`. Like a peer of peers.py otherwise."""

from __future__ import annotations

import signal

from preforkd import ThreadPoolTCPServer
from tests.bench.forked import BACKLOG, end_with_parent
from tests.bench.handlers import Echo
from tests.bench.peers import run_socketserver


class Pooled(ThreadPoolTCPServer):
    request_queue_size = BACKLOG


if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)
    run_socketserver(Pooled(("127.0.0.1", 0), Echo))
