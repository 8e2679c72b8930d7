"""The handlers of the benchmark, for preforkd and for socketserver's own servers. Never import anything of ours."""

from socketserver import BaseRequestHandler


class Echo(BaseRequestHandler):
    """Send back what came first, then hang up."""

    def handle(self) -> None:
        self.request.sendall(self.request.recv(8192))


class Talk(BaseRequestHandler):
    """Send back whatever comes, until the client hangs up."""

    def handle(self) -> None:
        while data := self.request.recv(8192):
            self.request.sendall(data)


class Datagram(BaseRequestHandler):
    """Send every datagram back to where it came from."""

    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)
