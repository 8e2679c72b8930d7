"""Logs what it is sent, a line each, and takes its logging's configuration over a Unix socket."""

import logging
import logging.config
import socketserver

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")


class Lines(socketserver.StreamRequestHandler):
    """Each line is a level and a message."""

    def handle(self):
        for line in self.rfile:
            level, _, message = line.decode(errors="replace").strip().partition(" ")
            logging.log(logging.getLevelNamesMapping().get(level.upper(), logging.INFO), "%s", message)


def server(address):
    if isinstance(address, tuple):
        return socketserver.TCPServer(address, Lines)
    # listen() gives a thread that would make the server and serve: of it we take the classes.
    thread = logging.config.listen()
    return thread.rcvr(handler=thread.hdlr, verify=thread.verify)
