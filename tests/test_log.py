"""The log: reasons in a line, formats, levels, and what targets log."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

import preforkd
import preforkd_workers
from preforkd import log
from preforkd.formats import Journal, Json, Text
from preforkd.log import summary
from preforkd.priorities import EVENTS, Priority, priority_of, priority_of_text
from preforkd.stacks import PAUSE, Stacks
from preforkd.transaction import ENDS
from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon
from tests.unheard import TALK

TRACEBACK = """services.a:
Traceback (most recent call last):
  File "app.py", line 1
ValueError: no
(raised by the hook on_mold)"""
STACK = """services.a:
the import of a took longer
Current thread 0x1 (most recent call first):
  File "app.py", line 1 in f
Extension modules: x"""


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("", ""),
        ("one line", "one line"),
        ("first fault\nsecond fault", "first fault; and 1 more"),
        (
            "services.a:\n  File \"app.py\", line 7\n    x(\n     ^\nSyntaxError: '(' was never closed",
            "services.a: SyntaxError: '(' was never closed",
        ),
        (TRACEBACK, "services.a: ValueError: no"),
        (STACK, "services.a: the import of a took longer"),
    ],
)
def test_a_reason_in_a_line_is_what_was_raised_or_the_sentence_that_it_begins_with(reason: str, line: str) -> None:
    assert summary(reason) == line


# What an event looks like.

FIELDS = {"service": "a", "reason": 'no "way"', "seconds": 1.5, "ready": True}
AT = "2026-01-02T03:04:05.678Z"


def test_text_has_the_time_last_where_nobody_else_adds_one() -> None:
    line = 'boot_failed service=a reason="no \\"way\\"" seconds=1.5 ready=True'
    assert Text().event(Priority.ERROR, AT, "boot_failed", FIELDS) == f"{line} at={AT}"
    assert Text(has_time=False).event(Priority.ERROR, AT, "boot_failed", FIELDS) == line
    assert Text().text(Priority.ERROR, AT, "a#1", "one\n two") == "a#1| one\na#1|  two"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("é", "é"),
        ("a\\b", "a\\b"),
        ("", '""'),
        ("a b", '"a b"'),
        ('\\"\n', r'"\\\"\n"'),
        ("\r\x1b[2Jready", r'"\r\x1b[2Jready"'),
        ("\u2028\x00\t", r'"\u2028\x00\t"'),
        ("\udcff", r'"\udcff"'),
    ],
)
def test_what_a_client_may_have_said_ends_no_line_and_commands_no_terminal(value: str, written: str) -> None:
    assert Text().event(Priority.INFO, AT, "e", {"mark": value}) == f"e mark={written} at={AT}"


def test_the_journal_has_a_priority_on_every_line_and_adds_the_time_itself() -> None:
    assert Journal().event(Priority.WARNING, AT, "kill", {"pid": 7}) == "<4>kill pid=7"
    assert Journal().text(Priority.ERROR, AT, "a#1", "one\n two") == "<3>a#1| one\n<3>a#1|  two"


def test_json_is_one_object_a_line() -> None:
    line = Json().event(Priority.ERROR, AT, "boot_failed", FIELDS)
    assert json.loads(line) == {"at": AT, "level": "error", "event": "boot_failed", **FIELDS}
    stack = Json().text(Priority.INFO, AT, "a#1", "one\n two")
    assert json.loads(stack) == {"at": AT, "level": "info", "event": "text", "of": "a#1", "text": "one\n two"}
    assert "\n" not in line + stack


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=())), st.binary()
)


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=())), VALUES),
    st.text(st.characters(exclude_categories=())),
)
def test_json_is_valid_whatever_the_values_are(fields: dict[str, object], text: str) -> None:
    """Bytes that are no text among them, as the system has them in names of files."""
    for line in (Json().event(Priority.INFO, AT, "e", fields), Json().text(Priority.INFO, AT, text, text)):
        assert json.loads(line.encode())["at"] == AT
        assert len(line.splitlines()) == 1 or "\n" not in line


def test_a_field_does_not_hide_what_every_object_has() -> None:
    line = Json().event(Priority.INFO, AT, "command", {"level": "debug", "at": "once"})
    assert json.loads(line) == {"at": AT, "level": "info", "event": "command", "level_": "debug", "at_": "once"}


# How much it matters.


@pytest.mark.parametrize(
    ("event", "fields", "priority"),
    [
        ("cannot_start", {}, Priority.ERROR),
        ("reload_refused", {}, Priority.ERROR),
        ("reload_done", {}, Priority.INFO),
        ("ready", {}, Priority.INFO),
        ("worker_exit", {"cause": "drained"}, Priority.INFO),
        ("worker_exit", {"cause": "crash"}, Priority.ERROR),
        ("worker_exit", {"cause": "orphaned"}, Priority.WARNING),
        ("no_control", {"advice": "say where"}, Priority.WARNING),
        ("receive_buffer", {}, Priority.INFO),
        ("sample", {"advice": "your own"}, Priority.INFO),
        ("stranger_reaped", {}, Priority.DEBUG),
    ],
)
def test_the_priority_of_an_event_is_in_the_table(event: str, fields: dict[str, object], priority: Priority) -> None:
    assert priority_of(event, fields) is priority


def test_the_table_names_events_that_there_are() -> None:
    """And none that was called otherwise since."""
    roots = [Path(str(each.__file__)).parent for each in (preforkd, preforkd_workers)]
    sources = [path.read_text() for root in roots for path in root.rglob("*.py") if path.name != "priorities.py"]
    said = set(re.findall(r'"([a-z_]+)"', "".join(sources)))
    said |= {f"reload_{phase.value}" for phase in ENDS} | {"text"}
    assert EVENTS.keys() - said == set()


def test_a_stack_that_somebody_has_asked_for_is_no_error() -> None:
    assert priority_of_text(STACK) is Priority.INFO
    assert priority_of_text('  File "app.py", line 1 in f\n  File "app.py", line 2 in g') is Priority.INFO  # its rest
    assert priority_of_text(f"Fatal Python error: Segmentation fault\n{STACK}") is Priority.ERROR
    assert priority_of_text(TRACEBACK) is Priority.ERROR
    assert priority_of_text('  File "app.py", line 1, in f\nValueError: no') is Priority.ERROR


def test_what_is_below_the_level_is_kept_and_followed_but_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[log.Record] = []
    log.followers.append(heard.append)
    log.set_level("warning")
    try:
        log.event("ready", pid=1)
        log.event("kill", pid=2)
    finally:
        log.set_level("debug")
        log.followers.clear()
    assert [record["event"] for record in heard] == ["ready", "kill"]
    assert [record["event"] for record in log.recent][-2:] == ["ready", "kill"]
    assert capsys.readouterr().err.startswith("kill pid=2")


# In a daemon.


def test_the_log_of_a_daemon_is_json_and_a_stack_one_object(serve: Serve) -> None:
    daemon = serve(TALK, "--listen", "tcp://127.0.0.1:0", "--set", "log_format=json", ready=False)
    url = daemon.log.wait_for('"event":"listening","service":"Talk","url":"tcp://127.0.0.1:(\\d+)"')[1]
    daemon.log.wait_for('"event":"ready"')
    with ExitStack() as held:
        for _ in range(4):  # each worker is in its handler then: a stack has lines
            client = held.enter_context(Conversation(socket.create_connection(("127.0.0.1", int(url)), DEADLINE)))
            client.socket.sendall(b"print 0 nothing\n")
            assert client.answers.readline() == b"said\n"
        daemon.signal(signal.SIGUSR1)
        for slot in range(4):
            daemon.log.wait_for(f'"event":"text","of":"Talk#{slot}"')
    assert daemon.stop() == 0
    records = [json.loads(line) for line in daemon.log.lines]
    stacks = [record for record in records if record["event"] == "text"]
    assert len(stacks) == 4
    wrong = [each for each in stacks if not each["text"].startswith("Stack (") or each["level"] != "info"]
    assert wrong == []
    assert all({"at", "level", "event"} <= record.keys() for record in records)


def test_a_crash_is_one_object_and_an_error(serve: Serve) -> None:
    daemon = serve(":Obey", "--listen", "tcp://127.0.0.1:0", "--set", "log_format=json", ready=False)
    url = daemon.log.wait_for('"event":"listening","service":"Obey","url":"tcp://127.0.0.1:(\\d+)"')[1]
    daemon.log.wait_for('"event":"ready"')
    with socket.create_connection(("127.0.0.1", int(url))) as client:
        client.sendall(b"segfault\n")
        daemon.log.wait_for('"event":"worker_exit"')
    records = [json.loads(line) for line in daemon.log.lines]
    stack = next(record for record in records if record["event"] == "text")
    assert stack["level"] == "error"
    assert "Segmentation fault" in stack["text"]
    assert "in obey" in stack["text"]
    exit_ = next(record for record in records if record["event"] == "worker_exit")
    assert (exit_["level"], exit_["cause"]) == ("error", "crash")
    assert records.index(stack) < records.index(exit_)


def test_the_journal_is_known_by_its_socket(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    found = os.fstat(theirs.fileno())
    command = [sys.executable, "-m", "preforkd", "serve", "nowhere:Nobody", "--listen", f"unix:{tmp_path}/x.sock"]
    for stream, begin in ((f"{found.st_dev}:{found.st_ino}", b"<6>listening "), ("1:1", b"listening ")):
        environment = {**os.environ, "JOURNAL_STREAM": stream, "XDG_RUNTIME_DIR": str(tmp_path)}
        done = subprocess.run(command, stderr=theirs.fileno(), env=environment, timeout=DEADLINE, check=False)
        assert done.returncode == 70
        said = ours.recv(1 << 16)
        assert said.startswith(begin)
        is_journal = begin.startswith(b"<")
        assert (b" at=" in said) is not is_journal
        assert all(line.startswith((b"<6>", b"<3>", b"<4>")) is is_journal for line in said.splitlines())
        assert (b"\n<3>Nobody| no module named" in said) is is_journal
    ours.close()
    theirs.close()


# What the target logs.


@pytest.mark.parametrize("format_name", ["text", "json", "journal"])
def test_what_a_target_logs_without_a_handler_is_in_the_format_of_the_log(format_name: str, serve: Serve) -> None:
    daemon = serve(TALK, "--listen", "unix:talk.sock", "--set", f"log_format={format_name}", ready=False)
    daemon.log.wait_for("ready.* pid=|.*ready.*pid")
    daemon.log.wait_for(r'^(<6>)?ready |"event":"ready"')
    ask(daemon, b"log 1 text\nexception 1 wrong\n")
    match format_name:
        case "text":
            daemon.log.wait_for("^text 0$")
            daemon.log.wait_for("^failed$")
            daemon.log.wait_for("^ValueError: wrong 0$")
        case "journal":
            daemon.log.wait_for("^<4>text 0$")
            daemon.log.wait_for("^<3>failed$")
            daemon.log.wait_for("^<3>ValueError: wrong 0$")
        case "json":
            record = json.loads(daemon.log.wait_for('.*"message": "text 0".*')[0])
            assert record.pop("at")
            assert record.pop("pid") in daemon.family()
            known = {"service": "Talk", "logger": "app.talk", "message": "text 0", "answer": 42}
            assert record == {"level": "warning", "event": "log", **known}
            failed = json.loads(daemon.log.wait_for('.*"message": "failed".*')[0])
            assert failed["level"] == "error"
            assert failed["exc_info"].endswith("ValueError: wrong 0")


@pytest.mark.parametrize("format_name", ["json", "journal"])
def test_a_target_that_configures_logging_is_left_alone(format_name: str, serve: Serve) -> None:
    """Be it as late as in a request."""
    daemon = serve(TALK, "--listen", "unix:talk.sock", "--set", f"log_format={format_name}", ready=False)
    daemon.log.wait_for(r'^(<6>)?ready |"event":"ready"')
    ask(daemon, b"configure 1 text\n")
    daemon.log.wait_for("^mine:text 0$")


def test_nothing_is_imported_for_a_target_that_does_not_log(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import sys\nfrom socketserver import BaseRequestHandler\n"
        "class Handler(BaseRequestHandler):\n    def handle(self):\n"
        "        self.request.sendall(b'json' if 'pythonjsonlogger' in sys.modules else b'none')\n"
    )
    daemon = serve("plain:Handler", "--listen", "unix:talk.sock", "--set", "log_format=json", ready=False)
    daemon.log.wait_for('"event":"ready"')
    assert ask(daemon, b"") == b"none"


def ask(daemon: Daemon, question: bytes) -> bytes:
    """At talk.sock in its directory."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.readlink(f"/proc/{daemon.pid}/cwd") + "/talk.sock")
        if question:
            client.sendall(question)
            client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            return answer.read()


def test_lines_of_a_stack_are_one_text_when_no_more_of_them_come() -> None:
    said: list[tuple[str, str]] = []

    class Heard:
        def event(self, name: str, /, **fields: object) -> None: ...
        def text(self, prefix: str, lines: str) -> None:
            said.append((prefix, lines))

    stacks, before = Stacks(Heard()), monotonic()
    for line in ("Thread 1:", "  File 1"):
        stacks.add("a#0", line)
        stacks.add("a#1", line)
        stacks.settle(before + 0.9 * PAUSE)
    assert said == []
    stacks.tell("a#1")  # it has died
    stacks.settle(stacks.wake_at())
    assert said == [("a#1", "Thread 1:\n  File 1"), ("a#0", "Thread 1:\n  File 1")]
    assert stacks.wake_at() == float("inf")
