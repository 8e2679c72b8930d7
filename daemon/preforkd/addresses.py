"""What may be said in ``listen``: an address, as text, and what is wrong with it. Opens nothing and asks nobody."""

import os
import re
import socket
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import parse_qsl, urlsplit

from msgspec import Struct, field

from preforkd_workers.spelling import hint, meant

SCHEMES = {
    "tcp": (socket.AF_INET, socket.SOCK_STREAM),
    "udp": (socket.AF_INET, socket.SOCK_DGRAM),
    "unix": (socket.AF_UNIX, socket.SOCK_STREAM),
    "unix-dgram": (socket.AF_UNIX, socket.SOCK_DGRAM),
    "fd": None,
}
_OPTIONS = {"tcp": ("v6only",), "udp": ("v6only", "interface"), "unix": ("mode", "user", "group"), "fd": ()}
_EXAMPLE = {
    "tcp": "tcp://127.0.0.1:9999",
    "udp": "udp://127.0.0.1:9999",
    "unix": "unix:/run/x.sock",
    "unix-dgram": "unix-dgram:/run/x.sock",
    "fd": "fd:3 or fd:NAME",
}
_FDNAME = re.compile(r"[ -9;-~]{1,255}")  # sd_listen_fds(3): ASCII without control characters and colons
_LONGEST_PATH = 107  # bytes, unix(7): sun_path less its terminating NUL

_LOCAL_SCOPES = (1, 2)  # of an interface, of a link: ipv6(7) wants the interface with them


class AddressError(ValueError):
    """This text is no address; the message says what is wanted."""


class Address(Struct, frozen=True):
    """Where to listen, understood but not resolved.

    ``place`` is what a second listener cannot have as well, or None when any number can (port 0).
    """

    url: str
    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    number: int = -1
    name: str = ""  # of a descriptor that is passed by name
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> IPv4Address | IPv6Address | None:
        """The multicast group that it names, if it does."""
        found = ip_of(self.host) if self.scheme == "udp" else None
        return found if found is not None and found.is_multicast else None

    @property
    def place(self) -> tuple[str, object] | None:
        if self.scheme == "fd":
            return "fd", self.name or self.number
        if self.scheme in ("tcp", "udp"):
            return (self.scheme, (self.host, self.port)) if self.port else None
        return "unix", self.path if self.path.startswith("@") else os.path.abspath(self.path)


NOWHERE = Address("", "")


def parse(url: str) -> Address:
    """Understand ``tcp://host:port``, ``udp://…``, ``unix:path``, ``unix:@name``, ``unix-dgram:…`` or ``fd:…``.

    Raises AddressError.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname or ""
    except ValueError as error:
        raise AddressError(f"{url}: {error}") from None
    scheme = parts.scheme
    if scheme not in SCHEMES:
        close = meant(scheme, SCHEMES)
        raise AddressError(f"{url}: " + (f"did you mean {close}:?" if close else f"want one of {', '.join(SCHEMES)}"))
    options = _options(url, scheme, parts.query)
    wanted = AddressError(f"{url}: want {_EXAMPLE[scheme]}")
    if scheme == "fd":
        if parts.path.isdecimal():
            return Address(url, scheme, number=int(parts.path))
        if not _FDNAME.fullmatch(parts.path) or parts.netloc:
            raise wanted
        return Address(url, scheme, name=parts.path)
    if scheme in ("tcp", "udp"):
        if not host or port is None or parts.path:
            raise wanted
        found = Address(url, scheme, host, port, options=options)
        if fault := _fault_of_interface(found):
            raise AddressError(f"{url}: {fault}")
        return found
    if not parts.path or parts.netloc or "\0" in parts.path:
        raise wanted
    if len(os.fsencode(parts.path)) > _LONGEST_PATH:
        raise AddressError(f"{url}: the path is longer than {_LONGEST_PATH} bytes (unix(7))")
    return Address(url, scheme, path=parts.path, options=options)


def _options(url: str, scheme: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = _OPTIONS[scheme.removesuffix("-dgram")]
    for name in options:
        if name not in known:
            raise AddressError(f"{url}: unknown option {name!r}{hint(name, known)}")
    if not re.fullmatch("0?[0-7]{3}", options.get("mode", "0666")):
        raise AddressError(f"{url}: mode is octal, such as 0660")
    if options.get("v6only", "0") not in ("0", "1"):
        raise AddressError(f"{url}: v6only is 0 or 1")
    return options


def _fault_of_interface(address: Address) -> str | None:
    """What is wrong with the interface that is named, or that is not."""
    name = address.options.get("interface")
    group = address.group
    if group is None:
        return None if name is None else "interface is for a multicast group, such as udp://239.1.2.3:5000"
    if name == "":
        return "interface is a name or an address, such as eth0"
    if name is None:
        is_local = isinstance(group, IPv6Address) and group.packed[1] & 0xF in _LOCAL_SCOPES
        return "a group of this scope needs an interface, such as ?interface=eth0" if is_local else None
    own = ip_of(name)
    if own is not None and own.version != group.version:
        return f"interface is an address of IPv{own.version}, but the group is of IPv{group.version}"
    return None


def ip_of(text: str) -> IPv4Address | IPv6Address | None:
    """The number that a text is; None when it is something else, a name say."""
    try:
        return ip_address(text)
    except ValueError:
        return None
