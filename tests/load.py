"""Clients that ask without pause, and count exactly what becomes of every request. A program of its own.

    python -m tests.load --tcp HOST:PORT --udp HOST:PORT --clients 64 --talkers 3 --stayers 2

Closed-loop clients, ``--clients`` of each: *visit* connects, asks, reads the answer to its end, and closes, every
second one ending its sending side first; *datagram* sends one and waits for the answer. Long-lived connections:
*talk* asks now and then, until the server ends the connection after an answer or while nothing was asked; *stay* asks
once and stays until the server ends it. Both then connect anew.

An answer is ``GENERATION SERIAL GENERATION PID``, and a newline: two places of the code served say its generation.
One that the server ends the connection after says ``last`` as well, for otherwise the next question may cross the end.
What may become of a request:

- answered: counted by generation, with the time of the first answer and the time of the last question
- refused: nobody listens
- reset: the connection was cut
- unanswered: end-of-file without a whole answer, or nothing within the deadline
- wrong: a mixture of generations, an answer to another question, or more than was asked for

Lines on standard input: ``report`` prints a line of JSON, ``after KIND N`` does when so many answers more have come;
``stop`` lets all requests end, prints the last line, and ends the program. So do end-of-file, SIGTERM, and the time
``--at-most``.
"""

import argparse
import errno
import json
import os
import select
import signal
import socket
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

# How long a client waits for whatever it waits for, in seconds, unless told otherwise.
DEADLINE = 20.0

# Between two questions on a connection that talks, in seconds.
PAUSE = 0.05

# How often the deadlines are looked at, in seconds.
LOOK_EVERY = 0.02

# Of so many faults the report has the details.
DETAILS = 20

KINDS = "visit", "datagram", "talk", "stay"
FAULTS = "refused", "reset", "unanswered", "wrong"


@dataclass(frozen=True)
class Wait:
    """Until a socket is readable, or for so long. ``idle``: nothing has been asked, so a stop need not wait."""

    link: socket.socket | None
    patience: float
    idle: bool = False


Client = Generator[Wait, bool, None]  # is told whether the socket is readable


class Fault(Exception):
    """A request that was not answered as it should: the kind of fault, and what was seen."""


class Question:
    """One request, from the asking to what became of it."""

    def __init__(self, kind: str, serial: int) -> None:
        self.kind = kind
        self.serial = serial
        self.asked = monotonic()
        self.connected = self.asked
        self.generation: str | None = None
        self.pid = 0
        self.port = 0
        self.failed = False
        self.is_last = False  # of its connection

    def read(self, answer: bytes) -> None:
        """Take the whole answer.

        Raises Fault when it is not whole, or not the one.
        """
        if not answer.endswith(b"\n"):
            raise Fault("unanswered", f"end after {answer!r}")
        words = answer.decode(errors="replace").split()
        self.is_last = words[4:] == ["last"]
        is_whole = answer.count(b"\n") == 1 and len(words) == 4 + self.is_last
        if not is_whole or words[1] != str(self.serial) or words[0] != words[2]:
            raise Fault("wrong", f"{answer!r}")
        self.generation, self.pid = words[0], int(words[3])


