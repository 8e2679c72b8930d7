"""How it stops: three steps, each with its deadline; and what other signals and the death of the master bring about."""

import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

import preforkd
from preforkd.stacks import is_plumbing
from tests.conftest import Serve
from tests.daemon import Conversation, Daemon, eventually

TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")
TWO = ("--max-children", "2")


def timeouts(graceful: float, eof: float) -> Sequence[str]:
    return "--set", f"graceful_timeout={graceful}", "--set", f"eof_timeout={eof}"


class Client(Conversation):
    """A client in the middle of a conversation."""

    def __init__(self, daemon: Daemon, service: str | None = None) -> None:
        super().__init__(daemon.connect(service))
        self.pid = int(self.ask(b"pid"))

    def ask(self, line: bytes) -> bytes:
        self.socket.sendall(line + b"\n")
        return self.answers.readline()

    def rest(self) -> bytes:
        """What still comes before the connection ends, in whatever way it ends."""
        try:
            return self.answers.read()
        except ConnectionResetError:
            return b""


def exit_of(daemon: Daemon, pid: int) -> str:
    """The line that says how this worker has left."""
    return daemon.log.wait_for(rf"^worker_exit .*\bpid={pid} .*")[0]


# The three steps.


def test_step_one_a_busy_worker_finishes_what_it_holds_and_takes_nothing_new(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *TWO)
    with Client(daemon) as client:
        daemon.signal(signal.SIGTERM)
        eventually(lambda: client.ask(b"draining") == b"True\n")
        eventually(lambda: len(daemon.workers("Obey")) == 1)  # the idle one has left
        eventually(lambda: daemon.metrics()['preforkd_workers{service="Obey",state="draining"}'] == 1)
        with daemon.connect() as late:
            late.sendall(b"say late\n")
            assert client.ask(b"say still here") == b"still here\n"
            late.setblocking(False)
            with pytest.raises(BlockingIOError):
                late.recv(1)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
        assert daemon.wait() == 0
        assert "cause=drained status=0 requests=1 " in exit_of(daemon, client.pid)
    assert not daemon.log.matches("^(end_of_file|kill) ")


def test_step_two_a_handler_that_waits_for_its_client_reads_end_of_file_and_still_answers(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, *timeouts(0.3, 20))
    with Client(daemon) as client:
        assert client.ask(b"until_eof") == b"waiting\n"
        client.socket.sendall(b"12345")
        daemon.signal(signal.SIGTERM)
        assert client.rest() == b"eof after 5\n"
        assert daemon.wait() == 0
        assert f" pid={client.pid}" in daemon.log.matches("^end_of_file ")[0].string
        assert "cause=eof status=0 requests=1 " in exit_of(daemon, client.pid)
    assert not daemon.log.matches("^kill ")


def test_step_three_a_stuck_worker_is_killed_with_its_stack_in_the_log_and_the_cause_told(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, *timeouts(0.2, 0.2))
    with Client(daemon) as client:
        assert client.ask(b"spin") == b"spinning\n"
        assert daemon.stop() == 0
        assert client.rest() == b""
    events = [line.split()[0] for line in daemon.log.lines if f" pid={client.pid} " in line]
    assert events == ["worker_ready", "end_of_file", "kill", "worker_exit"]
    assert daemon.log.matches(rf"^kill .*pid={client.pid} cause=deadline signal=SIGABRT busy=True")
    assert "cause=deadline signal=SIGABRT requests=0 lost=1 " in exit_of(daemon, client.pid)
    assert daemon.log.matches(r'^Obey#\d\| .*File ".*targets.py", line \d+ in obey')


