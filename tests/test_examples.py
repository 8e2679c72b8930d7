"""Every example of deploy/examples, copied elsewhere as a user would, under the client that it names."""

import json
import re
import shutil
import socket
import struct
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import pytest

from tests.clients.conftest import needs, outcomes, run
from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually
from tests.test_cli import run as preforkd

EXAMPLES = Path(__file__).parent.parent / "deploy" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.toml"))
CLIENTS = 8

Start = Callable[..., Daemon]


def installed(*modules: str) -> pytest.MarkDecorator:
    """Skip the test where a package is missing that the example is about."""
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs the packages {', '.join(missing)}")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the examples."""
    return Path(shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def start(directory: Path, serve: Serve) -> Start:
    """Serve an example with its own settings, but for the ports, which are any that are free."""

    def begin(name: str, *more: str, **keywords: object) -> Daemon:
        words = [f"--set=services.{service}.listen={','.join(urls)}" for service, urls in listens(name).items()]
        return serve("-c", f"{name}.toml", "--metrics", "tcp://127.0.0.1:0", *words, *more, **keywords)

    return begin


def settings(name: str) -> dict[str, Any]:
    """The services of an example."""
    services: dict[str, Any] = tomllib.loads((EXAMPLES / f"{name}.toml").read_text())["services"]
    return services


def listens(name: str) -> dict[str, list[str]]:
    """Where each service is to listen: at the same kind of address, with any port."""
    return {
        service: [re.sub(r"(\w+://[\d.]+):\d+$", r"\1:0", url) for url in table["listen"]]
        for service, table in settings(name).items()
    }


def talk(address: tuple[str, int] | str, question: bytes) -> bytes:
    """Ask a server, end the sending side, and return all that it answers."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(DEADLINE)
        client.connect(address)
        client.sendall(question)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            return answer.read()


def web(daemon: Daemon, path: str = "/") -> str:
    host, port = daemon.address()
    return f"http://{host}:{port}{path}"


def wrk(url: str) -> None:
    """Load it for a moment, without an error."""
    report = run("wrk", "--threads", 1, "--connections", CLIENTS, "--duration", "1s", "--timeout", "20s", url)
    assert "Socket errors" not in report
    assert "Non-2xx" not in report
    answered = re.search(r"(\d+) requests in ", report)
    assert answered is not None, report
    assert int(answered[1]) > CLIENTS


# All of them.


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_what_to_install_to_type_and_why(name: str) -> None:
    text = (EXAMPLES / f"{name}.toml").read_text()
    comment = re.match(r"(#.*\n)+", text)
    assert comment is not None
    for part in ("# Install: ", f"# Start:    preforkd serve -c {name}.toml", "# Try: ", "# Why so: "):
        assert part in comment[0]
    assert f"| `{name}.toml` |" in (EXAMPLES / "README.md").read_text()
    glue = EXAMPLES / f"{name}.py"
    assert not glue.exists() or "import preforkd" not in glue.read_text()


@installed("dnslib", "fakeredis", "flask")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_passes_the_check_and_the_audit(directory: Path, name: str) -> None:
    words = (f"--set=services.{service}.fork_safety=refuse" for service in settings(name))
    environment = {"OPENBLAS_NUM_THREADS": "1"}  # as fakeredis.toml says
    status, out, error = preforkd(directory, "check", "-c", f"{name}.toml", *words, environment=environment)
    assert (status, error) == (0, "")
    assert len(re.findall("^service=.* is a ", out, re.MULTILINE)) == len(settings(name))


def test_examples_may_run_side_by_side() -> None:
    listen = [url for name in NAMES for service in settings(name).values() for url in service["listen"]]
    assert len(listen) == len(set(listen))


def test_what_keeps_its_state_in_memory_is_one_process() -> None:
    lines = (EXAMPLES / "README.md").read_text().splitlines()
    names = [line.split("`")[1].removesuffix(".toml") for line in lines if "| one process, threads |" in line]
    assert len(names) == 4
    for name in names:
        assert [(each["kind"], each["max_children"]) for each in settings(name).values()] == [("thread", 1)]


# One by one.

ANSWERS = {
    ("www.example.test", "A"): "192.0.2.1",
    ("www.example.test", "AAAA"): "2001:db8::1",
    ("example.test", "MX"): "10 mail.example.test.",
    ("text.example.test", "TXT"): '"as written"',
}


@needs("dig", "bind9-dnsutils")
@installed("dnslib")
def test_nameserver_answers_dig(start: Start) -> None:
    daemon = start("nameserver")
    for kind, way in (("udp", "+notcp"), ("tcp", "+tcp")):
        host, port = daemon.address(kind)
        dig = ("dig", f"@{host}", "-p", port, way, "+tries=1", "+timeout=20")
        for question, answer in ANSWERS.items():
            assert run(*dig, "+short", *question) == f"{answer}\n"
        assert "status: NXDOMAIN" in run(*dig, "nobody.example.test", "A")
        assert outcomes(daemon, kind, len(ANSWERS) + 1) == {"ok": len(ANSWERS) + 1}


@needs("dnsperf", "dnsperf")
@installed("dnslib")
def test_nameserver_loses_no_question_of_dnsperf(start: Start, directory: Path) -> None:
    daemon = start("nameserver")
    host, port = daemon.address("udp")
    (directory / "questions").write_text("".join(f"{' '.join(question)}\n" for question in ANSWERS))
    load = ("-n", 500, "-c", 4, "-q", 20, "-t", 20)
    report = run("dnsperf", "-s", host, "-p", port, "-d", directory / "questions", *load)
    sent = 500 * len(ANSWERS)
    assert re.search(rf"Queries completed: +{sent} \(100.00%\)", report), report
    assert re.search(rf"Response codes: +NOERROR {sent} \(100.00%\)", report), report
    assert outcomes(daemon, "udp", sent) == {"ok": sent}


@needs("redis-cli", "redis-tools")
@installed("fakeredis")
def test_fakeredis_keeps_what_other_clients_have_set(start: Start) -> None:
    daemon = start("fakeredis")
    host, port = daemon.address()
    cli = ("redis-cli", "-h", host, "-p", port)
    assert run(*cli, "set", "key", "value") == "OK\n"
    with daemon.connect() as idle, ThreadPoolExecutor(CLIENTS) as threads:
        [*threads.map(lambda _: run(*cli, text="INCR n\n" * 20), range(CLIENTS))]
        assert run(*cli, text="GET key\nGET n\nGET none\n") == f"value\n{20 * CLIENTS}\n\n"
        assert daemon.stop() == 0  # although a client is connected
        assert idle.recv(1) == b""


@needs("curl", "curl")
@needs("wrk", "wrk")
@installed("flask")
def test_webapp_under_curl_and_wrk(start: Start, directory: Path) -> None:
    daemon = start("webapp")
    (directory / "sent").write_bytes(b"x" * 300_000)
    curl = ("curl", "--no-progress-meter", "--fail")
    assert run(*curl, web(daemon, "/hello/world")) == "hello, world\n"
    assert run(*curl, "--data-binary", "@sent", web(daemon, "/count"), directory=directory) == '{"bytes":300000}\n'
    wrk(web(daemon, "/hello/world"))


@needs("curl", "curl")
@needs("wrk", "wrk")
def test_wsgi_under_curl_and_wrk(start: Start) -> None:
    daemon = start("wsgi")
    page = run("curl", "--no-progress-meter", "--fail", web(daemon, "/path?a=b"))
    assert page.startswith("Hello world!\n")
    assert "PATH_INFO = '/path'" in page
    wrk(web(daemon))


@needs("curl", "curl")
@needs("wrk", "wrk")
def test_files_under_curl_and_wrk(start: Start, directory: Path) -> None:
    daemon = start("files")
    content = (directory / "README.md").read_text()
    assert run("curl", "--no-progress-meter", "--fail", web(daemon, "/README.md")) == content
    wrk(web(daemon, "/README.md"))


def test_rpc_remembers_across_clients_and_threads(start: Start) -> None:
    daemon = start("rpc")

    def add(_: int) -> None:
        with ServerProxy(web(daemon)) as stock:
            for _ in range(20):
                stock.add("apples", 1)

    with ThreadPoolExecutor(CLIENTS) as threads:
        [*threads.map(add, range(CLIENTS))]
    with ServerProxy(web(daemon)) as stock:
        assert stock.take("apples", 1) == 20 * CLIENTS - 1
        assert stock.list() == {"apples": 20 * CLIENTS - 1}
        with pytest.raises(Fault, match="159 left of apples"):
            stock.take("apples", 1000)


@needs("curl", "curl")
@needs("promtool", "prometheus")
def test_machine_counts_every_scrape_and_promtool_has_no_complaint(start: Start) -> None:
    daemon = start("machine")
    curl = ("curl", "--no-progress-meter", "--fail")
    with daemon.connect(), ThreadPoolExecutor(4) as threads:  # and one that stalls
        pages = [*threads.map(lambda _: run(*curl, web(daemon, "/metrics")), range(20))]
    counted = [re.findall(r"^machine_scrapes_total (\d+)", page, re.MULTILINE) for page in pages]
    assert max(int(number) for (number,) in counted) == 20
    assert re.search(r"^machine_load \d+\.\d+$", pages[0], re.MULTILINE)
    assert run("promtool", "check", "metrics", text=pages[0]) == ""


def test_logconfig_configures_the_logging_of_what_serves(start: Start, directory: Path) -> None:
    daemon = start("logconfig")
    lines, config = daemon.address(), str(directory / "logconfig.sock")
    assert (directory / "logconfig.sock").stat().st_mode & 0o777 == 0o600
    talk(lines, b"info first\nwarning second\n")
    daemon.log.wait_for("WARNING second$")
    change = json.dumps({"version": 1, "incremental": True, "root": {"level": "WARNING"}}).encode()
    talk(config, struct.pack(">L", len(change)) + change)
    with ExitStack() as stay:
        clients = [stay.enter_context(daemon.connect()) for _ in range(CLIENTS)]  # each with a lane of its own
        for number, client in enumerate(clients):
            client.sendall(b"info third\nerror fourth %d\n" % number)
            daemon.log.wait_for(f"ERROR fourth {number}$")
    assert daemon.log.matches("INFO first$")
    assert daemon.log.matches("third") == []


# What smtpd(8) sends (SMTPD_POLICY_README), on one connection, and what it is answered.
DIALOGUE = """\
request=smtpd_access_policy
protocol_state=RCPT
protocol_name=ESMTP
client_address=192.0.2.7
client_name=mail.example.net
reverse_client_name=mail.example.net
helo_name=mail.example.net
sender={sender}
recipient=info@example.test
recipient_count=0
queue_id=
instance=7b.672ef3c1.5a0c8.0
size=12345
etrn_domain=
stress=
sasl_method={method}
sasl_username={user}
sasl_sender=
encryption_protocol=TLSv1.3
policy_context=

"""


def test_postfix_policy_answers_a_recorded_dialogue(start: Start) -> None:
    daemon = start("postfix")
    senders = [("joe@example.net", "", ""), ("Ann@Example.Test", "", ""), ("ann@example.test", "PLAIN", "ann")]
    questions = "".join(DIALOGUE.format(sender=sender, method=way, user=user) for sender, way, user in senders)
    assert daemon.ask(questions.encode(), "policy").decode().split("\n\n") == [
        "action=DUNNO",
        "action=REJECT log in to send mail from here",
        "action=DUNNO",
        "",
    ]


def test_postfix_table_answers_a_recorded_dialogue(start: Start) -> None:
    daemon = start("postfix")
    said = daemon.ask(b"25:aliases info@example.test,15:aliases nobody@,9:nowhere x,", "aliases")
    assert said == b"37:OK ann@example.test, bob@example.test,9:NOTFOUND ,21:PERM no table nowhere,"
    assert daemon.ask(b"GET / HTTP/1.0\r\n\r\n", "aliases") == b""


# Not in debian-packages.txt: to install Postfix makes it the mail system of the machine.
@needs("postmap", "postfix")
def test_postfix_itself_looks_up_in_the_table(start: Start, directory: Path) -> None:
    daemon = start("postfix")
    host, port = daemon.address("aliases")
    (directory / "main.cf").write_text("compatibility_level = 3.6\n")
    keys = ["info@example.test", "nobody@example.test", "postmaster@example.test"]
    table = f"socketmap:inet:{host}:{port}:aliases"
    found = run("postmap", "-c", directory, "-q", "-", table, text="".join(f"{key}\n" for key in keys))
    assert found.splitlines() == [
        "info@example.test\tann@example.test, bob@example.test",
        "postmaster@example.test\tann@example.test",
    ]


@needs("logger", "bsdutils")
def test_collector_writes_what_logger_sends_either_way(start: Start, directory: Path) -> None:
    daemon = start("collector")
    host, port = daemon.address("collector")
    by_name = ("logger", "--tag", "test", "--priority")
    run(*by_name, "mail.warning", "--server", host, "--port", port, "--udp", "over UDP")
    run(*by_name, "user.err", "--socket", directory / "collector.sock", "--socket-errors=on", "over a socket")
    (directory / "lines").write_text("".join(f"line {number}\n" for number in range(100)))
    run(*by_name, "user.info", "--socket", directory / "collector.sock", "--file", directory / "lines")
    eventually(lambda: len((directory / "messages").read_text().splitlines()) == 102, "every message is written")
    found = re.findall(r"^\S+ (\w+) .*?(over .*|line \d+)$", (directory / "messages").read_text(), re.MULTILINE)
    sent = [("warning", "over UDP"), ("err", "over a socket"), *(("info", f"line {number}") for number in range(100))]
    assert sorted(found) == sorted(sent)
