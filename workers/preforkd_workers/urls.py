"""How an address is written: the scheme of a socket, and a host with its port."""

import socket

# What a URL begins with, by family and type of the socket.
SCHEMES: dict[tuple[int, int], str] = {
    (socket.AF_INET, socket.SOCK_STREAM): "tcp",
    (socket.AF_INET6, socket.SOCK_STREAM): "tcp",
    (socket.AF_UNIX, socket.SOCK_STREAM): "unix",
    (socket.AF_INET, socket.SOCK_DGRAM): "udp",
    (socket.AF_INET6, socket.SOCK_DGRAM): "udp",
    (socket.AF_UNIX, socket.SOCK_DGRAM): "unix-dgram",
}


def with_port(host: str, port: int) -> str:
    """``host:port``, with brackets around a host of IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
