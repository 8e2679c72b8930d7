"""Every setting, declared once: type, default, bounds, unit and help. Whatever else needs them is made from here."""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from preforkd.levels import levels_in
from preforkd.setting import declared_in, duration, shown, size, table, whole_number
from preforkd_workers import resources
from preforkd_workers.spec import Limits


def _cpu_affinity(raw: object) -> str:
    """What the setting may say. Raises ValueError with what is wanted instead, and so does ``_rlimits``."""
    try:
        if isinstance(raw, str) and (raw in ("", resources.SPREAD) or resources.cpus_in(raw)):
            return raw
    except ValueError:
        pass
    raise ValueError(f'"spread", or a list of CPUs such as "0,2-3", not {shown(raw)}')


def _rlimits(raw: object) -> dict[str, resources.Pair]:
    pairs = raw.replace(",", " ").split() if isinstance(raw, str) else raw
    if isinstance(pairs, list) and all(isinstance(pair, str) and "=" in pair for pair in pairs):
        pairs = dict(pair.split("=", 1) for pair in pairs)
    if not isinstance(pairs, dict):
        raise ValueError(f'a table, or a list such as "nofile=4096,as=2G", not {shown(raw)}')
    return resources.rlimits_in(pairs, whole_number)


def _access_log_format(raw: object) -> str:
    from preforkd_workers.accessline import check_format  # here and not above: most do without

    return check_format(raw)


_NEEDS_RESTART = {"needs_restart": True}  # a reload that finds it changed is refused
_WORKERS, _LANES, _REQUESTS = {"unit": "workers"}, {"unit": "lanes"}, {"unit": "requests"}
_YEAR = 366 * 86400.0
MOST_CHILDREN = 4096


