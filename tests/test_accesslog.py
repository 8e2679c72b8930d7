"""The access log: a line for each request, whoever serves it; and nothing where there is none."""

import json
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from preforkd.sources import Faults, Value, check
from preforkd_workers.accessline import FIELDS, check_format, line_of
from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon, eventually, exchange

MARKING = f"{Path(__file__).parent / 'marking.py'}"
HANDLER = f"{MARKING}:Marking"
TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")
JSON = ("--set", "access_log=access.log", "--set", "access_log_format=json")
KINDS = {
    "process": ["--max-children", 2],
    "thread": ["--kind", "thread", "--threads", 3, "--max-children", 2],
    "gevent": ["--kind", "gevent", "--greenlets", 3, "--max-children", 2],
}

kinds = pytest.mark.parametrize("kind", KINDS)


def lines(path: Path, number: int) -> list[str]:
    """The lines of a log, when there are so many: the client has its answer before the line is written."""
    eventually(lambda: path.exists() and path.read_text().count("\n") >= number, f"{number} lines in {path}")
    found = path.read_text().splitlines()
    assert len(found) == number
    return found


def records(path: Path, number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(path, number)]


def talk(daemon: Daemon, *words: bytes) -> str:
    """Say these lines, wait for the end of the connection, and tell which address it came from."""
    with daemon.connect() as client:
        host, port = client.getsockname()
        exchange(client, b"".join(b"%s\n" % word for word in words))
        return f"{host}:{port}"


def ended(daemon: Daemon, service: str = "Marking") -> float:
    outcomes = ("ok", "error", "refused")
    page = daemon.metrics()
    return sum(page[f'preforkd_requests_total{{outcome="{each}",service="{service}"}}'] for each in outcomes)


# One line for each request.


@kinds
def test_every_request_has_a_line_that_says_whose_it_was_and_how_it_ended(
    serve: Serve, tmp_path: Path, kind: str
) -> None:
    daemon = serve(HANDLER, *TCP, *KINDS[kind], *JSON)
    peers = [talk(daemon, b"one", b"two"), talk(daemon, b"raise"), talk(daemon)]
    found = records(tmp_path / "access.log", 3)
    assert {each["peer"]: (each["outcome"], each["mark"]) for each in found} == {
        peers[0]: ("ok", "two"),
        peers[1]: ("error", "raise"),
        peers[2]: ("ok", None),
    }
    for each in found:
        assert (each["event"], each["service"], each["gen"], each["listener"]) == (
            "request",
            "Marking",
            1,
            daemon.url(),
        )
        assert each["pid"] in daemon.workers()
        assert each["slot"] in (0, 1)
        assert each["lane"] in range(1 if kind == "process" else 3)
        assert 0 < each["duration"] < DEADLINE
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each["at"])


@kinds
def test_who_is_refused_has_a_line(serve: Serve, tmp_path: Path, kind: str) -> None:
    daemon = serve(f"{MARKING}:Choosy", "--handler", HANDLER, *TCP, *KINDS[kind], *JSON)
    peers = [talk(daemon, b"!no"), talk(daemon, b" yes")]
    found = sorted(records(tmp_path / "access.log", 2), key=lambda each: str(each["outcome"]))
    assert [(each["peer"], each["outcome"]) for each in found] == [(peers[1], "ok"), (peers[0], "refused")]


def test_threads_of_the_targets_own_have_each_their_line(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(f"{MARKING}:Threading", "--handler", HANDLER, *TCP, "--max-children", 1, *JSON)
    with Conversation(daemon.connect()) as first, Conversation(daemon.connect()) as second:
        for client, word in (first, b"first\n"), (second, b"second\n"):
            client.socket.sendall(word)
            assert client.answers.readline() == word
        names = {client.socket.getsockname()[1]: name for client, name in ((first, "first"), (second, "second"))}
    found = records(tmp_path / "access.log", 2)
    assert {int(each["peer"].rpartition(":")[2]): each["mark"] for each in found} == names


@kinds
def test_datagrams_have_lines(serve: Serve, tmp_path: Path, kind: str) -> None:
    daemon = serve(f"{MARKING}:MarkingDatagram", "--listen", "udp://127.0.0.1:0", *KINDS[kind], *JSON)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE)
        client.sendto(b"hello", daemon.address())
        client.recv(100)
        (found,) = records(tmp_path / "access.log", 1)
        assert found["peer"] == f"127.0.0.1:{client.getsockname()[1]}"
    assert found["mark"] == "hello"