class Load:
    """All clients, what they wait for, and the counts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.stream: tuple[str, int] | None = options.tcp
        self.datagram: tuple[str, int] | None = options.udp
        self.deadline: float = options.deadline
        self.pause: float = options.pause
        self.end = monotonic() + options.at_most
        self.is_open = True
        self.serial = 0
        self.open = 0
        self.waiting: dict[Client, tuple[Wait, float]] = {}  # and until when
        self.by_link: dict[int, Client] = {}
        self.epoll = select.epoll()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.connected: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.holders: dict[int, int] = {}  # process that holds a connection of the kind stay: how many
        self.details: list[dict[str, Any]] = []
        self.generations: dict[str, dict[str, Any]] = {}
        self.longest = 0.0
        self.orders = b""  # read, and no whole line yet
        self.enough: tuple[str, int] | None = None  # to report at so many answers of this kind
        clients: list[Client] = []
        if self.stream:
            clients += [visit(self, half_close=bool(number % 2)) for number in range(options.clients)]
            clients += [stay_connected(self, "talk", self.pause) for _ in range(options.talkers)]
            clients += [stay_connected(self, "stay", float("inf")) for _ in range(options.stayers)]
        if self.datagram:
            clients += [send_datagrams(self) for _ in range(options.clients)]
        self.beginners = clients

    # The loop.

    def run(self) -> None:
        self.epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        for client in self.beginners:
            self.step(client)
        look_at = 0.0
        while self.waiting:
            for descriptor, _ in self.epoll.poll(LOOK_EVERY):
                if descriptor == sys.stdin.fileno():
                    self.obey()
                elif descriptor in self.by_link:
                    self.step(self.by_link[descriptor], True)
            if (now := monotonic()) >= look_at:
                look_at = now + LOOK_EVERY
                self.look(now)
        self.report()

    def step(self, client: Client, readable: bool | None = None) -> None:
        """Have a client do the next thing, up to where it waits again; None begins."""
        before, _ = self.waiting.pop(client, (None, 0.0))
        if before is not None and before.link is not None:
            self.by_link.pop(before.link.fileno(), None)
        try:
            wait = next(client) if readable is None else client.send(readable)
        except StopIteration:
            return
        self.waiting[client] = wait, monotonic() + wait.patience
        if wait.link is not None:
            self.by_link[wait.link.fileno()] = client

    def look(self, now: float) -> None:
        """Go on with those who have waited long enough; when all is to stop, with those who only pause."""
        if now >= self.end:
            self.is_open = False
        if self.enough and (self.answered[self.enough[0]] >= self.enough[1] or not self.is_open):
            self.enough = None
            self.report()
        for client, (wait, until) in [*self.waiting.items()]:
            if now >= until or (wait.idle and not self.is_open):
                self.step(client, False)

    def obey(self) -> None:
        read = os.read(sys.stdin.fileno(), 4096)
        *lines, self.orders = (self.orders + read).split(b"\n")
        for line in lines:
            match line.decode().split():
                case ["report"]:
                    self.report()
                case ["after", kind, number]:
                    self.enough = kind, self.answered[kind] + int(number)
        if not read or b"stop" in lines:
            self.is_open = False
            self.epoll.unregister(sys.stdin.fileno())

    # What the clients need.

    def link(self, kind: socket.SocketKind, address: tuple[str, int] | None) -> socket.socket:
        """A socket connected to the address: on the loopback, that takes no time while the backlog has room."""
        assert address is not None
        link = socket.socket(socket.AF_INET, kind)
        try:
            link.settimeout(self.deadline)
            link.connect(address)
            link.setblocking(False)
            self.epoll.register(link.fileno(), select.EPOLLIN)
        except OSError:
            link.close()
            raise
        return link

    @contextmanager
    def question(self, kind: str) -> Iterator[Question]:
        """Ask, and count what becomes of it."""
        self.serial += 1
        self.open += 1
        self.asked[kind] += 1
        question = Question(kind, self.serial)
        try:
            yield question
            self.count(question)
        except Fault as fault:
            self.fail(question, *fault.args)
        except ConnectionRefusedError as error:
            self.fail(question, "refused", str(error))
        except (ConnectionResetError, BrokenPipeError) as error:
            self.fail(question, "reset", str(error))
        except TimeoutError as error:
            self.fail(question, "unanswered", f"not connected in time: {error}")
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # reset already, when the sending side is ended
                raise
            self.fail(question, "reset", str(error))
        finally:
            self.open -= 1

    def count(self, question: Question) -> None:
        now = monotonic()
        self.answered[question.kind] += 1
        self.longest = max(self.longest, now - question.asked)
        assert question.generation is not None
        fresh = {"answers": 0, "first_answer": now, "last_connect": 0.0}
        seen = self.generations.setdefault(question.generation, fresh)
        seen["answers"] += 1
        seen["last_connect"] = max(seen["last_connect"], question.connected)

    def fail(self, question: Question, fault: str, detail: str) -> None:
        question.failed = True
        self.faults[fault] += 1
        self.lost[question.kind] += fault != "wrong"
        if len(self.details) < DETAILS:
            took = round(monotonic() - question.asked, 4)
            where = {"client": question.kind, "serial": question.serial, "port": question.port}
            self.details.append({"fault": fault, "detail": detail, **where, "at": monotonic(), "took": took})

    @contextmanager
    def held_by(self, question: Question) -> Iterator[None]:
        """Note that a connection stays with the process that has answered."""
        held = self.holders if question.kind == "stay" else {}
        held[question.pid] = held.get(question.pid, 0) + 1
        try:
            yield
        finally:
            held[question.pid] -= 1
            if not held[question.pid]:
                del held[question.pid]

    def report(self) -> None:
        """A line with all counts so far; ``open`` requests have been asked and not ended."""
        said = {
            **{name: self.faults[name] for name in FAULTS},
            "asked": self.asked,
            "answered": self.answered,
            "connected": self.connected,
            "ended": self.ended,
            "lost": self.lost,
            "holders": [*self.holders],
            "open": self.open,
            "generations": self.generations,
            "details": self.details,
            "longest": round(self.longest, 4),
            "expired": monotonic() >= self.end,
        }
        print(json.dumps(said), flush=True)  # noqa: T201 - this is what the program is for


# The kinds of client.


def visit(load: Load, half_close: bool) -> Client:
    """Connect, ask, read the answer to its end, close."""
    while load.is_open:
        with load.question("visit") as question, load.link(socket.SOCK_STREAM, load.stream) as link:
            load.connected["visit"] += 1
            question.port = link.getsockname()[1]
            link.sendall(b"visit %d\n" % question.serial)
            if half_close:
                link.shutdown(socket.SHUT_WR)
            answer = b""
            while True:
                if not (yield Wait(link, load.deadline)):
                    raise Fault("unanswered", f"no end in time, after {answer!r}")
                piece = link.recv(4096)
                if not piece:
                    break
                answer += piece
            question.read(answer)
        if question.failed:
            yield Wait(None, LOOK_EVERY)


def send_datagrams(load: Load) -> Client:
    """Send a datagram, wait for the answer; after a fault, from another port."""
    while load.is_open:
        with load.link(socket.SOCK_DGRAM, load.datagram) as link:
            port = link.getsockname()[1]
            failed = False
            while load.is_open and not failed:
                with load.question("datagram") as question:
                    question.port = port
                    link.send(b"datagram %d\n" % question.serial)
                    if not (yield Wait(link, load.deadline)):
                        raise Fault("unanswered", "no answer in time")
                    question.read(link.recv(4096))
                failed = question.failed
        yield Wait(None, LOOK_EVERY)


def stay_connected(load: Load, kind: str, pause: float) -> Client:
    """Ask now and then on one connection, until the server ends it: then connect anew."""
    while load.is_open:
        link: socket.socket | None = None
        connected = monotonic()
        generation: str | None = None
        try:
            while load.is_open:
                with load.question(kind) as question:
                    question.connected = connected
                    if link is None:
                        link = load.link(socket.SOCK_STREAM, load.stream)
                        load.connected[kind] += 1
                    question.port = link.getsockname()[1]
                    link.sendall(b"%s %d\n" % (kind.encode(), question.serial))
                    answer = b""
                    while not answer.endswith(b"\n"):
                        if not (yield Wait(link, load.deadline)):
                            raise Fault("unanswered", f"no answer in time, but {answer!r}")
                        piece = link.recv(4096)
                        if not piece:
                            break
                        answer += piece
                    question.read(answer)
                    if generation not in (None, question.generation):
                        raise Fault("wrong", f"{answer!r} after answers of {generation}")
                    generation = question.generation
                if question.failed or link is None:
                    break
                with load.held_by(question):
                    is_over = yield Wait(link, load.deadline if question.is_last else pause, idle=True)
                if is_over:
                    _read_end(load, question, link)
                    break
        finally:
            if link is not None:
                link.close()
        yield Wait(None, LOOK_EVERY)


def _read_end(load: Load, question: Question, link: socket.socket) -> None:
    """What has come although nothing was asked is to be the end of the connection."""
    try:
        surplus = link.recv(4096)
    except ConnectionResetError as error:
        return load.fail(question, "reset", f"while nothing was asked: {error}")
    if surplus:
        return load.fail(question, "wrong", f"not asked for: {surplus!r}")
    load.ended[question.kind] += 1
    return None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tcp", type=_address)
    parser.add_argument("--udp", type=_address)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--talkers", type=int, default=0)
    parser.add_argument("--stayers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=PAUSE)
    parser.add_argument("--deadline", type=float, default=DEADLINE)
    parser.add_argument("--at-most", type=float, default=300.0)
    load = Load(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: setattr(load, "is_open", False))
    load.run()


if __name__ == "__main__":
    main()
