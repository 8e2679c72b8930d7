"""A handler that says as many lines as it is told, in every way that there is. It knows nothing of preforkd."""

# ruff: noqa: T201 - that is what it is for

import ctypes
import logging
import multiprocessing
import os
import subprocess
import sys
from socketserver import StreamRequestHandler

logger = logging.getLogger("app.talk")


class Talk(StreamRequestHandler):
    """A line: how to say it, how many times, and what."""

    def handle(self) -> None:
        for line in self.rfile:
            how, times, *what = line.decode().split()
            for number in range(int(times)):
                say(how, f"{' '.join(what)} {number}")
            self.wfile.write(b"said\n")


def say(how: str, text: str) -> None:
    match how:
        case "print":
            print(text)
        case "stderr":
            print(text, file=sys.stderr)
        case "buffer":
            sys.stdout.buffer.write(f"{text}\n".encode())
            sys.stdout.flush()
        case "long":
            print(text, "x" * 20_000)
        case "part":
            sys.stdout.write(f"{text},")
            sys.stdout.flush()
        case "child":
            child = multiprocessing.get_context("fork").Process(target=sys.stdout.write, args=(text,))
            child.start()
            child.join()
        case "library":
            said = f"{text} {'x' * 200}\n".encode()
            ctypes.CDLL(None).write(2, said, len(said))
        case "program":
            subprocess.run(["echo", text], check=False)
        case "log":
            logger.warning(text, extra={"answer": 42})
        case "exception":
            try:
                raise ValueError(text)
            except ValueError:
                logger.exception("failed")
        case "configure":
            logging.basicConfig(format="mine:%(message)s")
            logger.warning(text)
        case "raise":
            raise ValueError(text)
        case "kill":
            print(text)
            os.kill(os.getpid(), 9)
        case "about":
            for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
                assert stream is not None
                print(
                    *(stream.fileno(), stream.isatty(), stream.encoding, stream.errors, stream.name, stream.mode),
                    *(stream.writable(), stream.line_buffering, stream.buffer.writable(), os.get_blocking(1)),
                )
