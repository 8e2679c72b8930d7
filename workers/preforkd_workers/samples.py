"""Handlers to try things with. They use socketserver and nothing of preforkd's."""

import time
from socketserver import DatagramRequestHandler, StreamRequestHandler


class Upper(StreamRequestHandler):
    """Answer every line with the same line in upper case, until the client has no more."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class Echo(StreamRequestHandler):
    """Answer every line with itself."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class EchoDatagram(DatagramRequestHandler):
    """Answer every datagram with itself."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.read())


class Clock(StreamRequestHandler):
    """Say the time (RFC 867, daytime) and hang up."""

    def handle(self) -> None:
        self.wfile.write(time.strftime("%Y-%m-%d %H:%M:%S %z\r\n").encode())