class Service(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be said of one service."""

    target: Annotated[
        str,
        Meta(
            min_length=1,
            description="`module:name` or `file.py:name`: handler class, server class, instance or factory; "
            "or a script, `file.py` or `-m module`",
        ),
    ]
    args: Annotated[list[str], Meta(description="of a script: its arguments")] = field(default_factory=list)
    server: Annotated[
        int, Meta(ge=1, le=100, description="of a script that serves several servers: which of them, as it binds them")
    ] = 1
    part_of: str = ""  # the service whose script has made the server, when no setting names it; no setting itself
    handler: Annotated[
        str, Meta(description="the handler of a server class that does not bring its own, as `module:name`")
    ] = ""
    listen: Annotated[
        list[str],
        Meta(
            description="addresses, as `tcp://host:port`, `udp://…`, `udp://group:port?interface=eth0`, `unix:path`, "
            "`unix-dgram:path`, `fd:3`, `fd:NAME`; for a script: one, in place of what it binds"
        ),
    ] = field(default_factory=list)
    kind: Annotated[
        Literal["process", "thread", "gevent"],
        Meta(description="kind of worker: `process` handles one request at a time, the others many"),
    ] = "process"
    threads: Annotated[
        int, Meta(ge=1, le=1024, description="of a worker of kind `thread`, at most", extra={"unit": "threads"})
    ] = 16
    greenlets: Annotated[
        int, Meta(ge=1, le=50_000, description="of a worker of kind `gevent`, at most", extra={"unit": "greenlets"})
    ] = 1000
    max_children: Annotated[
        int, Meta(ge=1, le=MOST_CHILDREN, description="workers; with `max_spare`, at most", extra=_WORKERS)
    ] = 4
    max_spare: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="lanes that may be idle before workers are retired; 0: there are always `max_children`",
            extra=_LANES,
        ),
    ] = 0
    min_spare: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="lanes that should be idle, or else workers are forked", extra=_LANES),
    ] = 1
    start_children: Annotated[
        int,
        Meta(ge=0, le=MOST_CHILDREN, description="workers to begin with; 0: enough for `min_spare`", extra=_WORKERS),
    ] = 0
    preload: Annotated[
        bool, Meta(description="import the target once and fork workers from there; false: each worker imports it")
    ] = True
    fork_safety: Annotated[
        Literal["warn", "refuse"],
        Meta(description="`warn` of a target that leaves threads, sockets or databases in its mold, or `refuse` it"),
    ] = "warn"
    request_queue_size: Annotated[
        int, Meta(ge=1, le=65535, description="connections that may wait, listen(2)", extra={"unit": "connections"})
    ] = 1024
    allow_reuse_address: Annotated[
        bool, Meta(description="bind a TCP port although old connections linger on it", extra=_NEEDS_RESTART)
    ] = True
    allow_reuse_port: Annotated[
        bool, Meta(description="share the port with other masters (SO_REUSEPORT)", extra=_NEEDS_RESTART)
    ] = False
    max_packet_size: Annotated[int, size("longest datagram; 0: what the server class says", 1 << 20)] = 0
    receive_buffer: Annotated[
        int, size("of datagrams that may wait at a UDP listener, SO_RCVBUF; 0: as the system has it", 1 << 29)
    ] = 0
    boot_timeout: Annotated[
        float, duration("for importing the target, and for a worker to become ready", at_least=0.1)
    ] = 30.0
    graceful_timeout: Annotated[float, duration("for a worker told to stop to finish what it holds")] = 30.0
    eof_timeout: Annotated[float, duration("after that, with end-of-file for those who wait for their client")] = 5.0
    request_timeout: Annotated[
        float, duration("for a request; past it, its stack is logged; 0: as long as it takes")
    ] = 0.0
    request_timeout_grace: Annotated[
        float,
        duration("after that, until its worker is killed; or leaves without it (`thread`, `gevent`)"),
    ] = 5.0
    idle_timeout: Annotated[
        float, duration("without a byte from the client, then the handler reads end-of-file; streams only; 0: never")
    ] = 0.0
    max_per_client: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="at a time, of a network, or of a user of a Unix socket; streams only; 0: no limit",
            extra={"unit": "connections"},
        ),
    ] = 0
    max_per_client_ipv4_prefix: Annotated[
        int, Meta(ge=0, le=32, description="how much of an IPv4 address makes a client", extra={"unit": "bits"})
    ] = 32
    max_per_client_ipv6_prefix: Annotated[
        int, Meta(ge=0, le=128, description="and of an IPv6 address", extra={"unit": "bits"})
    ] = 64
    when_full: Annotated[
        Literal["wait", "close"],
        Meta(description="connections that find every lane busy wait in the backlog, or are closed at once"),
    ] = "wait"
    block_on_close: Annotated[
        bool, Meta(description="wait for the workers at stop; false: leave them to finish alone")
    ] = True
    max_surge: Annotated[
        int,
        Meta(ge=0, le=4096, description="workers more than `max_children` while others are replaced", extra=_WORKERS),
    ] = 1
    max_unavailable: Annotated[
        int, Meta(ge=0, le=4096, description="workers less that are ready meanwhile", extra=_WORKERS)
    ] = 0
    probation: Annotated[
        float,
        duration("how long a reload tries one worker before the others are replaced; 0: not at all", at_most=3600.0),
    ] = 5.0
    probation_requests: Annotated[
        int, Meta(ge=1, le=1_000_000, description="or until it has ended so many", extra={"unit": "requests"})
    ] = 50
    probation_max_error_ratio: Annotated[
        float,
        Meta(ge=0, le=1, description="more errors than this, and than twice the old workers', and it has failed"),
    ] = 0.1
    max_requests: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000_000,
            description="after so many a worker is replaced; 1: each request has a fresh process; 0: never",
            extra=_REQUESTS,
        ),
    ] = 0
    max_requests_jitter: Annotated[
        int,
        Meta(ge=0, le=1_000_000_000, description="so many more, at random, for each worker", extra=_REQUESTS),
    ] = 0
    max_lifetime: Annotated[float, duration("after so long a worker is replaced; 0: never", at_most=_YEAR)] = 0.0
    max_lifetime_jitter: Annotated[float, duration("so much more, at random, for each worker", at_most=_YEAR)] = 0.0
    max_rss: Annotated[
        int, size("resident memory of a worker beyond which it is replaced, seen within 1 s; 0: any", 1 << 50)
    ] = 0
    max_rss_hard: Annotated[int, size("and beyond which it is killed; 0: any", 1 << 50)] = 0
    max_pss: Annotated[
        int, size("as `max_rss`, with shared pages divided among their users, seen within 30 s; 0: any", 1 << 50)
    ] = 0
    nice: Annotated[
        int, Meta(ge=-20, le=19, description="added to the nice value that the daemon was started with, nice(2)")
    ] = 0
    cpu_affinity: Annotated[
        str,
        Meta(
            description="CPUs of a worker: `spread`: one each, by turns; or a list, `0,2-3`; empty: any",
            extra={"read": _cpu_affinity},
        ),
    ] = ""
    oom_score_adjust: Annotated[
        int, Meta(ge=-1000, le=1000, description="added to what the daemon was started with, proc(5)")
    ] = 0
    rlimits: Annotated[
        dict[str, tuple[int, int]],
        Meta(
            description='limits of setrlimit(2), `{ nofile = 4096, core = "0:unlimited" }`: soft:hard, or one for both',
            extra={"read": _rlimits},
        ),
    ] = field(default_factory=dict)
    on_mold: Annotated[
        str, Meta(description="hook, `name` in the target's module or `module:name`: after the import, `f(server)`")
    ] = ""
    on_worker_start: Annotated[str, Meta(description="hook: in a worker before it serves, `f(server, slot)`")] = ""
    on_drain: Annotated[str, Meta(description="hook: in a worker when it is told to drain, `f(server)`")] = ""
    on_worker_stop: Annotated[str, Meta(description="hook: in a worker after its last request, `f(server)`")] = ""

    access_log: Annotated[
        str, Meta(description="a line for each request: path of a file, or `-`: the daemon's log; empty: none")
    ] = ""
    access_log_format: Annotated[
        str,
        Meta(
            description="`json`, or text with fields in braces; empty: as the log writes an event",
            extra={"read": _access_log_format},
        ),
    ] = ""

    @property
    def lanes(self) -> int:
        """How many requests one worker handles at a time."""
        return {"process": 1, "thread": self.threads, "gevent": self.greenlets}[self.kind]

    @property
    def spare_lanes(self) -> int:
        """Lanes of a worker beside those, so that there is one to close the door while they are busy."""
        return int(self.when_full == "close" and self.kind != "process")

    @property
    def spare_workers(self) -> int:
        """Workers beside ``max_children`` to the same end, where a worker has one lane."""
        return int(self.when_full == "close" and self.kind == "process")

    @property
    def limits(self) -> Limits:
        """What those who serve need to know of the limits."""
        return Limits(
            self.request_timeout,
            self.request_timeout_grace,
            self.idle_timeout,
            self.max_per_client,
            self.max_per_client_ipv4_prefix,
            self.max_per_client_ipv6_prefix,
            self.when_full == "close",
        )


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be said of the daemon, and its services."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[\w.@:-]*$",
            description="the daemon's, in process titles; empty: after the file or the target",
            extra=_NEEDS_RESTART,
        ),
    ] = ""
    metrics: Annotated[
        str, Meta(description="address of the exporter, `/metrics`, `/healthz`, `/readyz`; empty: none")
    ] = ""
    control: Annotated[
        str,
        Meta(description="path of the control socket; empty: in the runtime directory", extra=_NEEDS_RESTART),
    ] = ""
    takeover_timeout: Annotated[
        float, duration("at start, for those of an earlier instance to leave, if some still live")
    ] = 10.0
    log_format: Annotated[
        Literal["auto", "text", "json", "journal"],
        Meta(
            description="`text`, `json`, or `journal`: lines with systemd's priorities; `auto`: `journal` where "
            "standard error is systemd's journal, else `text`"
        ),
    ] = "auto"
    log_file: Annotated[
        str,
        Meta(description="path of the log, standard output and error of the workers included; empty: standard error"),
    ] = ""
    ready_fd: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="descriptor to write a newline to when ready, as s6 wants it; 0: none",
            extra=_NEEDS_RESTART,
        ),
    ] = 0
    max_old_generations: Annotated[
        int, Meta(ge=1, le=100, description="that may be draining; the oldest beyond is hurried")
    ] = 3
    log_levels: Annotated[
        dict[str, str],
        Meta(
            description='of loggers of the targets, and of `preforkd` itself, `{ "app.mail" = "debug" }`: debug, info, '
            "warning, error or critical",
            extra={"read": levels_in},
        ),
    ] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)


DAEMON = {setting.key: setting for setting in declared_in(Settings)}
SERVICE = {setting.key: setting for setting in declared_in(Service)}


def reference() -> str:
    """The tables of all settings, as ``preforkd settings`` prints them."""
    return f"{daemon_reference()}\n\n{service_reference()}"


def daemon_reference() -> str:
    """The table of the daemon's settings, as docs/reference.md shows it."""
    return table("of the daemon", DAEMON)


def service_reference() -> str:
    """The table of a service's settings, as docs/reference.md shows it."""
    return table("of a service", SERVICE)
