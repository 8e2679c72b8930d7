"""Asking daemons whether they are well: all at once, each in its time, whatever it is that answers."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import pytest

from preforkd.ctl import Connection, Failed
from preforkd.supervisor.healthchecks import ask
from tests.conftest import Serve
from tests.daemon import DEADLINE, eventually

Stage = Callable[..., str]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A control socket with somebody behind it who does this with each connection, one after the other."""
    with ExitStack() as stack:

        def open_(name: str, *acts: Callable[[socket.socket], object], backlog: int = 8) -> str:
            path = str(tmp_path / name)
            listener = socket.socket(socket.AF_UNIX)
            stack.callback(listener.close)
            listener.bind(path)
            listener.listen(backlog)

            def play() -> None:
                for act in acts:
                    connection, _ = listener.accept()
                    with connection:
                        act(connection)

            thread = threading.Thread(target=play)
            thread.start()
            stack.callback(thread.join, DEADLINE)
            return path

        yield open_


def hang_up(connection: socket.socket) -> None:
    connection.recv(1000)


def answer(connection: socket.socket, said: bytes = b'{"v": 1, "ok": true}\n') -> None:
    connection.recv(1000)
    connection.sendall(said)


def answer_late(connection: socket.socket) -> None:
    threading.Event().wait(0.5)
    answer(connection)


def refuse(connection: socket.socket) -> None:
    answer(connection, b'{"v": 1, "ok": false, "error": "there are 64 clients already"}\n')


def mumble(connection: socket.socket) -> None:
    answer(connection, b"220 mail.example ESMTP\n")


def test_one_that_hangs_keeps_nobody(stage: Stage) -> None:
    began = monotonic()
    deaf = "deaf", "deaf too", "deaf as well"
    faults = ask({name: stage(name) for name in deaf} | {"late": stage("late", answer_late)}, 2.0)
    assert faults == {"late": None} | dict.fromkeys(deaf, "no answer within 2 s")
    assert monotonic() - began < 2 * len(deaf)


def test_one_whose_backlog_is_full_is_not_waited_for_any_longer(stage: Stage) -> None:
    path = stage("full", backlog=0)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(path)  # the backlog is full: connect waits, for anybody else
        before = threading.active_count()
        assert ask({"full": path}, 0.5) == {"full": "no answer within 0.5 s"}
        eventually(lambda: threading.active_count() == before, "nobody waits any more", deadline=5)


def test_a_signal_does_not_end_the_wait_for_room(stage: Stage) -> None:
    path = stage("full", backlog=0)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(path)
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            with pytest.raises(Failed, match="Resource temporarily unavailable"):
                Connection(path, 0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_one_that_hangs_up_is_asked_again(stage: Stage) -> None:
    assert ask({"a": stage("a", hang_up, hang_up, answer)}, DEADLINE) == {"a": None}
    assert ask({"b": stage("b", hang_up, hang_up, hang_up)}, DEADLINE) == {"b": "it hangs up"}


def test_a_refusal_is_an_answer(stage: Stage) -> None:
    assert ask({"a": stage("a", refuse)}, DEADLINE) == {"a": None}


def test_somebody_else_is_no_daemon(stage: Stage, tmp_path: Path) -> None:
    faults = ask({"a": stage("a", mumble), "b": str(tmp_path / "none")}, DEADLINE)
    assert str(faults["a"]).startswith("no preforkd answers there: ")
    assert str(faults["b"]).endswith("No such file or directory")


def test_a_daemon_is_well_and_so_is_one_with_all_its_clients(serve: Serve) -> None:
    daemon = serve(":Upper", "--listen", "tcp://127.0.0.1:0")
    with ExitStack() as clients:
        for _ in range(64):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(daemon.control)
        assert ask({"a": daemon.control}, DEADLINE) == {"a": None}
        daemon.log.wait_for("^control_refused ")
