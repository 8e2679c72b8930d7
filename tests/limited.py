"""Targets for the daemon under test that ask for more time, leave marks, hang, and turn clients away themselves."""

import os
import ssl
import threading
import time
from socketserver import BaseRequestHandler, TCPServer, ThreadingMixIn
from typing import Any

from tests.targets import Obey


class Limited(Obey):
    """Obeys some more orders, and tells its pid first of all."""

    def handle(self) -> None:
        self.wfile.write(b"%d\n" % os.getpid())
        super().handle()

    def obey(self, order: str, *words: str) -> bytes:
        server: Any = self.server
        match order:
            case "extend":
                server.extend_deadline(float(words[0]))
                return b"extended\n"
            case "mark":
                server.mark(" ".join(words))
                return b"marked\n"
            case "hang":
                self.wfile.write(b"hanging\n")
                threading.Event().wait()
            case "linger":
                self.rfile.read()
                self.wfile.write(b"lingering\n")
                time.sleep(float(words[0]))
                return b"lingered\n"
        return super().obey(order, *words)


class OwnMark(TCPServer):
    """Has something else by the name of ``mark``."""

    def __init__(self, address: Any) -> None:
        super().__init__(address, Limited)
        self.marks: list[str] = []

    def mark(self, text: str) -> None:
        self.marks.append(text)


class Picky(TCPServer):
    """Takes only who begins with an order: anything else fails in ``get_request`` or in ``verify_request``."""

    def __init__(self, address: Any) -> None:
        super().__init__(address, Obey)

    def get_request(self) -> Any:
        request, address = super().get_request()
        if request.recv(1) == b"?":
            request.close()
            raise ConnectionResetError("as told")
        return request, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return bool(request.recv(1) != b"!")


class Threading(ThreadingMixIn, TCPServer):
    """Threads of its own, or lanes in kind ``thread``."""

    daemon_threads = True

    def __init__(self, address: Any) -> None:
        super().__init__(address, Limited)


class Secret(TCPServer):
    """Over TLS, with the certificate and key in the file named in PEM."""

    def __init__(self, address: Any) -> None:
        super().__init__(address, Limited)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # or else OpenSSL lets nobody answer behind it
        self.context.load_cert_chain(os.environ["PEM"])

    def get_request(self) -> Any:
        request, address = super().get_request()
        return self.context.wrap_socket(request, server_side=True), address


class Hang(BaseRequestHandler):
    """Hangs whatever comes."""

    def handle(self) -> None:
        threading.Event().wait()
