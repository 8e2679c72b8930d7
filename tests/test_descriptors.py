"""Descriptors by name: as they come, and as they are given away."""

import os
import re
import socket
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from preforkd.addresses import parse
from preforkd.descriptors import SCOREBOARD, Inherited, listener_name, places, scoreboard
from preforkd.listeners import ListenError
from preforkd_workers.scoreboard import (
    BEGUN,
    CAUSES,
    DIRECTORY,
    EMPTY,
    EXITS,
    KILLED,
    OK,
    PID,
    SERVING,
    STATE,
    Scoreboard,
)


@pytest.mark.parametrize(
    "url",
    [
        "tcp://127.0.0.1:80",
        "tcp://[::]:80?v6only=1",
        "unix:/run/a b#c%d",
        "unix:@ä\n",
        "unix-dgram:/x?mode=0660&user=u",
    ],
)
def test_a_name_is_one_that_systemd_takes_and_tells_the_address(url: str) -> None:
    name = listener_name(url)
    assert re.fullmatch(r"[ -9;-~]{1,255}", name)
    assert unquote(name) == url


def test_names_tell_apart_what_looks_alike() -> None:
    url = "tcp://127.0.0.1:0"
    names = [listener_name(url), listener_name(url, 2), listener_name(url, 3), listener_name(url, 1, (1, 2))]
    names += [listener_name(f"{url}#2"), listener_name(url, 1, (2, 1)), SCOREBOARD]
    assert len(set(names)) == len(names)


def inherited(names: str | None, number: object, pid: object) -> Inherited:
    environment = {"LISTEN_PID": str(pid), "LISTEN_FDS": str(number), "HOME": "/"}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    made = Inherited.take(environment)
    assert environment == {"HOME": "/"}
    return made


@pytest.fixture
def third() -> Iterator[None]:
    """Descriptors 3 and 4 are open for the time of a test, whatever they were before."""
    saved = [os.dup(number) if _is_open(number) else None for number in (3, 4)]
    reader, writer = os.pipe()
    for number in {3, 4} - {reader, writer}:
        os.dup2(reader, number)
    yield
    for number, before in zip((3, 4), saved, strict=True):
        os.close(number)
        if before is not None:
            os.dup2(before, number, inheritable=False)
            os.close(before)
    for number in {reader, writer} - {3, 4}:
        os.close(number)


def _is_open(number: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{number}")


@pytest.mark.parametrize(
    ("names", "number", "found"),
    [
        ("a:b", 2, {"a": [3], "b": [4]}),
        ("a:a", 2, {"a": [3, 4]}),
        (None, 2, {"unknown": [3, 4]}),
        ("a", 2, {"a": [3], "unknown": [4]}),
        ("a:b:c", 1, {"a": [3], "b": []}),
        ("a", "x", {"a": []}),
        ("a", -1, {"a": []}),
    ],
)
@pytest.mark.usefixtures("third")
def test_what_was_passed_is_found_by_its_name(names: str | None, number: object, found: dict[str, list[int]]) -> None:
    passed = inherited(names, number, os.getpid())
    assert {name: passed.numbers(name) for name in found} == found


@pytest.mark.usefixtures("third")
def test_what_was_passed_to_another_process_is_left_alone() -> None:
    assert inherited("a", 1, os.getpid() + 1).numbers("a") == []
    assert _is_open(3)


@pytest.mark.usefixtures("third")
def test_what_was_passed_does_not_reach_programs() -> None:
    os.set_inheritable(3, True)
    assert inherited("a", 1, os.getpid()).numbers("a") == [3]
    assert not os.get_inheritable(3)


def test_places_take_what_was_kept_and_what_was_named() -> None:
    passed = Inherited([("tcp%3A//127.0.0.1%3A0", 70), ("tcp%3A//127.0.0.1%3A0#2", 71), ("web", 72), ("web", 73)])
    urls = ["tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "fd:web"]
    found = places({"one": [parse(url) for url in urls]}, passed)
    assert [(place.descriptor, place.address.number) for place in found] == [
        *((70, -1), (71, -1), (None, -1)),
        *((None, 72), (None, 73)),
    ]
    assert passed.taken == {"tcp%3A//127.0.0.1%3A0", "tcp%3A//127.0.0.1%3A0#2"}


def test_a_listener_that_a_reload_adds_has_another_name_than_those_that_are_there() -> None:
    url = "tcp://127.0.0.1:0"
    used = {listener_name(url), listener_name(url, 3)}
    added = places({"more": [parse(url), parse(url), parse("tcp://127.0.0.1:7")]}, Inherited(), used)
    assert [place.count for place in added] == [2, 4, 1]


def test_a_name_that_was_not_passed_is_refused() -> None:
    with pytest.raises(ListenError, match="fd:web: no descriptor of this name was passed"):
        places({"one": [parse("fd:web")]}, Inherited())


# The scoreboard.


def test_a_scoreboard_is_taken_back_settled_and_counts_on() -> None:
    before = Scoreboard.create("x")
    service = before.add("echo")
    service.use(1)
    service.words[KILLED] = 5
    row = service.rows(0)[0]
    row[PID], row[STATE], row[BEGUN], row[OK] = 1, SERVING, 10, 9
    passed = Inherited([(SCOREBOARD, before.fd)])
    board = scoreboard("x", passed)
    assert board.fd == before.fd
    assert passed.taken == {SCOREBOARD}
    assert (row[PID], row[STATE], row[BEGUN], row[OK]) == (0, EMPTY, 9, 9)
    assert "echo" not in board.services, "until the settings name it again"
    after = board.add("echo")
    assert after.words[KILLED] == 6
    assert after.words[EXITS + CAUSES.index("orphaned")] == 1
    assert after.rows(0)[0][OK] == 9
    os.close(board.fd)


@pytest.mark.parametrize("what", ["other version", "rubbish", "a socket", "empty"])
def test_a_scoreboard_that_is_none_of_ours_is_replaced(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    descriptor = Scoreboard.create("x").fd
    for start in (0, DIRECTORY):
        directory = os.pread(descriptor, DIRECTORY, start)
        if what == "other version":
            os.pwrite(descriptor, directory.replace(b'"version": ', b'"version": 99'), start)
        if what == "rubbish":
            os.pwrite(descriptor, b"\xff", start)
    if what == "a socket":
        os.close(descriptor)
        descriptor = socket.socket().detach()
    if what == "empty":
        os.ftruncate(descriptor, 0)
    passed = Inherited([(SCOREBOARD, descriptor)])
    board = scoreboard("x", passed)
    assert board.services == {}
    assert passed.taken == set()
    assert capsys.readouterr().err.startswith("scoreboard_replaced reason=")
    os.close(board.fd)
