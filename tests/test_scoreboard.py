"""The scoreboard as a value: layout, attaching, rows that outlive workers, and words that are never torn."""

import os
import socket
from collections.abc import Iterator
from itertools import count, pairwise

import pytest

from preforkd_workers import scoreboard
from preforkd_workers.scoreboard import (
    BEGUN,
    BOUNDS_NS,
    BUCKETS,
    CAUSES,
    DEADLINE,
    DIRECTORY,
    DROPS,
    EMPTY,
    ERRORS,
    EXITS,
    HEARTBEAT,
    KILLED,
    LAYOUT,
    MARK,
    OK,
    PEER,
    PID,
    REFUSED,
    ROW_WORDS,
    SERVICE_WORDS,
    SERVING,
    SINCE,
    STATE,
    WORD,
    Rows,
    Scoreboard,
    ended,
    read_text,
    write_text,
)

URLS = ["tcp://127.0.0.1:7", "unix:@é"]


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    made = Scoreboard.create("mail")
    echo = made.add("echo")
    made.list_listeners("echo", URLS)
    made.add("b")
    for index in range(20):
        echo.use(index)
    yield made
    os.close(made.fd)


def test_whoever_has_the_descriptor_reads_what_the_board_is_about(board: Scoreboard) -> None:
    other = Scoreboard.attach(os.dup(board.fd))
    assert other.name == "mail"
    assert [*other.services] == ["echo", "b"]
    assert [*other.services["echo"].listeners()] == URLS
    board.daemon[HEARTBEAT] = 2**64 - 1
    board.services["echo"].rows(19)[0][OK] = 7
    assert other.daemon[HEARTBEAT] == 2**64 - 1
    assert other.services["echo"].rows(19)[0][OK] == 7
    os.close(other.fd)


def test_every_word_has_one_place(board: Scoreboard) -> None:
    assert board.daemon[LAYOUT] > 0
    groups = [board.daemon]
    for service in board.services.values():
        groups += [service.words, *service.listeners().values(), *(row for rows in service.blocks() for row in rows)]
    board.daemon[LAYOUT] = 0
    for number, group in enumerate(groups, 1):
        for index in range(len(group)):
            assert group[index] == 0, "already taken by another group"
            group[index] = number


def test_what_a_master_adds_while_it_runs_is_seen_by_who_looks_again(board: Scoreboard) -> None:
    other = Scoreboard.attach(os.dup(board.fd))
    row = board.services["echo"].rows(3)[0]
    board.add("new").use(0)
    board.services["echo"].use(1000)
    board.list_listeners("echo", [URLS[1], "tcp://127.0.0.1:8"])
    other.refresh()
    assert [*other.services] == ["echo", "b", "new"]
    assert [*other.services["echo"].listeners()] == [URLS[1], "tcp://127.0.0.1:8"]
    row[OK], board.services["echo"].rows(1000)[0][OK] = 5, 6
    assert (other.services["echo"].rows(3)[0][OK], other.services["echo"].rows(1000)[0][OK]) == (5, 6)
    os.close(other.fd)


def test_a_service_that_has_gone_and_comes_back_goes_on_counting_and_takes_no_more_room(board: Scoreboard) -> None:
    board.services["echo"].words[KILLED] = 7
    sizes = set()
    for turn in range(200):
        board.remove("echo")
        assert "echo" not in board.services
        board.add("echo").use(19)
        board.list_listeners("echo", [f"tcp://127.0.0.1:{turn}"])
        board.add("last")
        sizes.add(board._end)
    assert board.services["echo"].words[KILLED] == 7
    assert len(sizes) == 1


def test_a_listener_that_stays_keeps_what_it_has_counted_and_another_begins_at_zero(board: Scoreboard) -> None:
    for words in board.services["echo"].listeners().values():
        words[DROPS] = 9
    board.list_listeners("echo", ["udp://x:1", URLS[1]])
    assert {url: words[DROPS] for url, words in board.services["echo"].listeners().items()} == {
        URLS[1]: 9,
        "udp://x:1": 0,
    }


def test_a_reader_never_sees_half_a_directory(board: Scoreboard) -> None:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        theirs.setblocking(False)
        ours.close()
        for turn in count():
            board.list_listeners("echo", [f"tcp://127.0.0.1:{turn}" for _ in range(2)] * (turn % 3) + ["udp://last:1"])
            try:
                theirs.recv(1)  # end-of-file: the reader has read enough
                os._exit(0)
            except BlockingIOError:
                pass
    theirs.close()
    other, seen = Scoreboard.attach(os.dup(board.fd)), set[int]()
    while len(seen) < 300:
        other.refresh()
        assert "udp://last:1" in other.services["echo"].listeners() or URLS[0] in other.services["echo"].listeners()
        seen.add(other.daemon[LAYOUT])
    ours.close()
    assert os.waitpid(pid, 0)[1] == 0
    os.close(other.fd)


