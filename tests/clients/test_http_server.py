"""http.server under curl and wrk."""

import random
import re
from pathlib import Path

import pytest

from tests.clients.conftest import METRICS, needs, outcomes, run
from tests.conftest import Serve

LISTEN = ("--listen", "tcp://127.0.0.1:0", *METRICS)
HANDLER = "http.server:SimpleHTTPRequestHandler"
TARGETS = {
    "SimpleHTTPRequestHandler": (HANDLER,),
    "HTTPServer": ("http.server:HTTPServer", "--handler", HANDLER),
    "ThreadingHTTPServer": ("http.server:ThreadingHTTPServer", "--handler", HANDLER),
}
CONNECTIONS = 8


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """A thousand files by name, from nothing to a mebibyte."""
    chance = random.Random("contents")
    sizes = [0, 1, 65535, 65536, 65537, *[1 << 20] * 5, *(int(2 ** chance.uniform(0, 15)) for _ in range(990))]
    return {f"{index:03}.bin": chance.randbytes(size) for index, size in enumerate(sizes)}


@needs("curl", "curl")
@pytest.mark.parametrize("service", TARGETS)
def test_curl_gets_a_thousand_files_byte_for_byte(
    serve: Serve, tmp_path: Path, contents: dict[str, bytes], service: str
) -> None:
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    daemon = serve(*TARGETS[service], *LISTEN)
    host, port = daemon.address()
    got = tmp_path / "got"
    got.mkdir()
    wanted = "".join(f'url = "http://{host}:{port}/{name}"\noutput = "{got / name}"\n' for name in contents)
    parallel = ("--parallel", "--parallel-max", CONNECTIONS)
    run("curl", "--no-progress-meter", "--fail-early", "--fail", *parallel, "--config", "-", text=wanted)
    assert [name for name, content in contents.items() if (got / name).read_bytes() != content] == []
    assert outcomes(daemon, service, len(contents)) == {"ok": len(contents)}


@needs("wrk", "wrk")
@pytest.mark.parametrize("service", TARGETS)
def test_wrk_meets_no_error_and_counts_what_the_daemon_counts(serve: Serve, tmp_path: Path, service: str) -> None:
    (tmp_path / "page").write_bytes(b"page\n" * 100)
    daemon = serve(*TARGETS[service], *LISTEN)
    host, port = daemon.address()
    load = ("--threads", 1, "--connections", CONNECTIONS, "--duration", "1s", "--timeout", "20s")
    report = run("wrk", *load, f"http://{host}:{port}/page")
    assert "Socket errors" not in report
    assert "Non-2xx" not in report
    answered = re.search(r"(\d+) requests in ", report)
    assert answered is not None, report
    completed = int(answered[1])
    assert completed > CONNECTIONS
    # Beyond those answered: a connection by which wrk finds out whether anybody is there, and those it cuts at the end.
    counted = outcomes(daemon, service, completed + 1)
    assert 1 <= sum(counted.values()) - completed <= 1 + CONNECTIONS, (counted, report)
    assert counted.get("error", 0) <= CONNECTIONS
    assert counted.keys() <= {"ok", "error"}
