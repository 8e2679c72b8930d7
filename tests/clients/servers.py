"""Servers out of the standard library and of dnslib, made as their manuals do. They know nothing of preforkd."""

import socketserver
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.validate import validator
from xmlrpc.server import SimpleXMLRPCServer

from dnslib.server import DNSLogger, DNSServer
from dnslib.zoneresolver import ZoneResolver

ZONE = """
$TTL 60
example.test.       IN SOA  ns.example.test. root.example.test. 1 60 60 60 60
example.test.       IN NS   ns.example.test.
www.example.test.   IN A    192.0.2.1
www.example.test.   IN AAAA 2001:db8::1
alias.example.test. IN CNAME www.example.test.
example.test.       IN MX   10 mail.example.test.
text.example.test.  IN TXT  "as written"
"""


def _dns(address: tuple[str, int], *, tcp: bool) -> Any:
    host, port = address
    return DNSServer(ZoneResolver(ZONE), host, port, tcp, logger=DNSLogger("error")).server


def dns_udp(address: tuple[str, int]) -> Any:
    """dnslib's own server class, which mixes in threads."""
    return _dns(address, tcp=False)


def dns_tcp(address: tuple[str, int]) -> Any:
    return _dns(address, tcp=True)


class Methods:
    """What can be called over XML-RPC."""

    def add(self, a: int, b: int) -> int:
        return a + b

    def reverse(self, text: str) -> str:
        return text[::-1]

    def divide(self, a: int, b: int) -> float:
        return a / b


def xmlrpc(address: tuple[str, int]) -> SimpleXMLRPCServer:
    server = SimpleXMLRPCServer(address, logRequests=False)
    server.register_instance(Methods())
    server.register_introspection_functions()
    server.register_multicall_functions()
    return server


def _application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Sends back what it was sent, or where it is."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    where = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} on port {environ['SERVER_PORT']}\n".encode()
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return [environ["wsgi.input"].read(length) if length else where]


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


def wsgi(address: tuple[str, int]) -> WSGIServer:
    """With an application that checks both sides' manners (PEP 3333)."""
    server = WSGIServer(address, _Quiet)
    server.set_app(validator(_application))
    return server


class Syslog(socketserver.BaseRequestHandler):
    """Appends each message to a file, a line each."""

    def handle(self) -> None:
        message, _ = self.request
        with open("messages", "ab", buffering=0) as file:
            file.write(message.rstrip(b"\0\n") + b"\n")
