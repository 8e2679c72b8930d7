"""A handler that logs as it is told."""

import logging
import os
import time
from socketserver import StreamRequestHandler

logging.getLogger("own").setLevel(logging.INFO)


class Leveled(StreamRequestHandler):
    """One order a line."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(f"{self.obey(*line.decode().split())}\n".encode())

    def obey(self, order: str, *words: str) -> object:
        match order, words:
            case "pid", ():
                return os.getpid()
            case "say", (name, level, text):
                logging.getLogger(name).log(logging.getLevelName(level), text)
                return "said"
            case "level", (name,):
                return logging.getLevelName(logging.getLogger(name).level)
            case "basic_config", ():
                logging.basicConfig(format="configured: %(name)s %(message)s")
                return len(logging.getLogger().handlers)
            case "set", (name, level):
                logging.getLogger(name).setLevel(level)
                return "set"
            case "spin_until", (name, level):
                self.wfile.write(b"spinning\n")
                deadline = time.monotonic() + 20
                while logging.getLevelName(logging.getLogger(name).level) != level and time.monotonic() < deadline:
                    pass
                return logging.getLevelName(logging.getLogger(name).level)
        return "what?"


def slowly(*_: object) -> None:
    """A hook that takes until somebody has opened the pipe named in GATE to write."""
    with open(os.environ["GATE"]) as gate:
        gate.read()
