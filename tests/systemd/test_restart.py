"""The master may die: under systemd the listeners and the counters outlive it."""

from functools import partial

from tests.systemd.unit import Clients, Unit, ask_stream, metrics, systemctl

TCP = ("127.0.0.1", 9000)
ARGUMENTS = (":Upper", "--listen", "tcp://127.0.0.1:9000", "--metrics", "tcp://127.0.0.1:9109")
ANSWERED = 'preforkd_requests_total{outcome="ok",service="Upper"}'
KILLED = 'preforkd_requests_total{outcome="killed",service="Upper"}'


def test_a_restart_refuses_and_resets_nobody_and_the_counters_go_on() -> None:
    with Unit(*ARGUMENTS) as unit, Clients(partial(ask_stream, TCP), b"QUESTION\n") as clients:
        for _ in range(3):
            clients.until_answered(100)
            systemctl("restart", unit.name)
        clients.until_answered(100)
        assert clients.stop() == {"answered": clients.outcomes["answered"]}
        assert metrics(9109)[ANSWERED] == clients.outcomes["answered"]
        assert metrics(9109)[KILLED] == 0
