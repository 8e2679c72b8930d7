"""What the settings of a daemon ask of the machine that is to run it: time, tasks, descriptors, rights, directories.

Pure: from checked settings, and where they are to run, to facts. No file, no clock and no user database in here, and no
word of how a service manager wants to be told; that is for ``units.py``, ``programs.py`` and ``scrape.py``.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from resource import RLIM_INFINITY

from msgspec import Struct, field

from preforkd.addresses import Address
from preforkd.deploy.sums import ALLOWANCE, descriptors, stop_time, tasks
from preforkd.roster import EXPORTER_SERVICE
from preforkd.settings import Service, Settings
from preforkd.sources import EXPORTER, Checked, Faults
from preforkd_workers.spec import MODULE, is_script

# Ports below this one are root's (ip(7)).
FIRST_ORDINARY_PORT = 1024

# Receive buffers up to this size are granted to anybody: net.core.rmem_max, where nobody has changed it (socket(7)).
ORDINARY_BUFFER = 212_992


class Site(Struct, frozen=True):
    """Where a daemon is to run, and how it is started there."""

    directory: str = "/"  # where relative paths begin
    serve: tuple[str, ...] = ("preforkd",)  # the program, before its arguments
    control: tuple[str, ...] = ("preforkctl",)
    config: str = ""  # the file of settings
    options: tuple[str, ...] = ()  # of ``preforkd serve``: those that the settings have come from
    target: tuple[str, ...] = ()  # behind them: the target, if that was given there, with the arguments of a script
    environment: Mapping[str, str] = field(default_factory=dict)  # in the same way
    python: tuple[str, ...] = ()  # directories that Python and its packages are in
    in_directory: frozenset[str] = frozenset()  # modules that are found in ``directory``
    user: str = "preforkd"
    sockets: Mapping[str, Address] = field(default_factory=dict)  # by name or number: where those of fd: listen


class Passed(Struct, frozen=True):
    """A listener that whoever starts the daemon has to open and to pass to it."""

    url: str  # in the settings
    key: str  # its name, or its number
    address: Address | None  # where it is to listen, if that was said
    backlog: int
    receive_buffer: int

    @property
    def is_numbered(self) -> bool:
        return self.key.isdecimal()


class Facts(Struct, frozen=True):
    """What one daemon asks for. Times are in seconds, paths are absolute, reasons are for comments."""

    name: str
    site: Site
    stop_time: float  # until the last of its processes has gone
    orphan_time: float  # until workers have gone whose master was killed
    boot_time: float  # until it is ready, or has failed to be
    check_time: float  # of ``preforkd check``
    takeover_time: float
    tasks: int  # processes and threads
    descriptors: int  # of the process that needs most of them
    listeners: int
    addresses: Sequence[Address]  # of all listeners, those of scripts excepted
    metrics: Address | None
    control: str  # configured path of the control socket; empty: none is
    privileges: Mapping[str, str]  # capabilities, and what each is for
    limits: Mapping[str, tuple[int, int]]  # hard limits of setrlimit(2) that workers raise theirs to: soft, hard
    nice: int  # the lowest nice value that a worker asks for
    is_resourceful: bool  # whether workers change priority, CPUs or limits
    owners: bool  # whether socket files are given to another user
    asks_for_users: bool  # whether a service tells clients of a Unix socket apart by their users
    groups: Sequence[str]  # that socket files are given to
    written: Mapping[str, str]  # files that are made, and what each is
    code: Sequence[str]  # directories and files that have to be readable
    passed: Sequence[Passed]
    leaves_workers: bool  # whether a stop leaves workers to finish on their own
    scripts: Sequence[str]  # services whose addresses only their script knows
    is_relative: bool  # whether anything is found by way of the working directory


def facts_of(checked: Checked, site: Site) -> Facts:
    """What these settings ask for at this site. Raises Faults."""
    if ":" in checked.settings.name:  # systemd.exec(5): RUNTIME_DIRECTORY=
        raise Faults([f"name: {checked.settings.name}: a colon ends the path of its runtime directory; choose another"])
    services = checked.settings.services
    addresses = [address for some in checked.addresses.values() for address in some]
    each = services.values()
    return Facts(
        name=checked.settings.name,
        site=site,
        stop_time=stop_time(each),
        orphan_time=max(service.graceful_timeout + service.eof_timeout for service in each) + 2 * ALLOWANCE,
        boot_time=max(2 * service.boot_timeout for service in each),  # of the mold, then of the workers
        check_time=sum(service.boot_timeout for service in each) + ALLOWANCE,
        takeover_time=checked.settings.takeover_timeout,
        tasks=tasks(each, checked.settings.max_old_generations),
        descriptors=descriptors(each, checked.settings.max_old_generations, len(addresses)),
        listeners=len(addresses),
        addresses=addresses,
        metrics=next(iter(checked.addresses.get(EXPORTER, ())), None),
        control=_absolute(checked.settings.control, site.directory) if checked.settings.control else "",
        privileges=dict(_privileges(each, addresses, site.user)),
        limits=_limits(each),
        nice=min(service.nice for service in each),
        is_resourceful=any(service.nice or service.cpu_affinity or service.rlimits for service in each),
        owners=any(_owner(address) not in ("", site.user) for address in addresses),
        asks_for_users=_asks_for_users(checked),
        groups=sorted({group for address in addresses if (group := address.options.get("group", ""))}),
        written=_written(checked, site.directory),
        code=_code(each, site),
        passed=[*_passed(checked, site)],
        leaves_workers=not all(service.block_on_close for service in each),
        scripts=[name for name, service in services.items() if is_script(service.target) and not service.listen],
        is_relative=_is_relative(checked, site),
    )


def _passed(checked: Checked, site: Site) -> Iterator[Passed]:
    for service, addresses in checked.addresses.items():
        wanted = checked.settings.services.get(service, EXPORTER_SERVICE)
        for address in addresses:
            if address.scheme == "fd":
                key = address.name or str(address.number)
                where = site.sockets.get(key)
                yield Passed(address.url, key, where, wanted.request_queue_size, wanted.receive_buffer)


def _privileges(services: Collection[Service], addresses: Collection[Address], user: str) -> Iterator[tuple[str, str]]:
    ports = sorted({address.port for address in addresses if 0 < address.port < FIRST_ORDINARY_PORT})
    if ports:
        yield "CAP_NET_BIND_SERVICE", f"port {', '.join(map(str, ports))}"
    if any(service.receive_buffer > ORDINARY_BUFFER for service in services):
        yield "CAP_NET_ADMIN", "receive_buffer, beyond net.core.rmem_max; or raise that, and take this away"
    if any(service.oom_score_adjust < 0 for service in services):
        yield "CAP_SYS_RESOURCE", "oom_score_adjust below 0"
    owners = sorted({owner for address in addresses if (owner := _owner(address)) not in ("", user)})
    if owners:
        yield "CAP_CHOWN", f"a socket file of {', '.join(owners)}'s"


def _asks_for_users(checked: Checked) -> bool:
    return any(
        service.max_per_client and any(address.scheme in ("unix", "fd") for address in checked.addresses[name])
        for name, service in checked.settings.services.items()
    )


def _owner(address: Address) -> str:
    return address.options.get("user", "")


def _limits(services: Collection[Service]) -> dict[str, tuple[int, int]]:
    """For every limit that a worker sets, what is to be inherited: the highest soft one and the highest hard one."""
    found: dict[str, tuple[int, int]] = {}
    for service in services:
        for name, (soft, hard) in service.rlimits.items():
            before = found.get(name, (0, 0))
            found[name] = _higher(before[0], soft), _higher(before[1], hard)
    return found


def _higher(one: int, other: int) -> int:
    return RLIM_INFINITY if RLIM_INFINITY in (one, other) else max(one, other)


def _written(checked: Checked, directory: str) -> dict[str, str]:
    """The files that the daemon makes, and what each of them is."""
    wanted = checked.settings
    found = {
        address.path: "a socket"
        for addresses in checked.addresses.values()
        for address in addresses
        if address.path and not address.path.startswith("@")
    }
    found |= {wanted.control: "the control socket"} if wanted.control else {}
    found |= dict.fromkeys(_logs(wanted), "a log")
    return {_absolute(path, directory): what for path, what in found.items()}


def _logs(wanted: Settings) -> list[str]:
    logs = [wanted.log_file, *(service.access_log for service in wanted.services.values())]
    return [path for path in logs if path not in ("", "-")]


def _absolute(path: str, directory: str) -> str:
    return os.path.normpath(os.path.join(directory, path))


# Code.


def _code(services: Collection[Service], site: Site) -> list[str]:
    """Whatever is read: directories of code and of Python, and the file of settings."""
    named = [name for service in services for name in _named(service)]
    found = [os.path.dirname(_absolute(path, site.directory)) for name in named if (path := _file_of(name))]
    found += [site.directory for name in named if _module_of(name) in site.in_directory]
    return [*dict.fromkeys([*filter(None, [site.config]), *found, *site.python])]


def _is_relative(checked: Checked, site: Site) -> bool:
    """Whether anything is looked for in the directory that the daemon is started in."""
    paths = [checked.settings.control, *_logs(checked.settings)]
    for service in checked.settings.services.values():
        if service.args:  # only the script knows which of them are paths
            return True
        paths += [_file_of(name) for name in _named(service)]
        if any(_module_of(name) in site.in_directory for name in _named(service)):
            return True
    paths += [address.path for some in checked.addresses.values() for address in some if address.path[:1] != "@"]
    return any(path and not os.path.isabs(path) for path in paths)


def modules_of(services: Collection[Service]) -> set[str]:
    """The modules that the settings name, without those that are inside of others."""
    return {module for service in services for name in _named(service) if (module := _module_of(name))}


def _named(service: Service) -> list[str]:
    """Everything in a service's settings that names code."""
    hooks = service.on_mold, service.on_worker_start, service.on_drain, service.on_worker_stop
    return [service.target, *filter(None, [service.handler]), *(hook for hook in hooks if ":" in hook)]


def _file_of(name: str) -> str:
    """The file that a target or a hook names, as it is written; empty: it names a module."""
    if is_script(name):
        return "" if name.startswith(MODULE) else name
    path = name.rpartition(":")[0]
    return path if path.endswith(".py") or os.sep in path else ""


def _module_of(name: str) -> str:
    """The topmost package of the module that a target or a hook names; empty: it names a file."""
    if _file_of(name):
        return ""
    module = name.removeprefix(MODULE) if name.startswith(MODULE) else name.rpartition(":")[0] or name
    return module.partition(".")[0]
