"""The fork-safety audit: what a target leaves in its mold is said, or refused, before a worker is forked from it."""

import re
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.site import Site
from tests.test_boot import boot_failure
from tests.test_cli import run

HAZARD = r"^(mold_has_\w+) "

THREAD = """
import threading
threading.Thread(target=threading.Event().wait, name="poller", daemon=True).start()
"""

NATIVE_THREADS = """
import ctypes
library, made = ctypes.CDLL(None), ctypes.c_ulong()
for _ in range(2):
    assert library.pthread_create(ctypes.byref(made), None, library.pause, None) == 0
    assert library.pthread_setname_np(made, b"grpc_poller") == 0
assert library.pthread_create(ctypes.byref(made), None, library.pause, None) == 0
"""

EVENT_LOOP = "import asyncio; loop = asyncio.new_event_loop()\n"

# What a target may do when it is imported: the event that the log has of it, and what is named there. PEER: a port.
HAZARDS = {
    "thread": (THREAD, "mold_has_threads", r"threads=poller "),
    "native threads": (
        NATIVE_THREADS,
        "mold_has_native_threads",
        r'native_threads="(grpc_poller \(2\), unnamed|'
        r'unnamed, grpc_poller \(2\))" ',
    ),
    "connection": (
        'import socket; kept = socket.create_connection(("127.0.0.1", PEER))\n',
        "mold_has_sockets",
        r'sockets="tcp to 127\.0\.0\.1:PEER fd=\d+" ',
    ),
    "udp": (
        "import socket; kept = socket.socket(type=socket.SOCK_DGRAM)\nkept.connect(('127.0.0.1', 6379))\n",
        "mold_has_sockets",
        r'sockets="udp to 127\.0\.0\.1:6379 \(Redis\) fd=\d+" ',
    ),
    "ipv6 listener": (
        "import socket; kept = socket.create_server(('::1', 0), family=socket.AF_INET6)\n",
        "mold_has_sockets",
        r'sockets="tcp listening at \[::1\]:\d+ fd=\d+" ',
    ),
    "unix": (
        "import socket; kept = socket.socket(socket.AF_UNIX)\nkept.bind('own')\n",
        "mold_has_sockets",
        r'sockets="unix at own fd=\d+" ',
    ),
    "sqlite": (
        "import sqlite3; kept = sqlite3.connect('app.db')\nkept.execute('CREATE TABLE IF NOT EXISTS t (x)')\n",
        "mold_has_databases",
        r"databases=/\S+/app\.db ",
    ),
    "sqlite in its first transaction": (
        "import sqlite3; kept = sqlite3.connect('app.db')\nkept.execute('BEGIN IMMEDIATE')\n"
        "kept.execute('CREATE TABLE t (x)')\n",
        "mold_has_databases",
        r"databases=/\S+/app\.db ",
    ),
    "event loop": (
        EVENT_LOOP,
        "mold_has_event_loop",
        r'descriptors="eventpoll fd=\d+, socket pair fd=\d+, socket pair fd=\d+" ',
    ),
    "pipe": ("import os; kept = os.pipe()\n", "mold_has_event_loop", r'descriptors="pipe fd=\d+, pipe fd=\d+" '),
}

# What leaves nothing that matters: all that is done and over, and what may well be shared.
QUIET = """
import ctypes, gc, sqlite3, threading
from concurrent.futures import ThreadPoolExecutor
gc.disable()
with ThreadPoolExecutor(4) as threads:
    list(threads.map(str, range(100)))
for thread in [threading.Thread(target=int) for _ in range(20)]:
    thread.start()
    thread.join()
with socket.create_connection(("127.0.0.1", PEER)):
    pass
class Cycle:
    pass
cycle = Cycle()
cycle.itself, cycle.socket = cycle, socket.create_connection(("127.0.0.1", PEER))
del cycle
memory = sqlite3.connect(":memory:")
memory.execute("CREATE TABLE t (x)")
itself = open(__file__)
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.connect("journal")
nowhere = socket.socket(type=socket.SOCK_DGRAM)
library, leaving = ctypes.CDLL(None), ctypes.c_ulong()  # as one that was joined and that the kernel has not ended yet
assert library.pthread_create(ctypes.byref(leaving), None, library.usleep, ctypes.c_void_p(30_000)) == 0
"""


