"""``preforkctl top``: what it shows of a real daemon on a real terminal, and what it leaves of the terminal."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from select import select
from time import monotonic
from typing import Any

import pytest

from preforkd import top
from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon
from tests.test_stop import Client

TCP = ("--listen", "tcp://127.0.0.1:0")
TWO = ("--max-children", "2")

# How xterm enters and leaves its alternate screen, where a screen begins, and where it ends.
ENTER, LEAVE, HOME, END = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[H", b"\x1b[J"


class Terminal:
    """A terminal on which ``top`` runs, of so many columns and lines."""

    def __init__(self, daemon: Daemon, columns: int = 120, lines: int = 30) -> None:
        self.master, terminal = pty.openpty()
        self.terminal = terminal
        self.resize(columns, lines)
        self.before = termios.tcgetattr(terminal)
        # Whatever started the tests may ignore SIGINT, and have its children do so; a terminal's shell does not.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "preforkd.ctl", "-s", daemon.control]
        environment = {key: value for key, value in daemon.environment.items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*command, "top", "1"],
            env=environment,
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self.shown = b""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def until(self, wanted: bytes) -> bytes:
        """Read until this is shown; everything up to its end since the last time."""
        until = monotonic() + DEADLINE
        while wanted not in self.shown:
            ready, _, _ = select([self.master], [], [], until - monotonic())
            assert ready, self.shown
            self.shown += os.read(self.master, 1 << 16)
        before, _, self.shown = self.shown.partition(wanted)
        return before

    def screen(self) -> list[str]:
        """The next whole screen, without its control sequences."""
        self.until(HOME)
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.until(END).decode()).splitlines()

    def ended(self) -> tuple[int, bytes]:
        """Exit status, and what it complains of. The terminal must be as it was."""
        self.until(LEAVE)
        assert self.process.stderr is not None
        complaint = self.process.stderr.read()
        status = self.process.wait(DEADLINE)
        assert termios.tcgetattr(self.terminal) == self.before
        return status, complaint

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self.terminal)
        os.close(self.master)


@contextmanager
def on_terminal(daemon: Daemon, columns: int = 120, lines: int = 30) -> Iterator[Terminal]:
    terminal = Terminal(daemon, columns, lines)
    try:
        terminal.until(ENTER)
        yield terminal
    finally:
        terminal.close()


def test_the_busy_come_first_with_their_peers(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client, on_terminal(daemon) as terminal:
        head, _, titles, service, _, _, first, second, *_ = terminal.screen()
        assert head.startswith(f"Obey: preforkd 0.1.0 on CPython {sys.version.split()[0]}, pid {daemon.pid}, serving")
        assert titles.split() == [*top._TITLES]
        assert service.split()[:4] == ["Obey", "1", "2", "1"]
        assert first.split()[2:4] == [str(client.pid), "busy"]
        assert first.split()[5] == "{}:{}".format(*client.socket.getsockname())
        assert second.split()[3] == "idle"
        terminal.type(b"q")
        assert terminal.ended() == (0, b"")


def test_rates_are_those_since_the_last_screen(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    with on_terminal(daemon) as terminal:
        assert terminal.screen()[3].split()[4:6] == ["-", "-"]
        for _ in range(10):
            with daemon.connect() as client:
                client.sendall(b"x\n")
                assert client.recv(9) == b"X\n"
        rates: list[float] = []
        while not any(rates):
            rates.append(float(terminal.screen()[3].split()[4]))
        assert 3 < sum(rates) <= 10
        assert float(terminal.screen()[3].split()[4]) == 0


def test_it_fits_the_terminal_whatever_size_that_becomes(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, "--max-children", "8")
    with on_terminal(daemon, 40, 6) as terminal:
        screen = terminal.screen()
        assert 4 <= len(screen) <= 5
        assert all(len(line) <= 40 for line in screen)
        terminal.resize(200, 50)
        terminal.process.send_signal(signal.SIGWINCH)
        while len(screen) < 14:
            screen = terminal.screen()
        terminal.process.send_signal(signal.SIGINT)  # as Ctrl-C does
        assert terminal.ended() == (0, b"")


def test_it_outlives_an_upgrade_and_ends_with_the_daemon(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    with on_terminal(daemon) as terminal:
        terminal.screen()
        daemon.signal(signal.SIGUSR2)
        daemon.log.wait_for("^reload_done ")
        while " done" not in "".join(terminal.screen()[:2]):
            pass
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("^stopped ")
        status, complaint = terminal.ended()
        assert (status, complaint[:24]) == (3, b"preforkctl: no daemon at")
        assert re.fullmatch(rb"preforkctl: no daemon at .*\n", complaint)


def test_a_kill_leaves_the_terminal_as_it_was(serve: Serve) -> None:
    with on_terminal(serve(":Upper", *TCP)) as terminal:
        terminal.screen()
        terminal.process.terminate()
        assert terminal.ended() == (128 + signal.SIGTERM, b"")


def test_while_it_is_stopped_the_terminal_is_somebody_elses(serve: Serve) -> None:
    """Ctrl-Z, and fg."""
    with on_terminal(serve(":Upper", *TCP)) as terminal:
        for _ in range(2):
            terminal.screen()
            ours = termios.tcgetattr(terminal.terminal)
            terminal.process.send_signal(signal.SIGTSTP)
            terminal.until(LEAVE)
            assert os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED) is not None
            assert termios.tcgetattr(terminal.terminal) == terminal.before
            terminal.process.send_signal(signal.SIGCONT)
            terminal.until(ENTER)
            terminal.screen()
            assert termios.tcgetattr(terminal.terminal) == ours
        terminal.type(b"q")
        assert terminal.ended() == (0, b"")


def test_away_from_a_terminal_it_prints_until_nobody_reads(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    command = [sys.executable, "-m", "preforkd.ctl", "-s", daemon.control, "top", "3600"]
    with subprocess.Popen(command, env=daemon.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[3].split()[:2] == [b"Upper", b"1"]
        process.stdout.close()
        assert process.wait(DEADLINE) == 0
        assert process.stderr.read() == b""


def report(**requests: int) -> dict[str, Any]:
    return {"services": [{"name": name, "requests": number, "errors": 0} for name, number in requests.items()]}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": 10}, {"a": 30}, 10.0),
        ({"a": 10}, {"a": 10}, 0.0),
        ({"a": 10}, {"a": 5}, None),  # another daemon
        ({"b": 1}, {"a": 5}, None),  # another service
    ],
)
def test_a_rate_needs_two_reports(before: dict[str, int], after: dict[str, int], expected: float | None) -> None:
    rates = top.Rates()
    rates.of(report(**before), 100.0)
    assert rates.of(report(**after), 102.0)["a", "requests"] == expected
