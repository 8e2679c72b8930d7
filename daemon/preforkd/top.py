"""``preforkctl top``: the status again and again, with rates, busiest first. It changes nothing but the terminal.

Away from a terminal it prints one screen after another, for whoever keeps them.
"""

import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from preforkd import view

Report = dict[str, Any]

_TITLES = ("SERVICE", "GEN", "WORKERS", "BUSY", "REQUESTS/S", "ERRORS/S", "BACKLOG", "DROPS", "MEMORY")

# xterm's control sequences: the alternate screen without a cursor, and back; the top left corner, the rest of a line,
# the rest of the screen.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"

_QUIT = (b"q", b"Q", b"")


class Rates:
    """How much a counter of a service has grown in a second, since the report before."""

    def __init__(self) -> None:
        self._before: Mapping[tuple[str, str], int] = {}
        self._at = 0.0

    def of(self, report: Report, now: float) -> dict[tuple[str, str], float | None]:
        """By service and counter; None where there is nothing to compare with. ``now`` is in seconds."""
        counters = ("requests", "errors")
        found = {(each["name"], counter): each[counter] for each in report["services"] for counter in counters}
        seconds = now - self._at
        rates = {
            key: (value - self._before[key]) / seconds if value >= self._before.get(key, value + 1) else None
            for key, value in found.items()
        }
        self._before, self._at = found, now
        return rates


def screen(report: Report, rates: Mapping[tuple[str, str], float | None], is_terminal: bool) -> str:
    """One screen. Busy workers come first, the one with the oldest request on top."""
    workers = [(service["name"], worker) for service in report["services"] for worker in service["workers"]]
    workers.sort(key=lambda each: -each[1]["seconds"] if each[1]["busy"] else 0)
    services = [_service(each, rates) for each in report["services"]]
    parts = view.head(report), view.columns(_TITLES, services, is_terminal)
    return "\n\n".join((*parts, view.columns(*view.worker_cells(workers), is_terminal)))


def _service(service: dict[str, Any], rates: Mapping[tuple[str, str], float | None]) -> list[object]:
    per_second = (rates.get((service["name"], counter)) for counter in ("requests", "errors"))
    memory = sum(worker["memory"] or 0 for worker in service["workers"])
    return [
        service["name"],
        service["generation"],
        view.size(service),
        view.busy(service),
        *(None if rate is None else f"{rate:.1f}" for rate in per_second),
        sum(each["backlog"] for each in service["listeners"]),
        sum(each["drops"] for each in service["listeners"]),
        f"{memory / (1 << 20):.1f}M",
    ]


def run(status: Callable[[], Report], interval: float) -> None:
    """Show what ``status`` reports, every ``interval`` seconds, until ``q`` or Ctrl-C, or nobody reads any more."""
    rates, is_terminal = Rates(), sys.stdout.isatty()
    with suppress(KeyboardInterrupt), _screen() if is_terminal else _plain() as (show, wait):
        while True:
            report = status()
            view.add_what_the_machine_knows(report)
            show(screen(report, rates.of(report, monotonic()), is_terminal))
            if not wait(interval):
                return


Way = tuple[Callable[[str], None], Callable[[float], bool]]  # to show a text; and to wait, whether to go on


@contextmanager
def _plain() -> Iterator[Way]:
    def show(text: str) -> None:
        print(text, end="\n\n", flush=True)  # noqa: T201 - what the command is for

    def wait(seconds: float) -> bool:
        """For so long, or until nobody reads any more (poll(2), POLLERR)."""
        poll = select.poll()
        poll.register(sys.stdout, 0)
        return not poll.poll(seconds * 1e3)

    try:
        yield show, wait
    except BrokenPipeError:  # they have left in the middle of a screen
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _screen() -> Iterator[Way]:
    """The whole terminal, of which only as much is used as there is, and which is given back as it was."""
    keyboard = os.open(os.ttyname(sys.stdout.fileno()), os.O_RDONLY | os.O_NOCTTY)
    before = termios.tcgetattr(keyboard)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through the finally below
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in signal.SIGWINCH, signal.SIGTSTP:
        signal.signal(number, lambda *_: None)  # the pipe says so
    last = ""

    def take() -> None:
        tty.setcbreak(keyboard)
        _write(_ENTER)

    def give_back() -> None:
        _write(_LEAVE)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)

    def pause() -> None:
        """Ctrl-Z: whoever started us has the terminal until SIGCONT."""
        give_back()
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, ours)
        take()

    def show(text: str) -> None:
        nonlocal last
        last = text
        columns, lines = shutil.get_terminal_size()
        fitting = (_cut(line, columns) + _CLEAR_LINE for line in text.splitlines()[: lines - 1])
        _write(_HOME + "\n".join(fitting) + _CLEAR_BELOW)

    def wait(seconds: float) -> bool:
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            ready, _, _ = select.select([keyboard, reader], [], [], left)
            if keyboard in ready and os.read(keyboard, 1) in _QUIT:
                return False
            if reader in ready:
                if signal.SIGTSTP in os.read(reader, 512):
                    pause()
                show(last)  # another size, or nothing there any more
        return True

    try:
        take()
        yield show, wait
    finally:
        signal.set_wakeup_fd(-1)
        give_back()
        for descriptor in (keyboard, reader, writer):
            os.close(descriptor)


def _cut(line: str, columns: int) -> str:
    """As much of the line as fits. A heading keeps the end of its bold type."""
    bold, plain = ("\x1b[1m", "\x1b[0m") if line.startswith("\x1b[1m") else ("", "")
    return bold + line.removeprefix(bold).removesuffix(plain)[:columns] + plain


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