def test_a_child_that_a_handler_forks_writes_none(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(f"{MARKING}:Copying", *TCP, "--max-children", 1, *JSON)
    peers = [talk(daemon), talk(daemon)]
    access = tmp_path / "access.log"
    eventually(lambda: all(peer in access.read_text() for peer in peers))  # the parent's line comes last
    assert [each["peer"] for each in records(access, 2)] == peers


def test_who_is_killed_has_no_line_but_the_event_of_its_workers_end(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(HANDLER, *TCP, "--max-children", 1, *JSON)
    peer = talk(daemon, b"kill")
    daemon.log.wait_for(rf"^worker_exit .*signal=SIGKILL .*lost=1 peer={peer}")
    daemon.log.wait_for("^worker_ready", 2)
    talk(daemon, b"next")
    assert [each["mark"] for each in records(tmp_path / "access.log", 1)] == ["next"]


def test_lines_of_many_workers_do_not_mix(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(HANDLER, *TCP, "--kind", "thread", "--threads", 4, "--max-children", 3, *JSON)
    with ThreadPoolExecutor(8) as pool:
        peers = [*pool.map(lambda number: talk(daemon, b"%d" % number * 8), range(300))]
    assert sorted(each["peer"] for each in records(tmp_path / "access.log", 300)) == sorted(peers)


# Formats.


def test_by_default_it_is_written_as_the_log_writes_an_event(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(HANDLER, *TCP, "--max-children", 1, "--set", "access_log=access.log")
    peer = talk(daemon, b"x")
    (line,) = lines(tmp_path / "access.log", 1)
    known = rf"request service=Marking slot=0 gen=1 pid=\d+ peer={peer} listener={daemon.url()} outcome=ok"
    assert re.fullmatch(rf'{known} duration=[\d.]+ms mark="x" at=\S+Z', line)


def test_a_client_cannot_break_out_of_its_line(serve: Serve, tmp_path: Path) -> None:
    form = 'access_log_format={outcome} "{mark}" {lane}'
    daemon = serve(HANDLER, *TCP, "--max-children", 1, "--set", "access_log=access.log", "--set", form)
    talk(daemon, rb"a\nok \"b\" \\ \x1b[1m {peer}\r" + "é".encode())
    assert lines(tmp_path / "access.log", 1) == [r'ok "a\nok \"b\" \\ \x1b[1m {peer}\rÃ©" 0']


def test_the_daemons_log_may_have_the_lines(serve: Serve) -> None:
    daemon = serve(HANDLER, *TCP, "--max-children", 1, "--set", "access_log=-")
    peer = talk(daemon, b"x")
    daemon.log.wait_for(rf"^request service=Marking slot=0 .* peer={peer} ")


def test_there_it_is_written_as_the_log_is(serve: Serve, tmp_path: Path) -> None:
    words = (HANDLER, *TCP, "--max-children", 1, "--set", "access_log=-", "--set")
    journal = serve(*words, "log_format=journal", ready=False)
    peer = _visit(journal.log.wait_for(r"^<6>listening .*url=(\S+)")[1])
    journal.log.wait_for(rf'^<6>request service=Marking .* peer={peer} .* mark="-"$')
    file = tmp_path / "log"
    serve(*words, "log_format=json", "--set", f"log_file={file}", ready=False)
    eventually(lambda: file.exists() and '"ready"' in file.read_text())
    url = next(each["url"] for each in map(json.loads, file.read_text().splitlines()) if each["event"] == "listening")
    peer = _visit(url)
    eventually(lambda: '"request"' in file.read_text())
    found = next(each for each in map(json.loads, file.read_text().splitlines()) if each["event"] == "request")
    assert (found["peer"], found["level"]) == (peer, "info")


def _visit(url: str) -> str:
    """Come and leave; the address that it was from."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), DEADLINE) as client:
        host, port = client.getsockname()
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
    return f"{host}:{port}"


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ("{per}", "unknown field 'per' of service, slot, "),
        ("{per}", "; did you mean peer?"),
        ("{peer.real}", "unknown field 'peer.real'"),
        ("{}", "unknown field ''"),
        ("{peer:{what}}", "{peer:…} without another field in it"),
        ("{mark:{mark}}", "{mark:…} without another field in it"),
        ("{peer:1000}", "{peer:…} of at most 999 characters"),
        ("{peer:1000000000000}", "{peer:…} of at most 999 characters"),
        ("{slot:c}", "Unknown format code 'c'"),
        ("{peer", "expected '}'"),
        ("{duration_ms:x}", "Unknown format code 'x'"),
        ("{peer}\n{mark}", "one line"),
        (7, "json, or text with fields such as {peer}, not 7"),
    ],
)
def test_a_wrong_format_is_a_fault_that_names_what_there_is(raw: object, fault: str) -> None:
    with pytest.raises(Faults, match=f"^a: .*{re.escape(fault)}") as refused:
        check([Value("t", "a", "target", "a:b"), Value("a", "a", "access_log_format", raw)], "x")
    if "unknown" in fault:
        assert all(name in str(refused.value) for name in FIELDS)


def test_every_field_may_be_used_with_what_str_format_knows() -> None:
    form = check_format("".join(f"{{{name}}}|" for name in FIELDS) + "{duration_ms:.1f} {peer:>20} {{braces}}")
    line = line_of(form, "ser{v}ice", 3, 7, 99)(2, "192.0.2.1:5", "tcp://x:1", "ok", 1_250_000, "").decode()
    assert line.startswith("ser{v}ice|3|7|99|2|192.0.2.1:5|tcp://x:1|ok|0.00125|1.25|-|20")
    assert line.endswith("|1.2          192.0.2.1:5 {braces}\n")


# Files.


def test_a_file_that_was_moved_away_is_left_alone_and_no_line_is_lost(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(HANDLER, *TCP, "--kind", "thread", "--threads", 2, "--max-children", 2, *JSON)
    access, stop, peers = tmp_path / "access.log", threading.Event(), []

    def go_on() -> None:
        while not stop.is_set():
            peers.append(talk(daemon, b"x"))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for number in range(3):
            eventually(access.exists)
            moved = access.rename(tmp_path / f"access.log.{number}")
            daemon.signal(signal.SIGUSR1)
            eventually(access.exists)
            assert moved.exists()
    finally:
        stop.set()
        thread.join()
    files = [*tmp_path.glob("access.log*")]
    eventually(lambda: sum(file.read_text().count("\n") for file in files) >= len(peers))
    found = [json.loads(line)["peer"] for file in files for line in file.read_text().splitlines()]
    assert sorted(found) == sorted(peers)


def test_usr1_has_it_made_anew_by_workers_that_have_nothing_to_write(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(HANDLER, *TCP, "--max-children", 1, *JSON)
    access = tmp_path / "access.log"
    talk(daemon, b"leave")  # to another directory
    lines(access, 1)
    access.rename(tmp_path / "old.log")
    daemon.signal(signal.SIGUSR1)
    eventually(access.exists)


def test_nobody_has_to_say_that_it_was_moved(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(HANDLER, *TCP, "--max-children", 1, *JSON)
    access = tmp_path / "access.log"
    talk(daemon, b"x")
    lines(access, 1)
    access.rename(tmp_path / "old.log")

    def is_new() -> bool:
        talk(daemon, b"x")
        return access.exists()

    eventually(is_new)


def test_where_it_cannot_be_made_anew_that_is_said_once_and_the_old_one_goes_on(serve: Serve, tmp_path: Path) -> None:
    directory, moved = tmp_path / "logs", tmp_path / "moved"
    directory.mkdir()
    path = directory / "access.log"
    daemon = serve(HANDLER, *TCP, "--max-children", 1, "--set", f"access_log={path}")
    directory.rename(moved)
    for _ in range(3):
        daemon.signal(signal.SIGUSR1)
        daemon.log.wait_for(rf'^access_log_lost service=Marking .* path={path} reason="No such file or directory"')
        talk(daemon, b"x")
    lines(moved / "access.log", 3)
    directory.mkdir()
    daemon.signal(signal.SIGUSR1)
    eventually(path.exists, "it is made as soon as it can be")
    talk(daemon, b"x")
    lines(path, 1)
    assert len(daemon.log.matches("^access_log_lost")) == 1


def test_who_reads_nothing_stops_nobody_and_what_is_lost_is_counted(serve: Serve, tmp_path: Path) -> None:
    fifo = tmp_path / "access.log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        daemon = serve(HANDLER, *TCP, *METRICS, "--max-children", 1, *JSON)
        dropped = 'preforkd_access_log_dropped_lines_total{service="Marking"}'
        with open(fifo, "wb", buffering=0) as filler:
            os.set_blocking(filler.fileno(), False)
            while filler.write(bytes(4096)) is not None:
                pass
        for _ in range(5):
            talk(daemon, b"x")
        eventually(lambda: daemon.metrics()[dropped] == 5)
        while os.read(reader, 1 << 20).count(0) == 1 << 20:
            pass
        peer = talk(daemon, b"x")
        daemon.log.wait_for(r"^access_log_dropped service=Marking slot=0 .* lines=5\b")
        assert json.loads(os.read(reader, 4096).decode().strip("\0\n"))["peer"] == peer
        assert daemon.metrics()[dropped] == 5
    finally:
        os.close(reader)


def test_a_file_that_cannot_be_opened_is_a_failure_to_boot(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "preforkd.toml"
    good = f'[services.app]\ntarget = "{HANDLER}"\nlisten = ["tcp://127.0.0.1:0"]\nprobation = 0\nmax_children = 1\n'
    file.write_text(good)
    daemon = serve("-c", file)
    file.write_text(f'{good}access_log = "{tmp_path}/nowhere/access.log"\n')
    refused = daemon.ctl("reload")
    assert refused.returncode == 1
    assert f"access_log: {tmp_path}/nowhere/access.log: No such file or directory" in refused.stderr
    assert talk(daemon, b"x")


# Without one.


@kinds
def test_without_one_nothing_of_it_is_there(serve: Serve, kind: str) -> None:
    daemon = serve(HANDLER, *TCP, *KINDS[kind])
    assert daemon.ask(b"modules\n") == b"\n"


def test_a_reload_turns_it_on_and_off(serve: Serve, tmp_path: Path) -> None:
    file, access = tmp_path / "preforkd.toml", tmp_path / "access.log"
    off = f'[services.app]\ntarget = "{HANDLER}"\nlisten = ["tcp://127.0.0.1:0"]\nprobation = 0\nmax_children = 1\n'
    for number, text in enumerate([off, f'{off}access_log = "{access}"\n', off]):
        file.write_text(text)
        if number == 0:
            daemon = serve("-c", file)
        else:
            assert daemon.ctl("reload").returncode == 0
        talk(daemon, b"%d" % number)
        assert access.exists() == bool(number)
    daemon.stop()
    (line,) = lines(access, 1)
    assert 'mark="1"' in line


def test_a_mark_commands_no_terminal(serve: Serve) -> None:
    """What a client has said may be in it: neither status nor the log shows more than characters."""
    daemon = serve(HANDLER, *TCP, "--max-children", 1)
    with daemon.connect() as client, client.makefile("rb") as answers:
        client.sendall(rb"\x1b[2J\r\nready" + b"\n")
        answers.readline()
        shown = daemon.ctl("status").stdout
        assert r"\x1b[2J\r\nready" in shown
        assert "\x1b" not in shown
        client.sendall(rb"\x1b[2J" + b"\nkill\n")
        answers.read()
    assert "mark=kill" in daemon.log.wait_for("^worker_exit ").string
