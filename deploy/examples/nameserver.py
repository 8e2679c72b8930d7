"""A zone, and dnslib's server around it."""

import socketserver

from dnslib.server import DNSLogger, DNSServer
from dnslib.zoneresolver import ZoneResolver

ZONE = ZoneResolver("""
$TTL 60
example.test.       IN SOA  ns.example.test. root.example.test. 1 60 60 60 60
example.test.       IN NS   ns.example.test.
www.example.test.   IN A    192.0.2.1
www.example.test.   IN AAAA 2001:db8::1
alias.example.test. IN CNAME www.example.test.
example.test.       IN MX   10 mail.example.test.
text.example.test.  IN TXT  "as written"
""")
QUIET = DNSLogger("error")


def udp(address):
    host, port = address[:2]
    return DNSServer(ZONE, host, port, logger=QUIET, server=socketserver.UDPServer).server


def tcp(address):
    host, port = address[:2]
    return DNSServer(ZONE, host, port, tcp=True, logger=QUIET, server=socketserver.TCPServer).server
