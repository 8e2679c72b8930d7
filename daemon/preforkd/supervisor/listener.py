"""``preforkd supervisor listener``: a listener of supervisord's events, as supervisord starts it.

The main thread speaks its protocol and nothing else: it never asks supervisord anything, and never waits for who does.
The rounds are made in a thread of their own, and so are the answers to scrapes.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from threading import Event, Thread
from typing import Annotated, Any, TextIO

from msgspec import Meta, Struct

from preforkd import log
from preforkd.addresses import AddressError
from preforkd.exits import Exit
from preforkd.listeners import ListenError
from preforkd.setting import Setting
from preforkd.settings import DAEMON
from preforkd.supervisor.metrics import Ledger, serve
from preforkd.supervisor.restarts import Rules
from preforkd.supervisor.rounds import Rounds
from preforkd.supervisor.supervisord import Supervisord
from preforkd.wakeup import release
from preforkd_workers.title import setproctitle

MISSING = "supervisor is not installed: pip install 'preforkd[supervisor]'"

_SECONDS = DAEMON["takeover_timeout"].suffixes
_STATE, _TICK = "PROCESS_STATE_", "TICK_"


def _count(key: str, default: int, at_least: int, help_text: str) -> Setting:
    return Setting(key, Annotated[int, Meta(ge=at_least, le=1000)], default, help_text, "", {}, False)


def _time(key: str, default: float, at_least: float, help_text: str) -> Setting:
    return Setting(key, Annotated[float, Meta(ge=at_least, le=86400.0)], default, help_text, "s", _SECONDS, False)


_USUAL = Rules()

OPTIONS = (
    _count("failures", _USUAL.failures, 1, "missed answers in a row, one every 5 s, until a program is restarted"),
    _time("grace", _USUAL.grace, 0.0, "from the start of a program on, in which it is not asked"),
    _count("max_restarts", _USUAL.max_restarts, 0, "of a program in any --window; 0: restart nothing, only count"),
    _time("window", _USUAL.window, 1.0, "in which there are at most --max-restarts"),
    _time("timeout", 3.0, 0.1, "for an answer"),
)


class Notice(Struct, frozen=True):
    """An event of supervisord's: its name, its number among ours, and the tokens that it brings."""

    name: str
    serial: int
    tokens: Mapping[str, str]


def main(words: Sequence[str]) -> int:
    """``listener``: listen until supervisord hangs up. The exit status."""
    release(signal.valid_signals())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = _parser().parse_args(words)
    if find_spec("supervisor") is None:
        return _complain(MISSING, Exit.SYSTEM)
    if "SUPERVISOR_SERVER_URL" not in os.environ:
        is_child = "SUPERVISOR_ENABLED" in os.environ
        return _complain(_NO_SERVER if is_child else _BY_HAND, Exit.SETTINGS if is_child else Exit.USAGE)
    setproctitle("preforkd: supervisor listener")
    notices, answers = _protocol()
    ledger = Ledger()
    if options.metrics:
        try:
            log.event("listening", service="metrics", url=serve(options.metrics, ledger))
        except AddressError as fault:
            return _complain(f"--metrics {fault}", Exit.USAGE)
        except ListenError as fault:
            return _complain(str(fault), Exit.SYSTEM)
    rules = Rules(options.failures, options.grace, options.max_restarts, options.window)
    rounds = Rounds(Supervisord(os.environ), ledger, rules, dict(options.program), options.timeout)
    due = Event()
    Thread(target=_go_rounds, args=(rounds, due), daemon=True).start()
    _listen(converse(notices, answers), ledger, due)
    sys.stderr.flush()
    os._exit(Exit.STOPPED)  # at once: a round has nothing to tidy up


def _listen(notices: Iterable[Notice], ledger: Ledger, due: Event) -> None:
    """Write down what has become of processes, and say when a round is due."""
    last = None
    for notice in notices:
        if last is not None and notice.serial > last + 1:
            log.event("events_lost", number=notice.serial - last - 1)  # the next round sees what has come of them
        last = notice.serial
        if notice.name.startswith(_TICK):
            due.set()
        elif notice.name.startswith(_STATE):
            group, name = notice.tokens["groupname"], notice.tokens["processname"]
            ledger.changed(group, name, notice.name.removeprefix(_STATE), notice.tokens.get("expected"))


def converse(notices: TextIO, answers: TextIO) -> Iterator[Notice]:
    """supervisord's protocol: every event, acknowledged when the next one is asked for; until it hangs up."""
    while True:
        try:
            answers.write("READY\n")
            answers.flush()
            header = _tokens(notices.readline())
            if "len" not in header:  # end-of-file
                return
            payload = notices.read(int(header["len"]))  # characters, though the protocol says bytes
            yield Notice(header["eventname"], int(header["poolserial"]), _tokens(payload.partition("\n")[0]))
            answers.write("RESULT 2\nOK")
        except BrokenPipeError:
            return


def _tokens(line: str) -> dict[str, str]:
    pairs = (word.partition(":") for word in line.split())
    return {key: value for key, _, value in pairs}


def _protocol() -> tuple[TextIO, TextIO]:
    """Our standard input and output, for us alone: whatever else would read or print has none, or standard error."""
    notices = open(os.dup(0), encoding="utf-8", errors="surrogateescape", newline="\n")  # noqa: SIM115 - as
    answers = open(os.dup(1), "w", encoding="utf-8", newline="\n")  # noqa: SIM115 - long as we live
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return notices, answers


def _go_rounds(rounds: Rounds, due: Event) -> None:
    """Look once, then go a round whenever one is due; those that come due during another are one."""
    go: Callable[[], object] = rounds.look
    while True:
        try:
            go()
        except Exception:  # a fault of ours: the next round may do better, and nobody else would look after anything
            log.text("listener", traceback.format_exc())
        go = rounds.go
        due.wait()
        due.clear()


# The command line.

_BY_HAND = "supervisord starts this, as an [eventlistener:…]: see deploy/supervisor/preforkd-listener.conf"
_NO_SERVER = "supervisord cannot be asked anything: its file wants a [unix_http_server] or an [inet_http_server]"


def _complain(line: str, status: Exit) -> Exit:
    print(f"preforkd: {line}", file=sys.stderr)  # noqa: T201 - as the other commands do
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="preforkd supervisor", description="What stands beside supervisord.")
    commands = parser.add_subparsers(required=True, metavar="listener")
    listener = commands.add_parser(
        "listener", help="restart daemons that do not answer, and export what supervisord knows"
    )
    for option in OPTIONS:
        listener.add_argument(
            f"--{option.key.replace('_', '-')}",
            metavar="TIME" if option.suffixes else "N",
            type=_converter(option),
            default=option.default,
            help=f"{option.help} (%(default)g{' s' if option.suffixes else ''})",
        )
    listener.add_argument("--metrics", metavar="URL", help="serve Prometheus metrics there: tcp://127.0.0.1:9110")
    listener.add_argument(
        "--program",
        metavar="PROGRAM=DAEMON",
        action="append",
        type=_pair,
        default=[],
        help="the control socket of a program's daemon, or its name, where it is not found by itself; "
        "PROGRAM= to leave that alone (repeatable)",
    )
    return parser


def _converter(option: Setting) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        try:
            return option.convert(word, is_text=True)
        except ValueError as fault:
            raise argparse.ArgumentTypeError(f"want {fault}") from None

    return convert


def _pair(word: str) -> tuple[str, str]:
    program, sign, daemon = word.partition("=")
    if not program or not sign:
        raise argparse.ArgumentTypeError(f"want PROGRAM=DAEMON, not {word!r}")
    return program, daemon
