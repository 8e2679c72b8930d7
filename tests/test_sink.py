"""The sink: whole lines, as many as fit, and never a wait."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from select import PIPE_BUF

import pytest

from preforkd_workers.sink import Losses, Sink, make_room, unblocked


@pytest.fixture
def tidy() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pipe(tidy: ExitStack) -> tuple[int, int]:
    """A pipe: its reading side, which does not block, and its writing side."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    tidy.callback(os.close, reader)
    tidy.callback(os.close, writer)
    return reader, writer


def read_all(reader: int) -> bytes:
    found = b""
    try:
        while more := os.read(reader, 1 << 20):
            found += more
    except BlockingIOError:
        pass
    return found


def sink_on(writer: int, tidy: ExitStack) -> Sink:
    descriptor = unblocked(writer)
    if descriptor != writer:
        tidy.callback(os.close, descriptor)
    return Sink(descriptor)


def test_a_pipe_is_opened_anew_so_that_nobody_elses_flags_change(tidy: ExitStack) -> None:
    _, writer = pipe(tidy)
    sink = sink_on(writer, tidy)
    assert os.get_blocking(writer)
    assert not os.get_blocking(sink.descriptor)
    assert not os.get_inheritable(sink.descriptor)


@pytest.mark.parametrize("length", [1, 80, 999, PIPE_BUF, PIPE_BUF + 1, 20_000])
def test_a_full_pipe_drops_whole_lines_and_counts_them(length: int, tidy: ExitStack) -> None:
    reader, writer = pipe(tidy)
    sink = sink_on(writer, tidy)
    counted: list[int] = []
    sink.losses.count = counted.append
    written = 3 * (1 << 16) // length + 3
    for _ in range(written):
        sink.write(b"x" * (length - 1) + b"\n")
    assert sum(counted) == sink.losses.untold > 0
    lines = read_all(reader).splitlines(keepends=True)
    assert {len(line) for line in lines} == {length}
    assert len(lines) + sum(counted) == written


def test_when_there_is_room_again_it_is_said_once_how_many_were_dropped(tidy: ExitStack) -> None:
    reader, writer = pipe(tidy)
    sink = sink_on(writer, tidy)
    told: list[int] = []
    sink.losses.tell = told.append
    for _ in range(2000):
        sink.write(b"x" * 99 + b"\n")
    assert told == []
    lost = sink.losses.untold
    read_all(reader)
    for _ in range(3):
        sink.write(b"y\n")
    assert told == [lost]


def test_many_lines_at_once_are_written_as_far_as_they_fit_and_none_by_half(tidy: ExitStack) -> None:
    reader, writer = pipe(tidy)
    sink = sink_on(writer, tidy)
    lines = b"".join(b"%d %s\n" % (number, b"x" * (number % 300)) for number in range(3000))
    sink.write(lines)
    got = read_all(reader)
    assert lines.startswith(got)
    assert got.endswith(b"\n")
    assert got.count(b"\n") + sink.losses.untold == 3000


def test_a_pipe_without_a_reader_drops(tidy: ExitStack) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb"):
        sink = sink_on(writer, tidy)
        os.close(reader)
        sink.write(b"a\nb\n")
        assert sink.losses.untold == 2
        assert not os.get_blocking(unblocked(writer))  # which cannot be opened any more


def test_a_socket_drops_and_its_flags_stay(tidy: ExitStack) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sink = Sink(unblocked(ours.fileno()))
        for _ in range(5000):
            sink.write(b"x" * 99 + b"\n")
        assert os.get_blocking(ours.fileno())
        theirs.setblocking(False)
        got = read_all(theirs.fileno())
        assert got == (b"x" * 99 + b"\n") * (5000 - sink.losses.untold)
        assert sink.losses.untold
        del sink
        os.fstat(ours.fileno())  # which nobody has closed


def test_a_full_device_drops() -> None:
    with open("/dev/full", "wb") as full:
        sink = Sink(full.fileno())
        sink.write(b"a\nb\nc\n")
        assert sink.losses.untold == 3


def test_what_a_full_disk_has_cut_is_ended_before_the_next_line(tmp_path: Path) -> None:
    """Under a limit of the file's size, which cuts as a full disk does: the other lines stay whole."""
    path = tmp_path / "log"
    program = f"""
import os, resource, signal
from preforkd_workers.sink import Sink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = Sink(os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
resource.setrlimit(resource.RLIMIT_FSIZE, (15, resource.RLIM_INFINITY))
sink.write(b"123456789\\n123456789\\n")
sink.write(b"lost\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.write(b"whole\\n")
print(sink.losses.untold)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert path.read_text() == "123456789\n12345\nwhole\n"
    assert done.stdout == "2\n"


def test_a_terminal_that_stands_still_drops(tidy: ExitStack) -> None:
    ours, theirs = os.openpty()
    tidy.callback(os.close, ours)
    tidy.callback(os.close, theirs)
    sink = sink_on(theirs, tidy)
    assert os.get_blocking(theirs)
    for _ in range(5000):
        sink.write(b"x" * 99 + b"\n")
    assert sink.losses.untold


def test_lines_of_several_processes_do_not_mix_however_long_they_are() -> None:
    """Into a pipe that is full time and again."""
    program = """
import sys
from preforkd_workers.sink import Sink, unblocked
sink, name = Sink(unblocked(1)), sys.argv[1].encode()
for number in range(4000):
    sink.write(name * (1 + number * 37 % 9000) + b"\\n")
"""
    reader, writer = os.pipe()
    commands = [[sys.executable, "-c", program, name] for name in "abcd"]
    writers = [subprocess.Popen(command, stdout=writer) for command in commands]
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=1000) as lines:
        found = [line for line in lines if line != line[:1] * (len(line) - 1) + b"\n"]
    assert [each.wait() for each in writers] == [0, 0, 0, 0]
    assert found == []


def test_a_pipe_is_given_room(tidy: ExitStack) -> None:
    reader, writer = pipe(tidy)
    make_room(writer)
    sink = sink_on(writer, tidy)
    for _ in range(2000):
        sink.write(b"x" * 99 + b"\n")
    assert not sink.losses.untold
    assert read_all(reader).count(b"\n") == 2000


def test_a_descriptor_that_becomes_another_one_is_written_to_as_that(tidy: ExitStack, tmp_path: Path) -> None:
    """A target may have its standard error lead elsewhere."""
    path = tmp_path / "log"
    _, writer = pipe(tidy)
    ours, theirs = socket.socketpair()
    with ours, theirs, path.open("wb", buffering=0) as file:
        for descriptor in (writer, ours.fileno()):
            sink = Sink(descriptor)
            os.dup2(file.fileno(), descriptor)
            sink.write(b"x" * 9999 + b"\n")
            sink.write(b"short\n")
            assert sink.losses.untold == 0
    assert path.read_bytes() == 2 * (b"x" * 9999 + b"\nshort\n")


def test_losses_of_a_parent_are_not_its_childs() -> None:
    losses = Losses()
    losses.add(3)
    losses.begin_anew()
    said: list[int] = []
    losses.tell = said.append
    losses.say()
    assert said == []