def test_rows_are_aligned_to_cache_lines_and_have_room_for_their_words(board: Scoreboard) -> None:
    assert ROW_WORDS * WORD % 64 == 0
    assert BUCKETS + len(BOUNDS_NS) + 1 <= PEER
    assert EXITS + len(CAUSES) <= SERVICE_WORDS


def test_a_slot_has_rows_for_each_number_of_lanes_that_it_was_used_with_and_none_before(board: Scoreboard) -> None:
    service = board.services["b"]
    assert list(service.blocks()) == []
    with pytest.raises(IndexError):
        service.rows(0)
    wanted = [(slot, lanes) for slot in (0, 1, 4) for lanes in (1, 3, 5000)]
    places = {service.use(slot, lanes): lanes for slot, lanes in wanted}
    assert len(places) == len(wanted)
    taken = sorted((at, at + lanes * ROW_WORDS) for at, lanes in places.items())
    assert all(end <= at for (_, end), (at, _) in pairwise(taken))
    assert [len(service.rows(slot, lanes)) for slot, lanes in wanted] == [lanes for _, lanes in wanted]
    assert all(service.use(slot, lanes) == at for (slot, lanes), at in zip(wanted, places, strict=True)), "once"
    service.rows(4, 3)[2][OK] = 7
    assert sum(rows.total(OK) for rows in service.blocks()) == 7
    assert [rows.total(OK) for _, rows in service.slots() if rows.total(OK)] == [7]


def test_the_rows_of_a_dead_worker_are_emptied_but_keep_their_counts(board: Scoreboard) -> None:
    service = board.services["echo"]
    service.use(1, 2)
    rows = service.rows(1, 2)
    first, second = rows
    first[PID], first[STATE], first[BEGUN], first[OK], first[ERRORS], first[REFUSED] = 5, SERVING, 10, 6, 2, 1
    first[BUCKETS] = 8
    second[BEGUN], second[SINCE], second[DEADLINE] = 1, 9, 10
    assert (rows.busy, rows.oldest) == (1, 9)
    assert rows.settle() == 2
    assert (first[PID], first[STATE]) == (0, EMPTY)
    assert (first[BEGUN], first[OK], first[ERRORS], first[REFUSED], first[BUCKETS]) == (9, 6, 2, 1, 8)
    assert (second[BEGUN], second[SINCE], second[DEADLINE]) == (0, 0, 0)
    assert (rows.busy, rows.oldest, rows.ended) == (0, 0, 9)
    assert rows.settle() == 0, "a death is counted once"


def test_what_has_ended_is_what_has_an_outcome() -> None:
    row = Rows.blank()[0]
    row[BEGUN], row[OK], row[ERRORS], row[REFUSED] = 9, 2, 3, 4
    assert ended(row) == 9


@pytest.mark.parametrize("text", ["", "parsing", "größer" * 10, "x" * 48, "x" * 49, "\udcff"])
def test_a_text_in_a_row_is_cut_to_its_place_and_leaves_its_neighbours_alone(text: str) -> None:
    row = Rows.blank()[0]
    for word in (PEER, MARK):
        write_text(row, word, 48 * "-")
        write_text(row, word, text)
        shown = text.encode(errors="replace")[:48].decode(errors="replace")
        assert read_text(row, word) == shown
    assert not any(row[:PEER])
    assert not any(row[MARK + 6 :])


def test_a_description_that_does_not_fit_is_refused(board: Scoreboard) -> None:
    with pytest.raises(MemoryError, match=r"3 services need \d+ bytes of description, not 65536"):
        board.add(DIRECTORY * "x")


def test_a_board_that_is_full_says_so(board: Scoreboard) -> None:
    with pytest.raises(MemoryError, match="the scoreboard is full: 67108864 bytes"):
        board.services["b"].use(300_000)


def test_a_board_of_another_version_is_refused(board: Scoreboard) -> None:
    for start in (0, DIRECTORY):
        directory = os.pread(board.fd, DIRECTORY, start)
        os.pwrite(board.fd, directory.replace(b'"version": 3', b'"version": 9'), start)
    with pytest.raises(ValueError, match="scoreboard of version 9, this program reads version 3"):
        Scoreboard.attach(board.fd)


