"""The master may die: under systemd the listeners and the counters outlive it."""

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.daemon import DEADLINE, eventually
from tests.systemd.unit import Clients, Unit, ask_datagram, ask_stream, metrics, serve, systemctl

ADDRESS = ("127.0.0.1", 9000)
PATH = "/run/under-test/x"
TCP = ("--listen", "tcp://127.0.0.1:9000")
METRICS = ("--metrics", "tcp://127.0.0.1:9109")

WAYS = {
    "tcp": (":Upper", "tcp://127.0.0.1:9000", partial(ask_stream, ADDRESS)),
    "unix": (":Upper", f"unix:{PATH}", partial(ask_stream, PATH, socket.AF_UNIX)),
    "udp": (":UpperDatagram", "udp://127.0.0.1:9000", partial(ask_datagram, ADDRESS)),
}


def requests(outcome: str, service: str = "Upper") -> float:
    return metrics(9109)[f'preforkd_requests_total{{outcome="{outcome}",service="{service}"}}']


@pytest.mark.parametrize("way", WAYS)
def test_a_restart_refuses_and_cuts_nobody_and_the_counters_go_on(way: str) -> None:
    target, url, ask = WAYS[way]
    with Unit(target, "--listen", url, *METRICS) as unit, Clients(ask, b"QUESTION\n") as clients:
        for _ in range(3):
            clients.until_answered(100)
            systemctl("restart", unit.name)
        clients.until_answered(100)
        outcomes = clients.stop()
        assert outcomes == {"answered": outcomes["answered"]}
        eventually(lambda: requests("ok", target[1:]) == outcomes["answered"], "every request is counted")
        assert requests("killed", target[1:]) == 0


@pytest.mark.parametrize(("mode", "exit_type"), [("mixed", "cgroup"), ("control-group", "main"), ("process", "main")])
def test_a_killed_master_costs_nothing_where_systemd_leaves_the_workers_time(mode: str, exit_type: str) -> None:
    with Unit(":Obey", *TCP, *METRICS, KillMode=mode, ExitType=exit_type) as unit:
        with socket.create_connection(ADDRESS, DEADLINE) as client, client.makefile("rb") as answers:
            client.sendall(b"until_eof\n")
            assert answers.readline() == b"waiting\n"
            with Clients(partial(ask_stream, ADDRESS), b"what?\n") as clients:
                clients.until_answered(100)
                before = unit.pid
                os.kill(before, signal.SIGKILL)
                if mode == "process":
                    unit.log.wait_for("^takeover_waits ")
                else:
                    state = "running" if exit_type == "cgroup" else "stop-sigterm"
                    eventually(lambda: unit.show("MainPID") == "0", "systemd knows that it is dead")
                    eventually(lambda: unit.show("SubState") == state, "and waits for the workers")
                client.shutdown(socket.SHUT_WR)
                assert answers.readline() == b"eof after 0\n"
                unit.restarted(before)
                clients.until_answered(100)
                outcomes = clients.stop()
        assert outcomes == {"answered": outcomes["answered"]}
        eventually(lambda: requests("ok", "Obey") == outcomes["answered"] + 1, "every request is counted")
        assert requests("killed", "Obey") == 0


def test_a_killed_master_costs_no_more_than_what_systemd_kills_with_it() -> None:
    with Unit(":Upper", *TCP, *METRICS, KillMode="mixed", ExitType="main") as unit:
        with Clients(partial(ask_stream, ADDRESS), b"QUESTION\n") as clients:
            for _ in range(3):
                clients.until_answered(100)
                before = unit.pid
                os.kill(before, signal.SIGKILL)
                unit.restarted(before)
            clients.until_answered(100)
            outcomes = clients.stop()
        cut = outcomes["ConnectionResetError"] + outcomes["OSError"] + outcomes["got b''"]  # not connected any more
        assert outcomes.keys() <= {"answered", "ConnectionResetError", "OSError", "got b''"}, "nobody is refused"
        assert cut <= 3 * 4, "one request for each worker that was killed"
        # A request may be answered and not be counted as such yet, and taken and not be counted as begun yet.
        assert outcomes["answered"] <= requests("ok") + requests("killed") <= outcomes["answered"] + cut
        assert metrics(9109)['preforkd_worker_exits_total{reason="orphaned",service="Upper"}'] == 3 * 4


def test_a_killed_master_is_replaced_where_systemd_keeps_nothing() -> None:
    with Unit(":Upper", *TCP, FileDescriptorStoreMax="0") as unit:
        before = unit.pid
        os.kill(before, signal.SIGKILL)
        unit.restarted(before)
        assert ask_stream(ADDRESS) == b"QUESTION\n"


@pytest.mark.parametrize(
    ("target", "scheme", "ask"), [(":Upper", "tcp", ask_stream), (":UpperDatagram", "udp", ask_datagram)]
)
def test_what_is_no_longer_wanted_leaves_the_store_and_its_address_is_free_at_once(
    target: str, scheme: str, ask: Callable[[object], bytes]
) -> None:
    with Unit(target, *(f"--listen={scheme}://127.0.0.1:{port}" for port in (9000, 9001))) as unit:
        assert unit.show("NFileDescriptorStore") == "3"  # and the scoreboard
        for host in 5 * ("0.0.0.0", "127.0.0.1"):
            unit.change(ExecStart=serve(target, f"--listen={scheme}://{host}:9000"))
            systemctl("restart", unit.name)
            assert ask(ADDRESS) == b"QUESTION\n"
            eventually(lambda: unit.show("NFileDescriptorStore") == "2", "one listener and the scoreboard")
        unit.log.wait_for(f"^descriptor_unused name={scheme}%3A//127.0.0.1%3A9001 fd=")


def test_a_listener_whose_socket_file_was_removed_is_bound_anew() -> None:
    with Unit(":Upper", "--listen", f"unix:{PATH}") as unit:
        Path(PATH).unlink()
        systemctl("restart", unit.name)
        assert ask_stream(PATH, socket.AF_UNIX) == b"QUESTION\n"
        unit.log.wait_for("^descriptor_unused name=unix%3A/run/under-test/x#")


def test_any_number_of_ports_to_be_chosen_stay_as_they_were_chosen() -> None:
    with Unit(":Upper", *3 * ("--listen", "tcp://127.0.0.1:0")) as unit:
        unit.log.wait_for("^ready ")
        systemctl("restart", unit.name)
        unit.log.wait_for("^ready ", times=2)
        urls = [match[1] for match in unit.log.matches("^listening .* url=(.*)")]
        assert len(set(urls)) == 3
        assert urls[:3] == urls[3:]


def test_more_listeners_than_the_managers_queue_holds_are_all_kept() -> None:
    urls = [word for port in range(9000, 9060) for word in ("--listen", f"tcp://127.0.0.1:{port}")]
    with Unit(":Upper", *urls) as unit:
        eventually(lambda: unit.show("NFileDescriptorStore") == "61", "60 listeners and the scoreboard")
