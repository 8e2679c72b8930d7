"""Thousands of connections that are open at once, each of which says something now and then."""

import resource
import selectors
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic

import psutil
import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually
from tests.test_stop import METRICS, TCP


@contextmanager
def descriptors(number: int) -> Iterator[None]:
    """Have so many in this process for a while. Skips the test where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip(f"needs {number} descriptors in a process, the hard limit is {hard} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Clients that are connected, each of which sends a line in its turn and counts the answers."""

    def __init__(self, daemon: Daemon, number: int, stack: ExitStack) -> None:
        self.selector = stack.enter_context(selectors.DefaultSelector())
        self.clients = [stack.enter_context(daemon.connect()) for _ in range(number)]
        self.answers: Counter[int] = Counter()
        for index, client in enumerate(self.clients):
            client.setblocking(False)
            self.selector.register(client, selectors.EVENT_READ, index)

    def talk(self, rounds: int, seconds: float) -> None:
        """Each sends a line in each round, evenly over so many seconds; every answer is read before this returns."""
        total, begun = rounds * len(self.clients), monotonic()
        sent = 0
        while self.answers.total() < total:
            assert monotonic() < begun + rounds * seconds + DEADLINE, f"{self.answers.total()} of {total} answers"
            due = min(total, int((monotonic() - begun) / seconds * len(self.clients)))
            for number in range(sent, due):
                index = number % len(self.clients)
                self.clients[index].send(b"line %d of %d\n" % (number, index))
            sent = due
            for key, _ in self.selector.select(0.01):
                self._hear(key.data)

    def _hear(self, index: int) -> None:
        answer = self.clients[index].recv(1 << 16)
        assert answer.endswith(b" OF %d\n" % index), answer
        self.answers[index] += answer.count(b"\n")


@pytest.mark.timeout(300)
def test_thousands_of_connections_are_answered_by_two_processes_of_greenlets(
    serve: Serve, soak: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    number, rounds, seconds = (10_000, 3, 10.0) if soak else (2_000, 2, 2.0)
    words = "--kind", "gevent", "--greenlets", number, "--max-children", "2"
    with descriptors(number + 100), ExitStack() as stack:
        daemon = serve(":Upper", *TCP, *METRICS, *words)
        crowd = Crowd(daemon, number, stack)
        eventually(lambda: daemon.metrics()['preforkd_lanes{service="Upper",state="busy"}'] == number)
        crowd.talk(rounds, seconds)
        assert set(crowd.answers.values()) == {rounds}
        assert len(crowd.answers) == number
        memory = [psutil.Process(pid).memory_full_info().pss / (1 << 20) for pid in daemon.workers("Upper")]
        assert len(memory) == 2
        with capsys.disabled():
            print(f"\n{number} connections: {' and '.join(f'{each:.0f} MiB' for each in memory)} of two workers")  # noqa: T201
    assert daemon.stop() == 0


def test_the_next_connection_after_the_last_greenlet_waits_and_is_served(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, "--kind", "gevent", "--greenlets", "10", "--max-children", "1")
    with ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(11)]
        for client in clients:
            client.sendall(b"a\n")
        answered = [client for client in clients[:10] if client.recv(10) == b"A\n"]
        clients[10].setblocking(False)
        with pytest.raises(BlockingIOError):
            clients[10].recv(10)
        answered[0].shutdown(socket.SHUT_WR)
        clients[10].settimeout(DEADLINE)
        assert clients[10].recv(10) == b"A\n"
