"""The access log of a worker: one line for each request that it has ended, written when it has. Never waits.

Imported by molds of services that have an ``access_log``, and by nobody else: without one, what counts requests is as
ever, and nothing is asked at any of them. A request that is killed with its worker has no line, for there is nobody to
write it: the master's event ``worker_exit`` says whose it was. The file is opened anew when another one has come in its
place, or none: seen when the master says LOOK, and before a line when the last look was long ago.
"""

import os
from collections.abc import Callable, Sequence
from threading import get_ident
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from preforkd_workers import streams
from preforkd_workers.accessline import DEFAULT, JSON, TIME, Line, line_of
from preforkd_workers.copies import undo_in_copies
from preforkd_workers.followed import Followed
from preforkd_workers.scoreboard import ERRORS, LISTENER, MARK, OK, PEER, SINCE, UNWRITTEN, read_text
from preforkd_workers.sink import Losses, Sink
from preforkd_workers.spec import DAEMONS_LOG
from preforkd_workers.tally import Tally, ThreadedTally, peer_of

if TYPE_CHECKING:
    from preforkd_workers.lifeline import Lifeline
    from preforkd_workers.process import Worker
    from preforkd_workers.spec import Spec

# How long the file may have been moved away before a line that comes then is written to the new one.
LOOK_AGAIN_NS = 1_000_000_000

_OUTCOMES = {OK: "ok", ERRORS: "error"}
_REFUSED = "refused"

_INFO = 6  # the priority in the journal, sd-daemon(3)


class Refused(Exception):
    """The file could not be opened; the message says which, and why."""


class File:
    """What a worker writes its lines to: the file at a path, whatever becomes of the one that was there."""

    def __init__(self, path: str, losses: Losses, lifeline: "Lifeline") -> None:
        """Raises Refused."""
        self._lifeline = lifeline
        try:
            self._file = Followed.opened(path)
        except OSError as error:
            raise Refused(f"access_log: {path}: {error.strerror}") from None
        self._sink = Sink(self._file.descriptors[0], losses)
        self._looked = monotonic_ns()

    def write(self, line: bytes) -> None:
        if monotonic_ns() >= self._looked + LOOK_AGAIN_NS:
            self.look()
        self._sink.write(line)

    def look(self) -> None:
        """Go on in the file that has the path now. In a signal handler, or a lane."""
        self._looked = monotonic_ns()
        if (reason := self._file.look_after()) is not None:
            self._lifeline.notice("access_log_lost", path=self._file.path, reason=reason)


class AccessLog:
    """Writes a line at the end of each request of these lanes. ``urls``: of their listeners, by number."""

    def __init__(self, write: Callable[[bytes], None], line: Line, urls: Sequence[str]) -> None:
        self.line = line
        self.urls = urls
        self.write = write
        undo_in_copies(self._be_a_copy)

    def _be_a_copy(self) -> None:
        """In a child that a handler forks: its parent writes the line."""
        self.write = lambda _: None

    def attend(self, lane: int, tally: Tally) -> None:
        """Have what this tally counts written from now on."""
        if isinstance(tally, ThreadedTally):
            self._attend_threads(tally)
        else:
            self._attend_one(lane, tally)
        refuse = tally.refuse

        def refuse_and_write(address: Any, listener: int) -> None:
            refuse(address, listener)
            self._write(lane, peer_of(address), listener, _REFUSED, 0, "")

        tally.refuse = refuse_and_write  # type: ignore[method-assign]

    def _attend_one(self, lane: int, tally: Tally) -> None:
        """All that is to be said of a request is in the row."""
        end = tally.end

        def end_and_write(outcome: int) -> None:
            row = tally.row
            peer, listener, mark = read_text(row, PEER), row[LISTENER], read_text(row, MARK)
            took = monotonic_ns() - row[SINCE]
            end(outcome)
            self._write(lane, peer, listener, _OUTCOMES[outcome], took, mark)

        tally.end = end_and_write  # type: ignore[method-assign]

    def _attend_threads(self, tally: ThreadedTally) -> None:
        """Threads of the target's own share the row: each keeps what is to be said."""
        begin, end, note = tally.begin, tally.end, tally.mark
        held: dict[int, tuple[str, int, int]] = {}
        marks: dict[int, str] = {}

        def begin_and_keep(request: object, address: object, listener: int) -> None:
            held[get_ident()] = peer_of(address), listener, monotonic_ns()
            begin(request, address, listener)

        def mark_and_keep(text: str) -> None:
            marks[get_ident()] = text
            note(text)

        def end_and_write(outcome: int) -> None:
            end(outcome)
            peer, listener, since = held.pop(get_ident())
            mark = marks.pop(get_ident(), "")
            self._write(0, peer, listener, _OUTCOMES[outcome], monotonic_ns() - since, mark)

        tally.begin, tally.end, tally.mark = begin_and_keep, end_and_write, mark_and_keep  # type: ignore[method-assign]

    def _write(self, lane: int, peer: str, listener: int, outcome: str, took: int, mark: str) -> None:
        url = self.urls[listener] if listener < len(self.urls) else ""
        self.write(self.line(lane, peer, url, outcome, took, mark))


def follow(worker: "Worker", spec: "Spec", slot: int, urls: Sequence[str]) -> None:
    """Have a worker that does not serve yet write what its lanes end. Raises Refused when there is nowhere to."""
    is_daemons = spec.access_log == DAEMONS_LOG
    if is_daemons:
        write: Callable[[bytes], None] = streams.write
    else:
        file = File(spec.access_log, _losses(worker), worker.lifeline)
        worker.look_at(file.look)
        write = file.write
    line = line_of(_format(spec, is_daemons), spec.service, slot, spec.generation, os.getpid())
    log = AccessLog(write, line, urls)
    for lane, tally in enumerate(worker.tallies):
        log.attend(lane, tally)


def _losses(worker: "Worker") -> Losses:
    losses, row = Losses(), worker.rows[0]

    def count(lines: int) -> None:
        row[UNWRITTEN] += lines

    losses.count = count
    losses.tell = lambda lines: worker.lifeline.notice("access_log_dropped", lines=lines)
    return losses


def _format(spec: "Spec", is_daemons: bool) -> str:
    """By default that of the daemon's log, if it is written there. The journal has a time of its own."""
    given = spec.access_log_format
    match spec.log.format if is_daemons else "":
        case "json":
            return given or JSON
        case "journal":
            return f"<{_INFO}>{given or DEFAULT.removesuffix(TIME)}"
    return given or DEFAULT