def test_what_is_no_board_is_refused(board: Scoreboard) -> None:
    with open("/dev/null") as file, pytest.raises(ValueError, match="is no scoreboard of version 3"):
        Scoreboard.attach(file.fileno())


def test_counts_survive_the_death_of_the_process_that_wrote_them(board: Scoreboard) -> None:
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            row = board.services["echo"].rows(0)[0]
            row[BEGUN] += 1
            row[OK] += 1
            row[BEGUN] += 1
            os.kill(os.getpid(), 9)
        os.waitpid(pid, 0)
        assert board.services["echo"].rows(0).settle() == 1
    assert board.services["echo"].rows(0)[0][OK] == 3


def test_a_reader_in_another_process_never_sees_half_a_word(board: Scoreboard) -> None:
    """The two values differ in every byte: a store byte by byte, or one that clears first, would show."""
    low, high = 0x0101010101010101, 0xFEFEFEFEFEFEFEFE
    board.services["echo"].rows(3)[0][OK] = low
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        row = board.services["echo"].rows(3)[0]
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
    row, seen, reads = Scoreboard.attach(board.fd).services["echo"].rows(3)[0], set[int](), 0
    while reads < 300_000 or not {low, high} <= seen:
        seen.add(row[OK])
        reads += 1
    ours.close()
    assert os.waitpid(pid, 0)[1] == 0
    assert seen == {low, high}


def test_however_many_services_come_and_go_the_board_does_not_fill(board: Scoreboard) -> None:
    for number in range(1000):
        name = f"service {number}".ljust(200)
        made = board.add(name)
        assert not any(made.words)
        board.list_listeners(name, [f"tcp://127.0.0.1:{number}"])
        at = made.use(3)
        assert not any(board.rows_at(at, 1)[0])
        board.rows_at(at, 1)[0][OK], made.words[KILLED] = number + 1, 1
        board.remove(name)
    assert [*Scoreboard.attach(os.dup(board.fd)).services] == ["echo", "b"]
    again = board.add("service 999".ljust(200))
    assert again.rows(3)[0][OK] == 1000  # remembered: it has not been gone for long


def test_more_services_than_can_be_described_are_known_beforehand(board: Scoreboard) -> None:
    def services(number: int) -> dict[str, list[str]]:
        return {f"service{index}": [f"unix:/run/{index}.sock"] for index in range(number)}

    most = next(number for number in range(1, 9999) if board.lacks_room(services(number)))
    assert most > 300
    for name, urls in services(most - 1).items():
        board.add(name).use(0)
        board.list_listeners(name, urls)


def test_listeners_are_in_the_order_in_which_lanes_number_them(board: Scoreboard) -> None:
    for urls in (["udp://new:1", *URLS], [URLS[1], "udp://new:1"], ["udp://newer:1", URLS[1], "udp://new:1"]):
        board.list_listeners("echo", urls)
        assert [*board.services["echo"].listeners()] == urls


def test_no_two_things_share_a_word() -> None:
    at = vars(scoreboard)
    daemon = {"RELOADS": len(scoreboard.RESULTS)}
    daemon |= dict.fromkeys(
        ["STARTED_AT", "HEARTBEAT", "LAYOUT", "RELOADED_AT", "RELOAD_NS", "LOG_DROPPED", "RELOAD_FAILED"], 1
    )
    service = {"EXITS": len(scoreboard.CAUSES)}
    service |= dict.fromkeys(
        ["GENERATION", "SIZE", "LIMIT", "SPAWNS", "KILLED", "REAPED_CPU_NS", "CAPACITY", "HELD_BACK"], 1
    )
    texts = dict.fromkeys(["PEER", "MARK"], scoreboard.TEXT // scoreboard.WORD)
    row = {"BUCKETS": len(scoreboard.BOUNDS_NS) + 1, **texts}
    row |= dict.fromkeys(["PID", "ROW_GENERATION", "STATE", "SINCE", "DEADLINE", "LISTENER", "CLIENT", "BEGUN"], 1)
    row |= dict.fromkeys(["OK", "ERRORS", "REFUSED", "LIMITED", "FULL", "IDLED", "TRUNCATED", "BUSY_NS"], 1)
    row |= dict.fromkeys(["UNWRITTEN", "UNLOGGED", "THREAD"], 1)
    for words, end in (daemon, "DAEMON_WORDS"), (service, "SERVICE_WORDS"), (row, "ROW_WORDS"):
        taken = sorted(at[name] + offset for name, length in words.items() for offset in range(length))
        assert len(taken) == len(set(taken)), end
        assert taken[-1] < at[end]