def test_a_second_term_goes_on_to_end_of_file(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client:
        assert client.ask(b"until_eof") == b"waiting\n"
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("^stopping haste=none")
        daemon.signal(signal.SIGTERM)
        assert client.rest() == b"eof after 0\n"
        assert daemon.wait() == 0
    assert daemon.log.matches("^stopping haste=end_of_file")
    assert "cause=eof " in exit_of(daemon, client.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("order", [b"spin", b"until_eof"])
def test_int_and_quit_kill_a_busy_worker_at_once_with_its_stack(
    serve: Serve, number: signal.Signals, order: bytes
) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client:
        client.ask(order)
        assert daemon.stop(number) == 0
        assert client.rest() == b""
    assert "cause=operator signal=SIGABRT requests=0 lost=1 " in exit_of(daemon, client.pid)
    assert len(daemon.log.matches("^kill ")) == 1
    assert daemon.log.matches(r'^Obey#\d\| .*File ".*targets.py", line \d+ in obey')


def test_a_stop_now_after_a_stop_hurries_it(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client:
        client.ask(b"spin")
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("^stopping haste=none")
        assert daemon.stop(signal.SIGINT) == 0
    assert "cause=operator " in exit_of(daemon, client.pid)


def test_a_stop_after_a_stop_now_does_not_slow_it_down(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client:
        client.ask(b"spin")
        os.kill(client.pid, signal.SIGSTOP)  # for a while it cannot even die of SIGABRT
        daemon.signal(signal.SIGINT)
        daemon.log.wait_for("^stopping haste=kill")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    assert "cause=operator signal=SIGKILL " in exit_of(daemon, client.pid)


@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_that_does_not_even_run_is_got_rid_of(serve: Serve, busy: bool) -> None:
    daemon = serve(":Obey", *TCP, *TWO, *timeouts(0.2, 0.2))
    with Client(daemon) as client:
        if not busy:
            client.socket.shutdown(socket.SHUT_WR)
            assert client.rest() == b""
        os.kill(client.pid, signal.SIGSTOP)
        assert daemon.stop() == 0
    assert "cause=deadline signal=SIGKILL " in exit_of(daemon, client.pid)


def test_a_handler_may_ask_its_server_to_shut_down_and_only_that_worker_leaves(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client:
        assert client.ask(b"shutdown") == b"shut down\n"
        assert client.ask(b"draining") == b"True\n"
    assert "cause=drained status=0 " in exit_of(daemon, client.pid)
    eventually(lambda: len(daemon.workers()) == 2)
    assert daemon.ask(b"say a\n") == b"a\n"


def test_threads_of_a_server_finish_what_they_hold(serve: Serve) -> None:
    daemon = serve(":ThreadingObeyServer", "--handler", ":Obey", *TCP, "--max-children", "1")
    with Client(daemon) as one, Client(daemon) as other:
        assert one.pid == other.pid
        daemon.signal(signal.SIGTERM)
        eventually(lambda: one.ask(b"draining") == b"True\n")
        one.close()
        assert other.ask(b"say still here") == b"still here\n"
    assert daemon.wait() == 0
    assert "cause=drained status=0 requests=2 " in exit_of(daemon, one.pid)


def test_without_block_on_close_the_master_leaves_at_once_and_the_workers_finish_alone(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, "--set", "block_on_close=false")
    with Client(daemon) as client:
        assert daemon.stop() == 0
        assert client.ask(b"say still here") == b"still here\n"
        assert client.ask(b"draining") == b"True\n"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""


def test_left_alone_a_worker_that_is_stuck_ends_itself_with_its_stack(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, "--set", "block_on_close=false", *timeouts(0.3, 0.3))
    with Client(daemon) as client:
        assert client.ask(b"spin") == b"spinning\n"
        assert daemon.stop() == 0
        assert client.rest() == b""
    daemon.log.finish()
    assert daemon.log.matches(r'File ".*targets.py", line \d+ in obey')


# The death of the master.


def test_when_the_master_dies_everybody_leaves_and_who_is_busy_finishes_first(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *TWO)
    with Client(daemon) as client:
        eventually(lambda: len(daemon.family()) == 2 + 1 + 2)  # workers, exporter, molds
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        eventually(lambda: daemon.alive() == [client.pid])
        assert client.ask(b"draining") == b"True\n"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    eventually(lambda: daemon.alive() == [])


def test_when_the_master_dies_a_stuck_worker_does_not_stay_for_ever(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, *timeouts(0.3, 0.3))
    with Client(daemon) as client:
        client.ask(b"spin")
        daemon.signal(signal.SIGKILL)
        assert client.rest() == b""
    eventually(lambda: daemon.alive() == [])
    daemon.wait()


# Other signals.


def test_ttin_and_ttou_change_the_number_of_workers_down_to_one(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *TWO)
    daemon.signal(signal.SIGTTIN)
    eventually(lambda: len(daemon.workers("Obey")) == 3)
    for size, times in ((2, 1), (1, 2), (1, 3)):
        daemon.signal(signal.SIGTTOU)
        daemon.log.wait_for(rf"^resized service=Obey workers={size} ", 2 if times == 3 else 1)
    eventually(lambda: len(daemon.workers("Obey")) == 1)
    assert daemon.metrics()['preforkd_workers_max{service="Obey"}'] == 1
    assert daemon.metrics()['preforkd_worker_exits_total{reason="drained",service="Obey"}'] == 2
    assert len(daemon.workers("metrics")) == 1
    assert daemon.ask(b"say a\n") == b"a\n"


def test_ttou_lets_a_busy_worker_finish(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as one, Client(daemon):
        daemon.signal(signal.SIGTTOU)
        daemon.log.wait_for("^resized service=Obey workers=1 ")
        assert one.ask(b"say still here") == b"still here\n"
    eventually(lambda: len(daemon.workers()) == 1)


def test_usr1_writes_the_state_of_every_lane_and_all_stacks_to_the_log(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, "--max-children", "3")
    with Client(daemon) as client:
        client.ask(b"spin")
        daemon.signal(signal.SIGUSR1)
        daemon.log.wait_for(r'^Obey#\d\|.*File ".*targets.py", line \d+ in obey')
        eventually(lambda: len(daemon.log.matches(r"^\w+#\d\| .*most recent call first")) >= 4)
        (busy,) = daemon.log.matches("^lane service=Obey .*busy=True")
        assert f" pid={client.pid} " in busy.string
        assert len(daemon.log.matches("^lane service=Obey .*state=ready busy=False")) == 2
        assert daemon.stop(signal.SIGINT) == 0
    who = {match[1] for match in daemon.log.matches(r"^(\w+#\d)\| .*most recent call first")}
    assert who == {"Obey#0", "Obey#1", "Obey#2", "metrics#0"}
    assert not daemon.log.matches(r'File ".*/(preforkd/|preforkd_workers/(?!lane\.py))')  # nothing below the lane


def test_signals_of_a_terminal_reach_the_whole_group_and_leave_no_traceback(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    os.killpg(daemon.pid, signal.SIGINT)
    assert daemon.wait() == 0
    assert "Traceback" not in daemon.log.text
    assert len(re.findall("cause=drained", daemon.log.text)) == 2


def test_a_hangup_of_the_whole_group_harms_nobody(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, "--set", "probation=0")
    workers = daemon.workers()
    os.killpg(daemon.pid, signal.SIGHUP)
    daemon.log.wait_for("^reload_done")
    assert daemon.ask(b"say a\n") == b"a\n"
    eventually(lambda: len(daemon.workers()) == 2)
    assert not set(daemon.workers()) & set(workers)
    assert not daemon.log.matches("cause=(?!drained)")


# Strangers.


def test_strangers_that_were_reparented_to_the_master_are_reaped(serve: Serve) -> None:
    daemon = serve(":Orphan", *TCP, *TWO)
    stranger = int(daemon.ask(b""))
    daemon.log.wait_for(rf"^stranger_reaped pid={stranger} status=7")
    eventually(lambda: not daemon.zombies())
    assert len(daemon.workers()) == 2


def test_a_stack_hides_our_own_frames_and_no_others() -> None:
    ours = os.path.dirname(preforkd.__file__)
    assert is_plumbing(f'  File "{ours}/master.py", line 1 in serve_forever')
    assert not is_plumbing('  File "/srv/preforkd/app.py", line 1 in handle')


@pytest.mark.parametrize("target", [":Obey", Path(__file__).with_name("loops.py")])
def test_what_has_woken_a_worker_is_served_although_it_drains(serve: Serve, target: object) -> None:
    """One connection wakes one worker: if that leaves without it, nobody comes for it."""
    name = f"{target}:ForEver" if isinstance(target, Path) else str(target)
    daemon = serve(name, *TCP, *TWO, environment={"PYTHONPATH": os.pathsep.join(PATHS), "HOOKS": os.devnull})
    stays, leaves = (daemon.log.matches(rf"^worker_ready .*slot={slot} .*pid=(\d+)")[0][1] for slot in (0, 1))
    for pid in (stays, leaves):
        eventually(lambda pid=pid: "epoll_wait" in Path(f"/proc/{pid}/wchan").read_text(), "it waits")  # type: ignore[misc]
        os.kill(int(pid), signal.SIGSTOP)
        eventually(lambda pid=pid: _state(pid) == "T", "it has stopped")  # type: ignore[misc]
    with daemon.connect() as client:
        client.sendall(b"pid\n")
        client.shutdown(socket.SHUT_WR)
        daemon.signal(signal.SIGTTOU)
        daemon.log.wait_for("^resized ")
        eventually(lambda: _is_told(leaves), "the signal has been sent")
        os.kill(int(leaves), signal.SIGCONT)
        assert client.recv(100) == f"{leaves}\n".encode()
    assert "cause=drained status=0 requests=1 " in exit_of(daemon, int(leaves))
    os.kill(int(stays), signal.SIGCONT)


PATHS = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]


def _state(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _is_told(pid: str) -> bool:
    """Whether SIGTERM is pending (proc(5), ShdPnd)."""
    found = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return found is not None and bool(int(found[1], 16) & 1 << signal.SIGTERM - 1)
