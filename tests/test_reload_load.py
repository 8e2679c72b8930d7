"""A reload under load costs no request, whatever the new code is like and whoever is killed in the middle of it.

Every test has 64 closed-loop clients on TCP and on UDP and a few long-lived connections, which count every request that
is refused, cut, unanswered or answered by a mixture of generations. ``--soak`` makes them long (``make soak``).
"""

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from time import monotonic

from tests.conftest import Serve
from tests.daemon import Daemon, eventually
from tests.under_load import NO_BYTECODE, SERVICES, Code, Load, Report, check_losses, check_nothing_lost

# Long-lived connections end with those who leave, after graceful_timeout where the handler cannot know.
SERVICE = """
graceful_timeout = "1s"
boot_timeout = "{boot_timeout}s"
probation = "{probation}s"
probation_requests = {requests}
"""

STREAMS, DATAGRAMS = 6, 2

# A worker that was told to leave may take one request more, in the time that it needs to see that, in seconds.
SLACK = 2.0


class Site:
    """A daemon under load, its code, and what was live when."""

    def __init__(self, serve: Serve, directory: Path, probation: float, requests: int = 1_000_000) -> None:
        self.code = Code(directory)
        self.code.deploy()
        self.daemon: Daemon = serve("-c", self.settings(probation, requests), environment=NO_BYTECODE)
        self.replaced: dict[int, float] = {}  # generation: since when no new request is its own
        self.serving = 1

    def settings(self, probation: float, requests: int = 1_000_000, boot_timeout: float = 10.0) -> Path:
        """Write the settings, with so many seconds or requests of probation, and seconds for a boot."""
        service = SERVICE.format(probation=probation, requests=requests, boot_timeout=boot_timeout)
        return self.code.settings(streams=STREAMS, datagrams=DATAGRAMS, service=service)

    def begin(self, after: str = "", **code: str) -> int:
        """Deploy code and have it loaded; the generation that it will be."""
        number = self.code.deploy(after, **code)
        self.daemon.signal(signal.SIGHUP)
        return number

    def verdict(self, number: int) -> re.Match[str]:
        """Wait until the reload that makes this generation has ended."""
        said = self.daemon.log.wait_for(rf"^reload_(?P<result>done|rolled_back|refused|abandoned) gen={number} .*")
        if said["result"] == "done":
            self.replaced[self.serving] = monotonic()
            self.serving = number
        else:
            self.replaced[number] = monotonic()
        return said

    def reload(self, after: str = "", **code: str) -> re.Match[str]:
        return self.verdict(self.begin(after, **code))

    def check_generations(self, report: Report) -> None:
        """Nobody was answered by a generation before there was it, or after it was replaced."""
        for number, seen in report.seen.items():
            assert seen.first_answer >= self.code.written[number]
            late = seen.last_connect - self.replaced.get(number, float("inf"))
            assert late < SLACK, f"generation {number} has answered a request made {late:.1f} s after it was replaced"

    def pids(self, title: str, generation: int) -> list[int]:
        """Those of this generation whose titles begin so."""
        return [pid for pid in self.daemon.titled(title) if title_of(pid).endswith(f" gen={generation}")]

    def old_processes(self) -> list[str]:
        """The titles of molds and workers of other generations than the one that serves; the exporter's are as good."""
        titles = map(title_of, self.daemon.family())
        return [title for title in titles if title and not title.endswith(f" gen={self.serving}")]

    @property
    def workforce(self) -> list[int]:
        """The workers of the generation that serves."""
        return [pid for service in SERVICES for pid in self.pids(f"worker {service}#", self.serving)]

    def check_nobody_left(self, load: Load) -> None:
        """Soon there are only processes of the generation that serves, as many as wanted, and they alone answer."""
        wanted = len(SERVICES) + STREAMS + DATAGRAMS + 2  # the exporter's mold and worker
        eventually(lambda: not self.old_processes() and len(self.daemon.family()) == wanted, "the old ones have left")
        since = monotonic()
        report = load.after(500)
        late = [n for n, seen in report.seen.items() if n != self.serving and seen.last_connect > since]
        assert not late, f"answered by generations {late}, of which there is no process"
        assert report.seen[self.serving].last_connect > since


