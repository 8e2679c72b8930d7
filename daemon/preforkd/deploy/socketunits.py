"""``preforkd@.socket``, fitted to the listeners that a daemon has passed to it. Pure: text to text.

A socket unit has one name for all its sockets (systemd.socket(5), FileDescriptorName=), so that there is one for each
name in the settings. Those that the settings have by number are in one unit, in their order.
"""

from collections.abc import Iterator, Sequence

from preforkd.addresses import Address, ip_of
from preforkd.deploy.facts import Facts, Passed
from preforkd.deploy.sections import Sections
from preforkd.deploy.shipped import Fitted
from preforkd.deploy.unitwords import escaped, instance_of
from preforkd.sources import Faults

_FIRST = 3  # SD_LISTEN_FDS_START


def names_of(facts: Facts, instance: str) -> list[str]:
    """The names of the units."""
    return [_file(name) for name, _ in _units(facts, instance)]


def fit_sockets(text: str, facts: Facts, instance: str, fitted: Fitted) -> None:
    """Fit the unit for every name. Raises Faults where systemd cannot pass what the settings ask for."""
    early = [passed for passed in facts.passed if passed.is_numbered and int(passed.key) < _FIRST]
    faults = [f"{passed.url}: systemd passes descriptors from {_FIRST} on; say fd:NAME" for passed in early]
    for each in facts.passed:
        if each.address is not None and each.address.host and ip_of(each.address.host) is None:
            faults.append(f"--socket {each.key}: {each.address.host}: systemd wants an address, not a name")
    if faults:
        raise Faults(faults)
    for name, sockets in _units(facts, instance):
        unit = Sections(text)
        _fit(unit, name, sockets, fitted)
        if name != instance:
            unit.set("Socket", "Service", f"preforkd@{instance}.service")
        fitted.add(_file(name), unit.text)


def _file(instance: str) -> str:
    return f"preforkd@{instance}.socket"


def _units(facts: Facts, instance: str) -> Iterator[tuple[str, Sequence[Passed]]]:
    """The names of the instances of the unit, and the sockets of each."""
    for passed in facts.passed:
        if not passed.is_numbered:
            key = instance_of(passed.key)
            yield key if f"{key}-".startswith(f"{instance}-") else f"{instance}-{key}", [passed]
    numbered = sorted((each for each in facts.passed if each.is_numbered), key=lambda each: int(each.key))
    if numbered:
        yield instance if instance not in {each.key for each in facts.passed} else f"{instance}-fd", numbered


def _fit(unit: Sections, name: str, passed: Sequence[Passed], fitted: Fitted) -> None:
    _listen(unit, passed, fitted)
    if not passed[0].is_numbered and passed[0].key != name:
        unit.set("Socket", "FileDescriptorName", passed[0].key)
    unit.set("Socket", "Backlog", str(max(each.backlog for each in passed)))
    room = max(each.receive_buffer for each in passed)
    if room:
        unit.set("Socket", "ReceiveBuffer", str(room))


def _listen(unit: Sections, passed: Sequence[Passed], fitted: Fitted) -> None:
    unknown = [each for each in passed if each.address is None]
    for each in unknown:
        fitted.notes.append(f"{each.url}: its address is not in the settings: --socket {each.key}=tcp://0.0.0.0:80")
    if unknown:
        urls = ", ".join(each.url for each in unknown)
        unit.close("Socket", "ListenStream", f"The address of {urls}, which is not in the settings.")
        return
    addresses = [each.address for each in passed if each.address is not None]
    first, *others = [(_kind(address), _place(address)) for address in addresses]
    unit.close("Socket", "ListenStream", "") if first[0] != "ListenStream" else None
    unit.set("Socket", *first)
    for key, place in others:
        unit.add("Socket", key, place)
    for address in addresses:
        for key, value in _options(address):
            unit.set("Socket", key, value)


def _kind(address: Address) -> str:
    return "ListenStream" if address.scheme in ("tcp", "unix") else "ListenDatagram"


def _place(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return escaped(address.path or f"{host}:{address.port}")


def _options(address: Address) -> Iterator[tuple[str, str]]:
    names = {"mode": "SocketMode", "user": "SocketUser", "group": "SocketGroup"}
    yield from ((names[key], value) for key, value in address.options.items() if key in names)
    if address.host and ":" in address.host:
        yield "BindIPv6Only", "ipv6-only" if address.options.get("v6only") == "1" else "both"
