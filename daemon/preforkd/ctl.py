"""The command ``preforkctl``: asks a daemon over its control socket. It changes nothing itself."""

import argparse
import glob
import json
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from time import monotonic
from typing import Any

from preforkd import __version__, log
from preforkd.command import Argument, Command
from preforkd.commands import COMMANDS
from preforkd.runtime import SOCKET, address_of, directories, parents

VERSION = 1  # of the protocol

# For the daemon to answer what takes no time, in seconds. What takes time has its deadlines in the daemon.
PATIENCE = 10.0

# Between two screens of ``top``, in seconds.
TOP_INTERVAL = 2.0

# After an upgrade has cut the connection: for the new daemon to tell how it ended, in seconds, and how often to ask.
UPGRADE_PATIENCE = 120.0
UPGRADE_ATTEMPTS = 10


class Exit(IntEnum):
    """The exit statuses of preforkctl."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NO_DAEMON = 3


class Failed(Exception):
    """It was not done; the message says why."""


class NoDaemon(Exception):
    """There is no daemon; the message says where it was looked for."""


class Lost(Exception):
    """The connection has ended before the answer."""


class Connection:
    """A connection to a daemon."""

    def __init__(self, path: str, patience: float = PATIENCE) -> None:
        """``patience``, in seconds, is for the daemon to have room for us. Raises NoDaemon or Failed."""
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with address_of(path) as address:
                self._connect(address, monotonic() + patience)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
            self._socket.close()
            raise NoDaemon(f"no daemon at {path}: {error.strerror}") from None
        except OSError as error:
            self._socket.close()
            raise Failed(f"{path}: {'no answer' if error.errno is None else error.strerror}") from None
        pid, _, _ = struct.unpack("=iII", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self._daemon = -1
        with suppress(OSError):  # of another namespace
            self._daemon = os.pidfd_open(pid)
        self._answers = self._socket.makefile("rb")

    def _connect(self, address: str, until: float) -> None:
        """Connect, up to this time (monotonic)."""
        while True:
            left = max(until - monotonic(), 0.01)
            # Not a time-out of Python's, with which connect fails at once when the daemon has no time to accept.
            timeval = struct.pack("@ll", int(left), int(left % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
            self._socket.connect(address)
            # Python takes a connect for done that a signal or a stop cut short (socketmodule.c, internal_connect).
            with suppress(OSError):
                self._socket.getpeername()
                return

    def close(self) -> None:
        self._answers.close()
        self._socket.close()
        if self._daemon >= 0:
            os.close(self._daemon)
            self._daemon = -1

    def ask(self, do: str, arguments: Mapping[str, object], patience: float | None) -> Iterator[dict[str, Any]]:
        """What the daemon says, up to its answer; ``patience``, in seconds, is for each line of it.

        Raises Lost when the connection ends before.
        """
        self._socket.settimeout(patience)
        request = {"v": VERSION, "do": do, **{key: value for key, value in arguments.items() if value is not None}}
        with suppress(BrokenPipeError):  # it has refused us, and said so
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            try:
                line = self._answers.readline()
            except TimeoutError:
                raise Failed(f"{self.path}: no answer within {patience:g} s") from None
            except ConnectionResetError:
                line = b""
            if not line.endswith(b"\n"):
                raise Lost
            said = json.loads(line)
            yield said
            if "event" not in said:
                return

    def wait_for_end(self) -> None:
        """Wait until the daemon's process is gone, which has hung up."""
        if self._daemon >= 0:
            select.select([self._daemon], [], [], PATIENCE)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    words = sys.argv[1:] if words is None else words
    name, words = _without_name(words)
    options = _parser().parse_args(words)
    if options.completion:
        from preforkd.completion import SHELLS

        print(SHELLS[options.completion](), end="")  # noqa: T201 - what the option is for
        return Exit.DONE
    if options.command is None or (name is not None and options.socket is not None):
        _parser().error("want a command" if options.command is None else "want -s SOCKET or NAME, not both")
    try:
        return _run(options, _connect(name, options.socket))
    except NoDaemon as reason:
        return _complain(str(reason), Exit.NO_DAEMON)
    except Failed as reason:
        return _complain(str(reason), Exit.FAILED)
    except Lost:
        return _complain("the daemon has hung up before it answered", Exit.FAILED)
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.FAILED
    except KeyboardInterrupt:
        return _complain("interrupted; what was asked for goes on", Exit.FAILED)


