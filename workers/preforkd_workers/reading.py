"""The end of the reading side of a connection: its handler reads end-of-file, as if the client had left.

It is done from signal handlers, perhaps beside threads that close connections and open others meanwhile: never by a
descriptor's number alone.
"""

import _socket
import os
import socket
from contextlib import suppress


def end_reading(request: socket.socket) -> bool:
    """Have whoever reads from a connection read end-of-file, after what has come already. Whether it was still open.

    Through a copy of its descriptor, for the methods of sockets do more: SSLSocket's forgets the session, and gevent's
    raises in who waits.
    """
    with suppress(OSError):
        number = request.fileno()
        copy = _socket.socket(fileno=os.dup(number))
        try:
            if request.fileno() == number:  # or else it was closed meanwhile, and the number may be another's
                copy.shutdown(socket.SHUT_RD)
                return True
        finally:
            copy.close()
    return False
