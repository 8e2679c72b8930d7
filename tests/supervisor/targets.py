"""Handlers that say a lot on the standard streams. They know nothing of preforkd, nor of supervisord."""

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from socketserver import StreamRequestHandler


class Talker(StreamRequestHandler):
    """Says on a stream what it is told to, and answers when it has done so."""

    def handle(self) -> None:
        for line in self.rfile:
            where, _, words = line.decode().rstrip("\n").partition(" ")
            match where:
                case "print":
                    print(words, flush=True)  # noqa: T201 - what it is for
                case "stderr":
                    print(words, file=sys.stderr, flush=True)  # noqa: T201
                case "write":
                    with suppress(BlockingIOError):  # full; that is for whoever does without print
                        os.write(1, f"{words}\n".encode())
                case "log":
                    logging.getLogger("talker").error(words)
                case "run":
                    subprocess.run(["echo", words])
                case "cat":  # a program that has the connection, and takes as long as its client wants
                    subprocess.run(["cat"], stdin=self.request, stdout=self.request)
                    return
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stdin":  # what a program of a handler's has for it
                    program = subprocess.run(["readlink", "/proc/self/fd/0"], check=True, capture_output=True)
                    self.wfile.write(program.stdout)
                    continue
            self.wfile.write(b"done\n")
