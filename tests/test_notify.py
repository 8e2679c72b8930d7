"""What the service manager is told, and when."""

import os
import selectors
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import CLOCK_MONOTONIC, clock_gettime_ns

import pytest

from preforkd.notify import EXTEND_EVERY, FEED_EVERY, STATUS_EVERY, Manager, Rhythm, Stage, status_line
from tests.conftest import TARGETS, Serve
from tests.daemon import DEADLINE

Listening = tuple[socket.socket, str]

UPPER = (":Upper", "--listen", "tcp://127.0.0.1:0")


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listening]:
    """The manager's socket, and its address as the environment tells it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(DEADLINE)
        name = f"@preforkd-test-{os.getpid()}" if request.param == "abstract" else f"{tmp_path}/notify"
        manager.bind(name.replace("@", "\0", 1))
        yield manager, name


@pytest.fixture
def manager(listening: Listening) -> Iterator[Manager]:
    with closing(Manager({"NOTIFY_SOCKET": listening[1]}, 1)) as made:
        yield made


def messages(manager: socket.socket) -> Iterator[list[str]]:
    while True:
        yield manager.recv(9999).decode().split("\n")


# When.


def test_the_watchdog_is_fed_at_its_interval_and_only_when_all_is_well() -> None:
    rhythm = Rhythm(watchdog_interval=2.0)
    assert rhythm.due(100.0, Stage.SERVING, "", is_well=True) == ["WATCHDOG=1"]
    assert rhythm.wake_at == 102.0
    assert rhythm.due(101.9, Stage.SERVING, "", is_well=True) == []
    assert rhythm.due(102.0, Stage.SERVING, "", is_well=False) == []
    assert rhythm.wake_at == float("inf")  # whatever makes it well wakes the loop
    assert rhythm.due(109.0, Stage.SERVING, "", is_well=True) == ["WATCHDOG=1"]
    assert rhythm.wake_at == 111.0


def test_nobody_is_fed_who_does_not_watch() -> None:
    rhythm = Rhythm()
    assert rhythm.due(100.0, Stage.SERVING, "", is_well=True) == []
    assert rhythm.wake_at == float("inf")


@pytest.mark.parametrize("stage", [Stage.BOOTING, Stage.RELOADING, Stage.STOPPING])
def test_more_time_is_asked_for_again_before_it_runs_out(stage: Stage) -> None:
    rhythm = Rhythm()
    assert rhythm.due(100.0, stage, "", is_well=True) == ["EXTEND_TIMEOUT_USEC=10000000"]
    assert rhythm.wake_at == 100.0 + EXTEND_EVERY
    assert EXTEND_EVERY < 10.0
    assert rhythm.due(rhythm.wake_at - 0.1, stage, "", is_well=True) == []
    assert rhythm.due(rhythm.wake_at, stage, "", is_well=True) == ["EXTEND_TIMEOUT_USEC=10000000"]
    assert rhythm.due(200.0, Stage.SERVING, "", is_well=True) == []
    assert rhythm.wake_at == float("inf")


def test_a_status_is_told_when_it_has_changed_and_not_too_often() -> None:
    rhythm = Rhythm()
    assert rhythm.due(100.0, Stage.SERVING, "one", is_well=True) == ["STATUS=one"]
    assert rhythm.due(100.1, Stage.SERVING, "two\nlines", is_well=True) == []
    assert rhythm.wake_at == 100.0 + STATUS_EVERY
    assert rhythm.due(rhythm.wake_at, Stage.SERVING, "two\nlines", is_well=True) == ["STATUS=two lines"]
    assert rhythm.wake_at == float("inf")


def test_a_status_is_one_line_of_workers_generation_and_verdict() -> None:
    assert status_line(1, 3, 2, None) == "4 workers: 1 busy, 3 idle; generation 2"
    assert status_line(0, 4, 2, "rolled back") == "4 workers: 0 busy, 4 idle; generation 2; last reload: rolled back"


# The variables.


def test_the_variables_are_taken_out_of_the_environment_and_can_be_put_back() -> None:
    variables = {"NOTIFY_SOCKET": "/nobody", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    environment = {"HOME": "/", **variables}
    manager = Manager.take(environment)
    assert environment == {"HOME": "/"}
    assert manager.environment() == variables
    assert manager.watchdog_interval == 1.5


def test_a_patient_watchdog_is_fed_so_often_that_orphans_have_most_of_its_time() -> None:
    assert Manager({"NOTIFY_SOCKET": "/nobody", "WATCHDOG_USEC": "45000000"}, 1).watchdog_interval == FEED_EVERY


@pytest.mark.parametrize(
    "variables",
    [
        {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-1"},
        {"WATCHDOG_PID": "x"},
        {},
    ],
)
def test_a_watchdog_that_is_not_ours_is_not_fed(variables: dict[str, str]) -> None:
    assert Manager({"NOTIFY_SOCKET": "/nobody", **variables}, 2).watchdog_interval == float("inf")


def test_without_a_manager_nothing_is_said_and_nothing_is_due() -> None:
    manager = Manager({}, 1)
    manager.ready("fine")
    manager.keep("name", 0)
    manager.barrier()
    manager.turn(Stage.BOOTING, "", is_well=True)
    assert not manager.is_there
    assert manager.wake_at == float("inf")


# What.


def test_descriptors_are_sent_with_their_names(listening: Listening, manager: Manager) -> None:
    receiver, _ = listening
    reader, writer = os.pipe()
    manager.keep("the name", reader)
    message, (received,), _, _ = socket.recv_fds(receiver, 999, 1)
    assert message == b"FDSTORE=1\nFDNAME=the name\nFDPOLL=0"
    os.write(writer, b"x")
    assert os.read(received, 9) == b"x"
    manager.forget("the name")
    assert receiver.recv(999) == b"FDSTOREREMOVE=1\nFDNAME=the name"
    for descriptor in (reader, writer, received):
        os.close(descriptor)


def test_a_reload_is_told_with_the_time_that_systemd_compares(listening: Listening, manager: Manager) -> None:
    receiver, _ = listening
    before = clock_usec()
    manager.reloading()
    word, time = next(messages(receiver))
    assert word == "RELOADING=1"
    assert before <= int(time.removeprefix("MONOTONIC_USEC=")) <= clock_usec()


def clock_usec() -> int:
    return clock_gettime_ns(CLOCK_MONOTONIC) // 1000


def test_a_manager_that_is_behind_hears_everything_when_it_reads(listening: Listening, manager: Manager) -> None:
    receiver, _ = listening
    with selectors.DefaultSelector() as selector:
        manager.attend(selector)
        for number in range(2000):  # more than net.unix.max_dgram_qlen
            manager.forget(str(number))
        assert selector.get_map()
        assert manager.wake_at == float("inf")  # nothing periodic is added to what waits
        for number in range(2000):
            assert next(messages(receiver)) == ["FDSTOREREMOVE=1", f"FDNAME={number}"]
            for key, _ in selector.select(0):
                key.data()
        assert not selector.get_map()


def test_a_manager_that_has_gone_is_no_fault(listening: Listening, manager: Manager) -> None:
    receiver, _ = listening
    manager.stopping()
    receiver.close()
    manager.stopping()
    manager.keep("x", 999)


def test_a_barrier_waits_until_the_manager_has_let_go_of_the_pipe(listening: Listening, manager: Manager) -> None:
    receiver, _ = listening
    order = []

    def answer() -> None:
        message, (descriptor,), _, _ = socket.recv_fds(receiver, 999, 1)
        order.append(message)
        os.close(descriptor)

    thread = threading.Thread(target=answer)
    thread.start()
    manager.barrier()
    order.append(b"passed")
    thread.join()
    assert order == [b"BARRIER=1", b"passed"]


# The daemon.


def test_start_and_stop_are_told(serve: Serve, listening: Listening) -> None:
    receiver, name = listening
    daemon = serve(*UPPER, environment={"NOTIFY_SOCKET": name}, ready=False)
    said = messages(receiver)
    assert next(said)[0] == "EXTEND_TIMEOUT_USEC=10000000"  # for the boot
    ready = next(each for each in said if "READY=1" in each)
    assert ready == ["READY=1", "STATUS=4 workers: 0 busy, 4 idle; generation 1", f"MAINPID={daemon.pid}"]
    assert daemon.stop() == 0
    rest = [next(said)]
    while rest[-1] != ["STOPPING=1"]:
        rest.append(next(said))
    assert next(said)[0] == "EXTEND_TIMEOUT_USEC=10000000"  # for the drain


def test_even_a_reload_that_is_refused_at_once_is_told_and_its_end(
    serve: Serve, listening: Listening, tmp_path: Path
) -> None:
    """Or else ``systemctl reload`` waits for RELOADING=1 (systemd.service(5), Type=notify-reload)."""
    receiver, name = listening
    settings = tmp_path / "c.toml"
    settings.write_text(f'[services.a]\ntarget = "{TARGETS}:Upper"\nlisten = ["tcp://127.0.0.1:0"]')
    daemon = serve("-c", str(settings), environment={"NOTIFY_SOCKET": name})
    settings.write_text("rubbish")
    daemon.signal(signal.SIGHUP)
    said = messages(receiver)
    next(each for each in said if "READY=1" in each)
    next(each for each in said if "RELOADING=1" in each)
    ready = next(each for each in said if "READY=1" in each)
    assert "last reload: reload refused: " in ready[1]


def test_what_is_meant_for_the_master_does_not_reach_the_programs_of_a_handler(
    serve: Serve, listening: Listening
) -> None:
    _, name = listening
    variables = {
        "NOTIFY_SOCKET": name,
        "WATCHDOG_USEC": "30000000",
        "LISTEN_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "x",
        "WATCHDOG_PID": "1",
    }
    daemon = serve(":Environment", "--listen", "tcp://127.0.0.1:0", environment=variables)
    names = daemon.ask(b"").decode().split()
    assert "PATH" in names
    assert not variables.keys() & set(names)
