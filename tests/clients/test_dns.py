"""dnslib's own server class, which mixes in threads, under dig and dnsperf. Under a plain one it is an example."""

import re
from pathlib import Path

import pytest

from tests.clients.conftest import METRICS, SERVERS, needs, outcomes, run
from tests.conftest import Serve
from tests.daemon import Daemon

ANSWERS = {
    ("www.example.test", "A"): ["192.0.2.1"],
    ("www.example.test", "AAAA"): ["2001:db8::1"],
    ("alias.example.test", "CNAME"): ["www.example.test."],
    ("example.test", "MX"): ["10 mail.example.test."],
    ("text.example.test", "TXT"): ['"as written"'],
}


def start(serve: Serve, directory: Path) -> Daemon:
    """Two services from one file: ``udp`` and ``tcp``."""
    config = directory / "preforkd.toml"
    config.write_text(
        "".join(
            f'[services.{kind}]\ntarget = "{SERVERS}:dns_{kind}"\nlisten = ["{kind}://127.0.0.1:0"]\n'
            for kind in ("udp", "tcp")
        )
    )
    return serve("-c", config, *METRICS)


@needs("dig", "bind9-dnsutils")
@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_dig_is_answered(serve: Serve, tmp_path: Path, kind: str) -> None:
    daemon = start(serve, tmp_path)
    host, port = daemon.address(kind)
    way = (f"@{host}", "-p", port, f"+{'tcp' if kind == 'tcp' else 'notcp'}", "+tries=1", "+timeout=20")
    for (name, record), answer in ANSWERS.items():
        assert run("dig", *way, "+short", name, record).splitlines() == answer
    assert "status: NXDOMAIN" in run("dig", *way, "nobody.example.test", "A")
    assert outcomes(daemon, kind, len(ANSWERS) + 1) == {"ok": len(ANSWERS) + 1}


@needs("dnsperf", "dnsperf")
def test_dnsperf_loses_nothing(serve: Serve, tmp_path: Path) -> None:
    daemon = start(serve, tmp_path)
    host, port = daemon.address("udp")
    queries = tmp_path / "queries"
    queries.write_text("".join(f"{name} {record}\n" for name, record in ANSWERS))
    load = ("-n", 500, "-c", 4, "-q", 20, "-t", 20)
    report = run("dnsperf", "-s", host, "-p", port, "-d", queries, *load)
    sent = 500 * len(ANSWERS)
    assert re.search(rf"Queries completed: +{sent} \(100.00%\)", report), report
    assert re.search(rf"Response codes: +NOERROR {sent} \(100.00%\)", report), report
    assert outcomes(daemon, "udp", sent) == {"ok": sent}