@pytest.fixture
def peer() -> Iterator[int]:
    """The port of somebody to be connected to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def site(tmp_path: Path, serve: Serve) -> Site:
    """An application that is written and not yet served."""
    made = Site(tmp_path, serve)
    made.write("one")
    return made


def serve_with(site: Site, more: str, *settings: str) -> list[str]:
    """Start the application with this in it, and return the hazards in its log."""
    site.write("one", more)
    site.settings("\n".join(['probation = "0s"', *settings]))
    site.daemon = site.serve("-c", "preforkd.toml")
    assert site.ask() == "one"
    return [match.string for match in site.daemon.log.matches(HAZARD)]


@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_is_named_once_with_what_to_do(site: Site, peer: int, name: str) -> None:
    source, event, named = HAZARDS[name]
    (said,) = serve_with(site, source.replace("PEER", str(peer)))
    assert re.match(rf"{event} service=app gen=1 pid=\d+ {named.replace('PEER', str(peer))}advice=\"", said)
    assert "preload = false" in said


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "unix:x.sock"])
@pytest.mark.parametrize("target", ["app.py:Handler", "app.py:factory"])
def test_a_target_that_tidies_up_gives_no_event(site: Site, peer: int, listen: str, target: str) -> None:
    factory = (
        "\nimport socketserver\ndef factory(address):\n"
        "    made = TCPServer if isinstance(address, tuple) else socketserver.UnixStreamServer\n"
        "    return made(address, Handler)\n"
    )
    site.write("one", QUIET.replace("PEER", str(peer)) + factory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(site.directory / "journal"))
        daemon = site.serve(target, "--listen", listen, "--metrics", "tcp://127.0.0.1:0", "--set", "fork_safety=refuse")
    assert daemon.log.matches(HAZARD) == []


def test_a_look_changes_nothing_of_what_it_looks_at(site: Site, peer: int) -> None:
    kept = f"kept = socket.create_connection(('127.0.0.1', {peer}))\nsocket.setdefaulttimeout(60)\n"
    version = "VERSION = f'{os.get_blocking(kept.fileno())} {socket.getdefaulttimeout()}'\n"
    later = "def hook(server, slot):\n    global VERSION\n    " + version
    site.write("one", kept + later)
    site.settings('probation = "0s"\non_worker_start = "hook"')
    site.daemon = site.serve("-c", "preforkd.toml")
    assert site.daemon.log.matches("^mold_has_sockets ")
    assert site.ask() == "True 60.0"


@pytest.mark.skipif(find_spec("gevent") is None, reason="needs the package gevent")
def test_what_gevent_begins_anew_is_no_hazard(site: Site, peer: int) -> None:
    hub = "time.sleep(0.001)\nsocket.getaddrinfo('localhost', 1)\n"
    assert serve_with(site, hub, 'kind = "gevent"', 'fork_safety = "refuse"') == []
    connection = f"kept = socket.create_connection(('127.0.0.1', {peer}))\n"
    site.daemon.stop()
    (said,) = serve_with(site, hub + connection, 'kind = "gevent"')
    assert said.startswith("mold_has_sockets ")


def test_what_on_mold_opens_is_found_and_what_it_closes_is_not(site: Site, peer: int) -> None:
    opens = f"\ndef hook(server):\n    global kept\n    kept = socket.create_connection(('127.0.0.1', {peer}))\n"
    (said,) = serve_with(site, opens, 'on_mold = "hook"')
    assert said.startswith("mold_has_sockets ")
    site.daemon.stop()
    closes = f"\nkept = socket.create_connection(('127.0.0.1', {peer}))\ndef hook(server):\n    kept.close()\n"
    assert serve_with(site, closes, 'on_mold = "hook"', 'fork_safety = "refuse"') == []


def test_a_worker_that_imports_for_itself_may_do_as_it_likes(site: Site) -> None:
    assert serve_with(site, THREAD + EVENT_LOOP, "preload = false", 'fork_safety = "refuse"') == []


def test_refused_at_the_start_the_target_has_failed(site: Site) -> None:
    site.write("one", THREAD + EVENT_LOOP)
    site.settings('fork_safety = "refuse"')
    first, second = boot_failure(site.serve("-c", "preforkd.toml", ready=False)).splitlines()
    assert first.startswith("not safe to fork: threads after the import: poller (a fork copies none of them, ")
    assert second.startswith("descriptors after the import: eventpoll fd=")


def test_refused_at_a_reload_the_old_code_goes_on(site: Site) -> None:
    assert serve_with(site, "", 'fork_safety = "refuse"') == []
    site.write("two", THREAD)
    site.reload("rolled_back")
    assert site.daemon.log.matches("not safe to fork: threads after the import: poller ")
    assert site.versions() == {"one"}
    site.write("two")
    site.reload()
    assert site.versions() == {"two"}


def test_check_warns_or_refuses_alike(site: Site) -> None:
    site.write("one", THREAD)
    for settings, status, out, error in [
        ("", 0, 3, ""),
        ("preload = false", 0, 2, ""),
        ('preload = false\nfork_safety = "refuse"', 0, 2, ""),
        ('fork_safety = "refuse"', 78, 0, "preforkd: services.app: not safe to fork: threads after the import: poller"),
    ]:
        site.settings(settings)
        found = run(site.directory, "check", "-c", "preforkd.toml")
        assert (found[0], len(found[1].splitlines())) == (status, out), found
        assert found[2].startswith(error)
        assert bool(found[2]) == bool(error)
    site.settings()
    warning = run(site.directory, "check", "-c", "preforkd.toml")[1].splitlines()[-1]
    assert re.match(r'service=app warning=mold_has_threads threads=poller advice="a fork copies none', warning)