def _complain(reason: str, status: Exit) -> Exit:
    print(reason if "\n" in reason else f"preforkctl: {reason}", file=sys.stderr)  # noqa: T201
    return status


# The command line.


def _without_name(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The daemon's name, if a word before the command is one, and the other words."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] in _TAKE_A_WORD else 1
    if at + 1 < len(words) and words[at] not in COMMANDS and words[at + 1] in COMMANDS:
        return words[at], [*words[:at], *words[at + 1 :]]
    return None, [*words]


_TAKE_A_WORD = ("-s", "--socket", "--completion")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preforkctl",
        usage="preforkctl [-s SOCKET | NAME] COMMAND …",
        description="Ask a running preforkd. NAME may be left out where only one runs.",
        epilog="exit status: 0 done, 1 failed, 2 wrong usage, 3 no daemon there",
    )
    parser.add_argument("--version", action="version", version=f"preforkctl {__version__}")
    parser.add_argument("-s", "--socket", metavar="SOCKET", help="path of the daemon's control socket")
    parser.add_argument("--completion", choices=("bash", "zsh"), help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="preforkctl")
    for command in COMMANDS.values():
        made = commands.add_parser(command.name, help=command.help, description=command.help)
        made.add_argument("--json", action="store_true", help="print what the daemon answers, as JSON")
        for argument in command.arguments:
            _add(made, argument)
    return parser


def _add(parser: argparse.ArgumentParser, argument: Argument) -> None:
    if argument.flags:
        action = "store_false" if argument.default else "store_true"
        parser.add_argument(*argument.flags, dest=argument.name, action=action, help=argument.help)
        return
    parser.add_argument(
        argument.name,
        metavar=argument.name.upper(),
        nargs=None if argument.is_required else "?",
        type=_converter(argument),
        help=argument.help,
    )


def _converter(argument: Argument) -> Any:
    def convert(word: str) -> Any:
        try:
            return argument.checked(int(word) if argument.type is int and word.isdecimal() else word)
        except ValueError as fault:
            raise argparse.ArgumentTypeError(str(fault).partition(": ")[2]) from None

    return convert


# Which daemon.


def _connect(name: str | None, path: str | None) -> Connection:
    """The daemon that is meant: by its socket, by its name, or because there is only one."""
    environment = os.environ
    path = path or (environment.get("PREFORKD_CONTROL") if name is None else None)
    if path:
        return Connection(path)
    if name is not None or environment.get("RUNTIME_DIRECTORY"):
        return _first([os.path.join(each, SOCKET) for each in directories(name or "", environment)])
    found = [path for parent in parents(environment) for path in sorted(glob.glob(f"{glob.escape(parent)}/*/{SOCKET}"))]
    there = _answering(found)
    for each in there[1:]:
        each.close()
    if len(there) > 1:
        there[0].close()
        names = ", ".join(os.path.basename(os.path.dirname(each.path)) for each in there)
        _parser().error(f"which daemon? There are {names}")
    if not there:
        raise NoDaemon(f"no daemon found in {', '.join(parents(environment))}; name its socket with -s")
    return there[0]


def _first(paths: Sequence[str]) -> Connection:
    """Raises NoDaemon when there is none at any of them."""
    there = _answering(paths)
    for each in there[1:]:
        each.close()
    if not there:
        raise NoDaemon(f"no daemon at {' or '.join(paths)}")
    return there[0]


def _answering(paths: Sequence[str]) -> list[Connection]:
    """Those that can be reached. Raises Failed when there are none but some that refuse us."""
    there, refusal = [], None
    for path in paths:
        try:
            there.append(Connection(path))
        except Failed as failed:  # another user's, say, which does not hide our own
            refusal = failed
        except NoDaemon:
            pass
    if refusal is not None and not there:
        raise refusal
    return there


# Asking, and showing what comes.


def _run(options: argparse.Namespace, connection: Connection) -> Exit:
    command = COMMANDS[options.command]
    arguments = {argument.name: getattr(options, argument.name) for argument in command.arguments}
    if command.name == "top" and not options.json:
        return _watch(connection, arguments["interval"] or TOP_INTERVAL)
    try:
        last = _converse(command, arguments, connection, options.json)
    finally:
        connection.close()
    if not last.get("ok"):
        raise Failed(str(last.get("error")))
    return Exit.DONE