def title_of(pid: int) -> str:
    """The title of a process, empty when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    except OSError:
        return ""


def check_growth(before: "Footprint", after: "Footprint") -> None:
    assert after.descriptors <= before.descriptors, (before, after)
    assert after.master < before.master + MIB, (before, after)
    assert after.everybody < before.everybody * 1.1 + MIB, (before, after)


MIB = 1 << 20


@dataclass(frozen=True)
class Footprint:
    """What a daemon uses: descriptors of the master, its resident memory, and the proportional memory of all, bytes."""

    descriptors: int
    master: int
    everybody: int

    @classmethod
    def of(cls, daemon: Daemon) -> "Footprint":
        everybody = [memory(pid, "Pss") for pid in [daemon.pid, *daemon.family()]]
        return cls(daemon.descriptors(), memory(daemon.pid, "Rss"), sum(everybody))


def memory(pid: int, kind: str) -> int:
    """Rss or Pss of a process in bytes (proc(5), smaps_rollup)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{kind}: +(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def settled_footprint(site: Site, load: Load) -> Footprint:
    site.check_nobody_left(load)
    return Footprint.of(site.daemon)


def test_good_reloads_in_a_row(serve: Serve, tmp_path: Path, soak: bool) -> None:
    site = Site(serve, tmp_path, probation=0.1)
    with Load(site.daemon, at_most=1500) as load:
        load.after(100)
        for turn in range(100 if soak else 11):
            assert site.reload()["result"] == "done"
            load.after(100)
            if turn == 9:
                before = settled_footprint(site, load)
        after = settled_footprint(site, load)
        report = load.stop()
    check_nothing_lost(site.daemon, report)
    site.check_generations(report)
    assert set(report.seen) >= {1, 2, site.serving}
    assert report.ended["talk"]
    assert report.ended["stay"]
    check_growth(before, after)


# Broken code: what is written before and after the good one, and the phase in which it is to be found out.


@dataclass(frozen=True)
class Broken:
    phase: str
    after: str = ""
    before: str = ""
    part: str = ""
    boot_timeout: float = 10.0


FIRST = '''
def is_first(what):
    """Whether no other process of this generation has come here."""
    try:
        os.mkdir(f"first-{what}-{GENERATION}")
    except FileExistsError:
        return False
    return True
'''

# What a worker does before it is ready (on_worker_start).
BOOT = """
def boot(server, slot):
    if isinstance(server, {server}):
        {boot}
"""

# What a worker does as soon as it is ready.
SERVE = """
class {server}({server}):
    def serve_forever(self, poll_interval=0.5):
        {serve}
        super().serve_forever(poll_interval)
"""

SERVER = {"stream": "Stream", "datagrams": "Datagrams"}

# A worker on probation that got a connection for long would have no time to err.
ERR = """
class StreamHandler(StreamRequestHandler):
    def handle(self):
        self.wfile.write(answer(self.rfile.readline().split()[1]))
        raise RuntimeError("after all")
"""

# Thousands of tracebacks are not for the log of a test.
SILENT = """
Stream.handle_error = Datagrams.handle_error = lambda *_: None
"""

ERR_DATAGRAM = """
class DatagramHandler(DatagramHandler):
    def handle(self):
        super().handle()
        raise RuntimeError("after all")
"""

FAIL = 'raise RuntimeError("cannot boot")'

BROKEN: Mapping[str, Broken] = {
    "SyntaxError": Broken("molds", "def broken(:\n"),
    "ImportError": Broken("molds", before="import there_is_no_such_module\n"),
    "missing name": Broken("molds", "del Stream\n"),
    "import hangs": Broken("molds", "import time\ntime.sleep(3600)\n", boot_timeout=1.0),
    "import dies": Broken("molds", "os.kill(os.getpid(), 9)\n"),
    "no worker boots": Broken("probation", BOOT.format(server="Stream", boot=FAIL)),
    "worker crashes on probation": Broken("probation", SERVE.format(server="Stream", serve="os._exit(3)")),
    "handler errs": Broken("probation", ERR + SILENT),
    "datagram handler errs": Broken("probation", ERR_DATAGRAM + SILENT),
    "import exits in a part": Broken("molds", part="GENERATION = {generation}\nraise SystemExit(7)\n"),
    "second worker does not boot": Broken(
        "rolling",
        FIRST + BOOT.format(server="Datagrams", boot=f'if not is_first("boot"): {FAIL}'),
    ),
    "workers after the first crash": Broken(
        "rolling", FIRST + SERVE.format(server="Stream", serve='if not is_first("crash"): os._exit(3)')
    ),
}


def test_good_and_broken_reloads_in_turn(serve: Serve, tmp_path: Path, soak: bool) -> None:
    site = Site(serve, tmp_path, probation=0.1)
    kinds = [*islice(cycle(BROKEN.items()), 25)] if soak else [*BROKEN.items()]
    with Load(site.daemon, at_most=1500) as load:
        load.after(100)
        for turn, (name, broken) in enumerate(kinds):
            site.settings(10.0 if broken.phase == "probation" else 0.1, 20, broken.boot_timeout)
            said = site.reload(broken.after, before=broken.before, **({"part": broken.part} if broken.part else {}))
            assert said["result"] == "rolled_back", name
            assert f" phase={broken.phase} " in said[0], name
            load.after(100)
            if soak or turn % 3 == 2:
                site.settings(probation=0.1)
                assert site.reload()["result"] == "done"
        site.check_nobody_left(load)
        report = load.stop()
    check_nothing_lost(site.daemon, report, with_errors=True)
    site.check_generations(report)


def test_probation_has_its_share_of_the_requests_of_a_quiet_service(serve: Serve, tmp_path: Path) -> None:
    site = Site(serve, tmp_path, probation=10.0, requests=20)
    with Load(site.daemon, clients=1, talkers=0, stayers=0) as load:
        load.after(100)
        for err in (ERR, ERR_DATAGRAM):
            verdict = site.reload(err + SILENT)
            assert verdict["result"] == "rolled_back"
            assert " phase=probation " in verdict[0]
        report = load.stop()
    check_nothing_lost(site.daemon, report, with_errors=True)


# Somebody is killed in the middle of a reload.

# Who comes here waits until the test opens the gate.
GATE = 'os.close(os.open("gate", os.O_RDONLY))'

GATED = {
    "molds": f"{GATE}\n",
    "probation": "",
    "rolling": FIRST + BOOT.replace("{boot}", f'is_first("boot") or {GATE}'),
}

# How long the probation lasts: where the verdict is awaited, as long as it takes to kill somebody.
PROBATION = {"molds": 0.1, "probation": 2.0, "rolling": 0.1}


@dataclass(frozen=True)
class Victim:
    phase: str
    kind: str
    is_new: bool
    result: str


VICTIMS: Mapping[str, Victim] = {
    "the new mold while it imports": Victim("molds", "mold", True, "rolled_back"),
    "an old worker while the new mold imports": Victim("molds", "worker", False, "done"),
    "the new mold, on probation": Victim("probation", "mold", True, "rolled_back"),
    "the worker on probation": Victim("probation", "worker", True, "rolled_back"),
    "an old worker, on probation": Victim("probation", "worker", False, "done"),
    "the old mold, on probation": Victim("probation", "mold", False, "done"),
    "the new mold in the roll": Victim("rolling", "mold", True, "rolled_back"),
    "a new worker in the roll": Victim("rolling", "worker", True, "done"),
    "an old worker in the roll": Victim("rolling", "worker", False, "done"),
    "the old mold in the roll": Victim("rolling", "mold", False, "done"),
}


@contextmanager
def gate(directory: Path) -> Iterator[None]:
    """A gate in the directory, which is opened at the end: who opens a FIFO to read waits for a writer (fifo(7))."""
    path = directory / "gate"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    try:
        yield
    finally:
        both = os.open(path, os.O_RDWR)
        aside = directory / "open"
        aside.touch()
        os.replace(aside, path)
        os.close(both)


def choose(site: Site, load: Load, victim: Victim, service: str, generation: int) -> int:
    """The pid of the one to be killed: of the old workers one that holds a connection, if that is certain to stay."""
    pids = site.pids(f"{victim.kind} {service}", generation)
    if is_holder(victim, service):
        eventually(lambda: {*pids} & {*load.report().holders}, "a long-lived connection has come to an old worker")
        return next(pid for pid in load.report().holders if pid in pids)
    said = rf"^{victim.kind}_ready service={service} .*\bgen={generation} pid=(\d+)"
    ready = [int(match[1]) for match in site.daemon.log.matches(said) if int(match[1]) in pids]
    return (ready or pids)[0]


def is_holder(victim: Victim, service: str) -> bool:
    """Whether it holds a long-lived connection for certain: before the roll, nobody is told to leave."""
    return (victim.kind, victim.is_new, service) == ("worker", False, "stream") and victim.phase != "rolling"


def kill_in_the_middle(site: Site, load: Load, victim: Victim, service: str) -> None:
    """Reload; in this phase, kill this one; see the reload end."""
    daemon, old = site.daemon, site.serving
    site.settings(PROBATION[victim.phase])
    with gate(site.code.directory):
        number = site.begin(GATED[victim.phase].replace("{server}", SERVER[service]))
        if victim.phase == "molds":
            eventually(lambda: site.pids(f"mold {service}", number))
        elif victim.phase == "probation":
            daemon.log.wait_for(rf"^worker_ready service={service} .*\bgen={number} ")
        else:
            eventually(lambda: len(site.pids(f"worker {service}", number)) > 1)
        pid = choose(site, load, victim, service, number if victim.is_new else old)
        os.kill(pid, signal.SIGKILL)
        daemon.log.wait_for(rf"_exit service={service} .*\bpid={pid} .*SIGKILL")
    verdict = site.verdict(number)
    assert verdict["result"] == victim.result
    assert victim.result == "done" or f" phase={victim.phase} " in verdict[0]


def test_somebody_is_killed_in_the_middle(serve: Serve, tmp_path: Path, soak: bool) -> None:
    site = Site(serve, tmp_path, probation=0.1)
    services = islice(cycle(SERVICES), 6 if soak else 1)
    deeds = [(victim, service) for service in services for victim in VICTIMS.values()]
    with Load(site.daemon, deadline=5.0, at_most=1500) as load:
        load.after(100)
        for victim, service in deeds:
            kill_in_the_middle(site, load, victim, service)
            eventually(lambda: len(site.workforce) == STREAMS + DATAGRAMS, "the pools are at full strength")
        site.check_nobody_left(load)
        report = load.stop()
    kills = Counter(service for victim, service in deeds if victim.kind == "worker")
    check_losses(site.daemon, report, kills, holders=sum(is_holder(*deed) for deed in deeds))
    site.check_generations(report)


# The master becomes another program under the same pid.


def counters(daemon: Daemon) -> dict[str, float]:
    """Whatever may only grow."""
    growing = r"preforkd_\w+_(total|count|bucket|sum)(\{|$)"
    return {name: value for name, value in daemon.metrics().items() if re.match(growing, name)}


def test_upgrades_in_a_row(serve: Serve, tmp_path: Path, soak: bool) -> None:
    site = Site(serve, tmp_path, probation=0.1)
    daemon = site.daemon
    with Load(daemon, at_most=1500) as load:
        load.after(100)
        counted = counters(daemon)
        for turn in range(20 if soak else 3):
            number = site.code.deploy()
            daemon.signal(signal.SIGUSR2)
            assert daemon.log.wait_for(r"^upgrade_done from=\S+ to=\S+", turn + 1)
            assert site.verdict(number)["result"] == "done"
            load.after(100)
            before, counted = counted, counters(daemon)
            assert not [name for name, value in before.items() if counted.get(name, 0) < value]
            if turn == 0:
                after_one = settled_footprint(site, load)
        after_all = settled_footprint(site, load)
        report = load.stop()
    assert daemon.process.poll() is None
    check_nothing_lost(daemon, report)
    check_growth(after_one, after_all)
    site.check_generations(report)
