"""The scoreboard as a value: layout, attaching, rows that outlive workers, and words that are never torn."""

import os
import socket
from collections.abc import Iterator

import pytest

from preforkd_workers.scoreboard import (
    BEGUN,
    BOUNDS_NS,
    BUCKETS,
    CAUSES,
    EMPTY,
    ERRORS,
    EXITS,
    HEADER,
    HEARTBEAT,
    OK,
    PID,
    REFUSED,
    ROW_WORDS,
    ROWS_USED,
    SERVICE_WORDS,
    SERVING,
    STATE,
    WORD,
    Scoreboard,
    Section,
    blank_row,
    ended,
    is_busy,
)

SECTIONS = [Section("echo", "process", ("tcp://127.0.0.1:7", "unix:@é"), 12), Section("b", "process", (), 3)]


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    made = Scoreboard.create("mail", SECTIONS)
    yield made
    os.close(made.fd)


def test_whoever_has_the_descriptor_reads_what_the_board_is_about(board: Scoreboard) -> None:
    other = Scoreboard(os.dup(board.fd))
    assert other.name == "mail"
    assert [service.section for service in other.services.values()] == SECTIONS
    board.daemon[HEARTBEAT] = 2**64 - 1
    board.services["b"].row(2)[OK] = 7
    assert other.daemon[HEARTBEAT] == 2**64 - 1
    assert other.services["b"].row(2)[OK] == 7
    os.close(other.fd)


def test_every_word_has_one_place_and_none_is_missing(board: Scoreboard) -> None:
    groups = [board.daemon]
    for service in board.services.values():
        groups += [service.words, *(service.listener(i) for i, _ in enumerate(service.section.listeners))]
        groups += [service.row(i) for i in range(service.section.rows)]
    for number, group in enumerate(groups, 1):
        for index in range(len(group)):
            assert group[index] == 0, "already taken by another group"
            group[index] = number
    words = memoryview(os.pread(board.fd, os.fstat(board.fd).st_size, 0))[HEADER:].cast("Q")
    assert words.tolist() == [number for number, group in enumerate(groups, 1) for _ in range(len(group))]


def test_rows_are_aligned_to_cache_lines_and_have_room_for_their_words(board: Scoreboard) -> None:
    assert ROW_WORDS * WORD % 64 == 0
    assert BUCKETS + len(BOUNDS_NS) + 1 <= ROW_WORDS
    assert EXITS + len(CAUSES) <= SERVICE_WORDS


def test_only_rows_that_were_used_are_read(board: Scoreboard) -> None:
    service = board.services["echo"]
    assert list(service.rows()) == []
    service.words[ROWS_USED] = 2
    assert len(list(service.rows())) == 2


def test_the_row_of_a_dead_lane_is_emptied_but_keeps_its_counts(board: Scoreboard) -> None:
    service = board.services["echo"]
    row = service.row(1)
    row[PID], row[STATE], row[BEGUN], row[OK], row[ERRORS], row[REFUSED] = 5, SERVING, 10, 6, 2, 1
    row[BUCKETS] = 8
    assert is_busy(row)
    assert service.settle_row(1) == 1
    assert (row[PID], row[STATE]) == (0, EMPTY)
    assert (row[BEGUN], row[OK], row[ERRORS], row[REFUSED], row[BUCKETS]) == (9, 6, 2, 1, 8)
    assert not is_busy(row)
    assert service.settle_row(1) == 0, "a death is counted once"


def test_many_requests_may_die_with_one_worker_and_what_has_ended_is_what_has_an_outcome() -> None:
    row = blank_row()
    row[BEGUN], row[OK] = 9, 2
    assert (ended(row), is_busy(row)) == (2, True)
    row[ERRORS], row[REFUSED] = 3, 4
    assert (ended(row), is_busy(row)) == (9, False)


def test_a_description_that_does_not_fit_is_refused() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=r"1 services need \d+ bytes of description, not 65536"):
        Scoreboard.create("mail", [Section(HEADER * "x", "process", (), 1)])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_board_of_another_version_is_refused(board: Scoreboard) -> None:
    header = os.pread(board.fd, HEADER, 0)
    os.pwrite(board.fd, header.replace(b'"version": 1', b'"version": 9'), 0)
    with pytest.raises(ValueError, match="scoreboard of version 9, this program reads version 1"):
        Scoreboard(board.fd)


def test_counts_survive_the_death_of_the_process_that_wrote_them(board: Scoreboard) -> None:
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            row = board.services["echo"].row(0)
            row[BEGUN] += 1
            row[OK] += 1
            row[BEGUN] += 1
            os.kill(os.getpid(), 9)
        os.waitpid(pid, 0)
        assert board.services["echo"].settle_row(0) == 1
    assert board.services["echo"].row(0)[OK] == 3


def test_a_reader_in_another_process_never_sees_half_a_word(board: Scoreboard) -> None:
    """The two values differ in every byte: a store byte by byte, or one that clears first, would show."""
    low, high = 0x0101010101010101, 0xFEFEFEFEFEFEFEFE
    board.services["echo"].row(3)[OK] = low
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        row = board.services["echo"].row(3)
        theirs.setblocking(False)
        ours.close()
        while True:
            for _ in range(1000):
                row[OK] = low
                row[OK] = high
            try:
                theirs.recv(1)  # end-of-file: the reader has read enough
                os._exit(0)
            except BlockingIOError:
                pass
    theirs.close()
    row, seen, reads = Scoreboard(board.fd).services["echo"].row(3), set[int](), 0
    while reads < 300_000 or not {low, high} <= seen:
        seen.add(row[OK])
        reads += 1
    ours.close()
    assert os.waitpid(pid, 0)[1] == 0
    assert seen == {low, high}
