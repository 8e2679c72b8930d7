"""A handler that speaks RESP, under redis-benchmark and redis-cli."""

import re
from pathlib import Path

import pytest

from tests.clients.conftest import METRICS, needs, outcomes, run
from tests.conftest import Serve
from tests.daemon import Daemon

RESP = Path(__file__).parent / "resp.py"
LISTEN = {"tcp": "tcp://127.0.0.1:0", "unix": "unix:redis.sock"}
FAMILIES = pytest.mark.parametrize("family", LISTEN)

# As many clients as workers: one that is kept alive keeps its lane.
CLIENTS = 4
REQUESTS = 2000
COMMANDS = ("PING_INLINE", "PING_MBULK", "SET", "GET")


def start(serve: Serve, family: str, directory: Path) -> tuple[Daemon, tuple[object, ...]]:
    """The daemon, and what tells Redis's programs where it is."""
    daemon = serve(f"{RESP}:Resp", "--listen", LISTEN[family], *METRICS)
    if family == "unix":
        return daemon, ("-s", directory / "redis.sock")
    host, port = daemon.address()
    return daemon, ("-h", host, "-p", port)


@needs("redis-cli", "redis-tools")
@FAMILIES
def test_redis_cli_gets_what_it_has_set(serve: Serve, tmp_path: Path, family: str) -> None:
    daemon, where = start(serve, family, tmp_path)
    value = "v" * 100_000
    said = run("redis-cli", *where, text=f"SET key {value}\nGET key\nGET other\nPING\n")
    assert said.split("\n") == ["OK", value, "", "PONG", ""]
    assert outcomes(daemon, "Resp", 1) == {"ok": 1}


@needs("redis-benchmark", "redis-tools")
@FAMILIES
@pytest.mark.parametrize("keep_alive", [1, 0], ids=["keep_alive", "connect_each_time"])
def test_redis_benchmark_completes(serve: Serve, tmp_path: Path, family: str, keep_alive: int) -> None:
    daemon, where = start(serve, family, tmp_path)
    load = ("-c", CLIENTS, "-n", REQUESTS, "-k", keep_alive, "-t", "ping,set,get")
    report = run("redis-benchmark", *where, *load, complaint="(WARNING: Keepalive disabled.*)?")
    assert re.findall(r"====== (\w+) ======\s+(\d+) requests completed", report) == [
        (c, f"{REQUESTS}") for c in COMMANDS
    ]
    # A connection for CONFIG, and then as many as clients; or one a request, and for the last requests some in vain.
    least = 1 + len(COMMANDS) * (CLIENTS if keep_alive else REQUESTS)
    most = least + (0 if keep_alive else len(COMMANDS) * sum(range(CLIENTS)))
    counted = outcomes(daemon, "Resp", least)
    assert counted == {"ok": counted["ok"]}
    assert least <= counted["ok"] <= most
