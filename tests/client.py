"""Send the words of the command line to a port on this machine, a line each, and print the answer."""

import socket
import sys

if __name__ == "__main__":
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10) as connection:
        connection.sendall("".join(f"{word}\n" for word in sys.argv[2:]).encode())
        connection.shutdown(socket.SHUT_WR)
        print(connection.makefile().read(), end="")  # noqa: T201