def _watch(connection: Connection, interval: float) -> Exit:
    """Show the status until somebody has seen enough."""
    from preforkd import top

    def status() -> dict[str, Any]:
        nonlocal connection
        for _ in range(UPGRADE_ATTEMPTS):
            try:
                (report,) = connection.ask("status", {}, PATIENCE)
            except Lost:  # an upgrade, or the end, or we were too slow for its patience
                connection.close()
                connection = Connection(connection.path)
                continue
            if not report["ok"]:
                raise Failed(str(report["error"]))
            return report
        raise Lost

    try:
        top.run(status, interval)
    finally:
        connection.close()
    return Exit.DONE


def _converse(
    command: Command, arguments: Mapping[str, object], connection: Connection, as_json: bool
) -> dict[str, Any]:
    """Ask, show what is said, and return the answer."""
    takes_time = command.takes_time or command.name == "outcome" or arguments.get("follow")
    try:
        if takes_time:  # and is waited for without limit: so first, whether there is a loop that turns
            (pong,) = connection.ask("ping", {}, PATIENCE)
            if not pong.get("ok"):
                return pong
        return _hear(command, connection.ask(command.name, arguments, None if takes_time else PATIENCE), as_json)
    except Lost:
        if command.name == "stop":
            connection.wait_for_end()
            return {"ok": True}
        if command.name in ("upgrade", "reload"):  # whoever asks for a reload before the exec gets the successor's
            return _outcome(connection.path, command.name, as_json)
        raise


def _outcome(path: str, asked: str, as_json: bool) -> dict[str, Any]:
    """How an upgrade has ended that has cut the connection: the socket lives on, and so do those who wait there.

    Raises Failed.
    """
    until = monotonic() + UPGRADE_PATIENCE
    for _ in range(UPGRADE_ATTEMPTS):
        try:
            connection = Connection(path)
        except NoDaemon as reason:
            raise Failed(f"the daemon has gone in the middle of the {asked}: {reason}") from None
        try:
            list(connection.ask("ping", {}, max(0.1, until - monotonic())))  # it is there; its patience counts now
            outcome = _hear(COMMANDS["outcome"], connection.ask("outcome", {}, None), as_json)
        except Lost:
            continue
        finally:
            connection.close()
        if outcome.get("result") == "none yet":
            raise Failed(f"another daemon has been started in the middle of the {asked}; see its log")
        return outcome
    raise Failed(f"the daemon hangs up again and again since the {asked} began; see its log")


def _hear(command: Command, lines: Iterator[dict[str, Any]], as_json: bool) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for said in lines:
        is_answer = "event" not in said
        fields = {key: value for key, value in said.items() if key not in ("v", "ok")}
        if is_answer and not said.get("ok"):
            break
        if command.name in ("status", "top") and is_answer:
            from preforkd import view

            view.add_what_the_machine_knows(fields)
            _print(json.dumps(fields) if as_json else view.table(fields, sys.stdout.isatty()))
        elif "levels" in fields and not as_json:
            from preforkd import view

            _print(view.levels(fields["levels"], sys.stdout.isatty()))
        elif as_json:
            if fields:
                _print(json.dumps(fields))
        elif text := _shown(command, said, fields, is_answer):
            _print(text)
    return said


def _shown(command: Command, said: Mapping[str, Any], fields: dict[str, Any], is_answer: bool) -> str:
    """What is said, for people; nothing when it goes without saying."""
    match said:
        case {"event": "stack" | "text", "of": of, "text": text}:
            return "\n".join(f"{of}| {line}" for line in text.splitlines())
        case {"event": event}:
            return log.line(event, {key: value for key, value in fields.items() if key != "event"})
        case {"silent": []}:
            return ""
        case {"what": what, "result": result, **details}:  # how a reload or an upgrade has ended
            return log.line(f"{what}: {result}", {key: details[key] for key in details if key not in ("v", "ok")})
        case {"workers": {**sizes}}:
            fields["workers"] = ",".join(f"{service}:{size}" for service, size in sizes.items())
    if command.name in ("reload", "upgrade") and fields.get("result") == "done":
        fields = {key: value for key, value in fields.items() if key not in ("what", "result")}  # the word says it
    if command.name == "ping":
        return "{name}: preforkd {version} on CPython {python}, pid {pid}".format(**fields)
    return log.line(f"{command.name}: done", fields) if is_answer and (fields or command.changes) else ""


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - what the command is for


if __name__ == "__main__":
    sys.exit(main())
