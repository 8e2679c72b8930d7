"""The listener of supervisord's events: who is restarted, who is left alone, and what Prometheus hears of it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from preforkd.supervisor import metrics
from preforkd.supervisor.metrics import METRICS, Ledger
from preforkd.supervisor.supervisord import Program, Supervisord
from tests.daemon import DEADLINE, eventually, preforkctl, samples, scrape
from tests.supervisor.conftest import Supervise
from tests.supervisor.daemon import Sections, Supervisor, preforkd_serve, shipped
from tests.supervisor.fed import Fed

AT_ONCE = ("--grace", "0", "--timeout", "0.5")


def program(name: str, *words: object, **options: object) -> Sections:
    """A daemon of this name under supervisord."""
    serve = preforkd_serve(
        ":Obey", "--listen", "tcp://127.0.0.1:0", "--max-children", 1, "--set", f"name={name}", *words
    )
    return {f"program:{name}": {"command": serve, "redirect_stderr": "true", "startsecs": 0, **options}}


def ready(supervisor: Supervisor, *programs: str) -> list[int]:
    """The pids of the masters, when they are."""
    for each in programs:
        eventually(lambda each=each: supervisor.pid(each), f"{each} is started")  # type: ignore[misc]
        supervisor.log(each).wait_for(f"^ready pid={supervisor.pid(each)} ")
    return [supervisor.pid(each) for each in programs]


def again(supervisor: Supervisor, name: str, pid: int) -> int:
    """The pid of the next master, when that is ready."""
    eventually(lambda: supervisor.pid(name) not in (0, pid), f"{name} is started again")
    return ready(supervisor, name)[0]


@pytest.fixture(scope="module")
def flock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """Three daemons, a, b and c, whom every test that wants them leaves running, if not with the same pid."""
    with Supervisor(tmp_path_factory.mktemp("flock"), {**program("a"), **program("b"), **program("c")}) as supervisor:
        yield supervisor


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do not run for a while."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_the_deaf_are_restarted_after_two_missed_answers_and_nobody_else(flock: Supervisor) -> None:
    a, b, c = ready(flock, "a", "b", "c")
    with Fed(flock, *AT_ONCE) as fed:
        fed.rounds("c", 1)
        with stopped(a, b):
            fed.rounds("c", 1)
            fed.log.wait_for(rf"^missed program=a pid={a} missed=1 ")  # and neither hides the other
            fed.log.wait_for(rf"^missed program=b pid={b} missed=1 ")
            assert not fed.log.matches("^restart ")
            assert flock.pid("a") == a
            fed.rounds("c", 1)
            fed.log.wait_for(rf"^restart program=a pid={a} in_window=1")
            fed.log.wait_for(rf"^restart program=b pid={b} in_window=1")
        for each, pid in ("a", a), ("b", b):
            again(flock, each, pid)
            assert fed.value("supervisor_healthcheck_failures_total", each) == 2
            assert fed.value("supervisor_healthcheck_restarts_total", each) == 1
        assert flock.pid("c") == c
        assert fed.value("supervisor_healthcheck_failures_total", "c") == 0


def test_a_restart_cuts_no_request(flock: Supervisor) -> None:
    (a,) = ready(flock, "a")
    with Fed(flock, *AT_ONCE) as fed, socket.create_connection(flock.address("a"), DEADLINE) as client:
        client.sendall(b"say hello\n")
        assert client.recv(100) == b"hello\n"
        with stopped(a):
            fed.rounds("a", 2)
        eventually(lambda: flock.pid("a") not in (0, a))
        client.sendall(b"say bye\n")
        assert client.recv(100) == b"bye\n"
    again(flock, "a", a)


def test_who_answers_again_begins_anew(flock: Supervisor) -> None:
    (a,) = ready(flock, "a")
    with Fed(flock, *AT_ONCE) as fed:
        for number in 1, 2:
            with stopped(a):
                fed.rounds("a", 1)
                fed.log.wait_for("^missed program=a .*missed=1 ", times=number)
            fed.rounds("a", 1)
            fed.log.wait_for("^answered program=a .*missed=1", times=number)
        assert flock.pid("a") == a
        assert fed.value("supervisor_healthcheck_failures_total", "a") == 2
        assert fed.value("supervisor_healthcheck_restarts_total", "a") == 0


def test_nobody_is_asked_within_the_grace(supervise: Supervise) -> None:
    supervisor = supervise({**program("a"), **program("b")})
    (a, _) = ready(supervisor, "a", "b")
    began = supervisor.info("a")["start"]  # in whole seconds since the epoch
    with Fed(supervisor, "--grace", "6", "--timeout", "0.3") as fed, stopped(a):

        def is_said(event: str) -> bool:
            fed.tick()
            return bool(fed.log.matches(f"^{event} program=a"))

        eventually(lambda: is_said("missed"))
        assert time.time() - began > 5
        eventually(lambda: is_said("restart"))


def test_it_is_held_back_after_so_many_restarts(flock: Supervisor) -> None:
    (a, _) = ready(flock, "a", "b")
    with Fed(flock, *AT_ONCE, "--max-restarts", 1) as fed:
        with stopped(a):
            fed.rounds("b", 2)
            fed.log.wait_for("^restart program=a")
        a = again(flock, "a", a)
        with stopped(a):
            fed.rounds("b", 3)
            held = fed.log.wait_for("^held_back program=a .*")[0]
            assert f"pid={a} max_restarts=1 window=600s" in held
            eventually(lambda: fed.value("supervisor_healthcheck_held_back_total", "a") == 2)
        assert flock.pid("a") == a
        assert len(fed.log.matches("^restart ")) == len(fed.log.matches("^held_back ")) == 1
        fed.rounds("a", 1)
        fed.log.wait_for("^answered program=a .*missed=3")


def test_whoever_does_not_run_is_left_alone(supervise: Supervise) -> None:
    never = {"program:fatal": {"command": "false", "startretries": 0}}
    sections = {**program("well"), **program("stopped"), **program("starting", startsecs=3600), **never}
    supervisor = supervise(sections)
    _, _, starting = ready(supervisor, "well", "stopped", "starting")
    assert supervisor.ctl("stop", "stopped").returncode == 0
    supervisor.until("fatal", "FATAL")
    with Fed(supervisor, *AT_ONCE) as fed, stopped(starting):
        fed.rounds("well", 4)
        assert [supervisor.state(each) for each in ("stopped", "starting", "fatal")] == ["STOPPED", "STARTING", "FATAL"]
        assert supervisor.pid("starting") == starting
        assert not fed.log.matches("^(missed|restart|start) ")
        for each in "stopped", "starting", "fatal":
            assert fed.value("supervisor_process_state", each, state=supervisor.state(each)) == 1
            assert fed.value("supervisor_process_state", each, state="RUNNING") == 0


def test_whoever_is_busy_is_well(supervise: Supervise) -> None:
    supervisor = supervise(program("a", "--set", "request_queue_size=1"))
    (a,) = ready(supervisor, "a")
    with Fed(supervisor, *AT_ONCE[:2]) as fed, ExitStack() as clients:
        for number in range(3):  # one is served, the others fill the backlog
            client = clients.enter_context(socket.create_connection(supervisor.address("a"), DEADLINE))
            client.sendall(b"spin\n")
            if not number:
                assert client.recv(100) == b"spinning\n"
        fed.rounds("a", 3)
        assert preforkctl("a", "stop", "--no-wait", environment=supervisor.environment).returncode == 0
        supervisor.log("a").wait_for("^stopping")
        fed.rounds("a", 3)  # while it drains
        assert fed.value("supervisor_healthcheck_failures_total", "a") == 0
        assert supervisor.pid("a") == a
        os.kill(int(supervisor.log("a").wait_for(r"^worker_ready service=Obey .*pid=(\d+)")[1]), signal.SIGKILL)


def test_an_upgrade_is_no_missed_answer(flock: Supervisor) -> None:
    (a,) = ready(flock, "a")
    with Fed(flock, "--grace", "0", "--timeout", "10") as fed:
        command = [sys.executable, "-m", "preforkd.ctl", "a", "upgrade"]
        with subprocess.Popen(command, env=flock.environment) as upgrade:
            while upgrade.poll() is None:
                fed.rounds("a", 1)
        assert upgrade.returncode == 0
        fed.rounds("a", 1)
        assert fed.value("supervisor_healthcheck_failures_total", "a") == 0
        assert flock.pid("a") == a


def test_what_supervisord_would_not_start_again_is_started(supervise: Supervise) -> None:
    supervisor = supervise({**program("a", autorestart="false"), **program("b")})
    (a, _) = ready(supervisor, "a", "b")
    with Fed(supervisor, *AT_ONCE) as fed:
        with stopped(a):
            fed.rounds("b", 2)
            fed.log.wait_for("^restart program=a")
        supervisor.until("a", "EXITED")
        fed.rounds("b", 1)
        fed.log.wait_for("^start program=a")
        again(supervisor, "a", a)
        assert supervisor.ctl("stop", "a").returncode == 0
        fed.rounds("b", 2)
        assert supervisor.state("a") == "STOPPED"


def test_where_a_daemon_answers_is_found_or_pointed_out(supervise: Supervise, tmp_path: Path) -> None:
    runtime, custom = tmp_path / "runtime", tmp_path / "custom.sock"
    runtime.mkdir()
    # Each is deaf, but one in a wrapper, which is no master, and one that is not to be asked.
    sections = {
        **program("well"),
        **program("elsewhere", environment=f'RUNTIME_DIRECTORY="{runtime}"'),
        **program("custom", "--control", custom),
        **program("found", "--control", tmp_path / "found.sock"),
        **program("without", environment='RUNTIME_DIRECTORY="/dev/null/none"'),
        **program("excepted"),
        **program("named"),
        **program("wrapped"),
    }
    wrapped = sections["program:wrapped"]["command"]
    sections["program:wrapped"] = {**sections["program:wrapped"], "command": f"sh -c '{wrapped}; exit'"}
    sections["program:wrapped"] = {**sections["program:wrapped"], "stopasgroup": "true"}
    supervisor = supervise(sections)
    names = ("elsewhere", "custom", "found", "without", "excepted", "named", "wrapped")
    ready(supervisor, "well", *names[:-1])
    supervisor.log("wrapped").wait_for("^ready ")  # under a pid that supervisord does not know
    pids = {each: supervisor.pid(each) for each in names}
    old = "|".join(map(str, pids.values()))
    words = [f"--program=custom={custom}", "--program=excepted=", "--program=named=named", "--program=wrapped=wrapped"]
    with Fed(supervisor, *AT_ONCE, *words) as fed, stopped(*pids.values()):
        fed.rounds("well", 3)
        assert fed.log.wait_for("^watched program=elsewhere .*control=(.*) at=")[1] == str(runtime / "control.sock")
        assert fed.log.wait_for("^watched program=custom .*control=(.*) at=")[1] == str(custom)
        fed.log.wait_for(rf"^watched program=found .*control={tmp_path}/found\.sock ")
        for each in "elsewhere", "custom", "found", "named":
            fed.log.wait_for(f"^restart program={each} ")
        fed.log.wait_for("^unwatched program=without .*it has no control socket")
        fed.log.wait_for("^unwatched program=wrapped .*no master of preforkd's")
        assert {match[1] for match in fed.log.matches(rf"^unwatched program=(\w+) pid=({old}) ")} == {
            "without",
            "wrapped",
        }
        assert len(fed.log.matches("^restart ")) == 4
        assert not fed.log.matches("program=excepted")


def test_prometheus_hears_all_that_supervisord_knows(flock: Supervisor) -> None:
    ready(flock, "a")
    with Fed(flock, *AT_ONCE) as fed:
        fed.rounds("a", 1)
        fed.state("a", "RUNNING", "pid:7")
        fed.state("b", "EXITED", "expected:0 pid:8")
        fed.state("b", "EXITED", "expected:0 pid:9")
        fed.state("b", "EXITED", "expected:1 pid:10")
        page = fed.page()
        check = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
        assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
        for name, declared in METRICS.items():
            assert f"# TYPE {name} {declared.kind}\n" in page
            assert f"# HELP {name} {declared.help}\n" in page
        found = samples(page)
        assert found["supervisor_up"] == 1
        assert fed.value("supervisor_process_state", "a", state="RUNNING") == 1
        assert fed.value("supervisor_process_state_changes_total", "a", to="RUNNING") == 1
        assert fed.value("supervisor_process_state_changes_total", "a", to="FATAL") == 0
        assert fed.value("supervisor_process_exits_total", "b", expected="false") == 2
        assert fed.value("supervisor_process_exits_total", "b", expected="true") == 1
        assert fed.value("supervisor_process_start_time_seconds", "a") == flock.info("a")["start"]
        assert fed.value("supervisor_healthchecks_total", "a") == 1
        assert sum(key.startswith("supervisor_process_state{") for key in found) == 3 * 8


def test_what_was_missed_is_made_up_for_by_the_next_round(supervise: Supervise) -> None:
    supervisor = supervise({**program("a"), **program("b")})
    ready(supervisor, "a", "b")
    with Fed(supervisor, *AT_ONCE) as fed:
        fed.rounds("a", 1)
        supervisor.ctl("stop", "b")
        assert fed.value("supervisor_process_state", "b", state="RUNNING") == 1  # nobody has told us
        fed.tell("TICK_5", "when:1", skipped=3)
        fed.log.wait_for("^events_lost number=3")
        eventually(lambda: fed.value("supervisor_process_state", "b", state="STOPPED") == 1)
        supervisor.sections.pop("program:b")
        supervisor.change({})
        assert supervisor.ctl("update").returncode == 0
        fed.rounds("a", 1)
        assert not any('name="b"' in sample for sample in fed.metrics())


def test_it_says_nothing_but_the_protocol_whoever_prints(supervise: Supervise, tmp_path: Path) -> None:
    noisy = "import os, sys\nsys.addaudithook(lambda event, _: event == 'socket.connect' and shout())\n"
    shout = "def shout():\n print('noise', flush=True)\n os.write(1, b'more noise\\n')\n sys.__stdout__.flush()\n"
    (tmp_path / "sitecustomize.py").write_text(noisy + shout)
    supervisor = supervise(program("a"))
    ready(supervisor, "a")
    path = f"{tmp_path}:{supervisor.environment['PYTHONPATH']}"
    with Fed(supervisor, *AT_ONCE, environment={"PYTHONPATH": path}) as fed:
        fed.rounds("a", 2)
        fed.tell("PROCESS_LOG_STDOUT", "processname:ä groupname:ö pid:1 channel:stdout\nü\n")  # no bytes too few
        fed.rounds("a", 1)
        fed.log.wait_for("^more noise$", times=3)
        assert fed.said == b"READY\n" + b"RESULT 2\nOKREADY\n" * 4


def test_it_acknowledges_while_supervisord_does_not_answer(flock: Supervisor) -> None:
    ready(flock, "a")
    with Fed(flock, *AT_ONCE) as fed:
        fed.rounds("a", 1)
        with stopped(flock.process.pid):
            fed.tick()
            for _ in range(100):
                fed.state("a", "RUNNING")
                fed.tick()
        fed.rounds("a", 1)
        assert fed.value("supervisor_process_state_changes_total", "a", to="RUNNING") == 100
        assert fed.value("supervisor_healthcheck_failures_total", "a") == 0


def test_a_supervisord_that_cannot_be_asked_is_down(supervise: Supervise, tmp_path: Path) -> None:
    with Fed(supervise({}), environment={"SUPERVISOR_SERVER_URL": f"unix://{tmp_path}/none"}) as fed:
        fed.log.wait_for("^supervisord_unreachable reason=.*No such file")
        fed.state("a", "RUNNING")
        assert fed.metrics()["supervisor_up"] == 0
        assert "supervisor_process_state{" not in fed.page()
        fed.tick()
        fed.tick()
        assert len(fed.log.matches("^supervisord_unreachable")) == 1


def test_what_supervisord_said_long_ago_is_not_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    ledger.saw([Program("a", "a", "RUNNING", 7, 1700000000, 60)])
    assert ("supervisor_up", [], 1.0) in ledger.samples()
    monkeypatch.setattr(metrics, "STALE", 0.0)
    assert ("supervisor_up", [], 0.0) in ledger.samples()
    assert "supervisor_process_state" not in [metric for metric, _, _ in ledger.samples()]
    assert ("supervisor_healthcheck_restarts_total", ["a", "a"], 0.0) in ledger.samples()


def test_a_process_that_has_been_replaced_meanwhile_is_not_killed(flock: Supervisor) -> None:
    (a,) = ready(flock, "a")
    supervisord = Supervisord({"SUPERVISOR_SERVER_URL": f"unix://{flock.socket}"})
    seen = next(each for each in supervisord.programs() if each.name == "a")
    assert flock.ctl("restart", "a").returncode == 0
    assert not supervisord.kill(seen)
    now = again(flock, "a", a)
    seen = next(each for each in supervisord.programs() if each.name == "a")
    assert seen.pid == now
    assert supervisord.kill(seen)
    again(flock, "a", now)


def test_supervisord_may_want_a_password_and_tcp(supervise: Supervise) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    supervisor = supervise({"inet_http_server": {"port": address, "username": "u", "password": "p"}})
    reached = {"SUPERVISOR_SERVER_URL": f"http://{address}"}
    with Fed(supervisor, environment=reached) as fed:
        fed.log.wait_for("^supervisord_unreachable reason=.*401")
    with Fed(supervisor, environment={**reached, "SUPERVISOR_USERNAME": "u", "SUPERVISOR_PASSWORD": "p"}) as fed:
        assert fed.metrics()["supervisor_up"] == 1


@pytest.mark.parametrize(
    ("words", "environment", "status", "complaint"),
    [
        ([], {}, 2, "supervisord starts this, as an [eventlistener:…]: see deploy/supervisor/preforkd-listener.conf"),
        ([], {"SUPERVISOR_ENABLED": "1"}, 78, "supervisord cannot be asked anything: its file wants a [unix_http"),
        (
            ["--metrics", "udp://127.0.0.1:1"],
            {"SUPERVISOR_SERVER_URL": "unix:///x"},
            2,
            "--metrics udp://127.0.0.1:1: want",
        ),
        (["--grace", "5 minutes"], {}, 2, 'argument --grace: want a number or text such as "30s" or "2m", not'),
        (["--failures", "0"], {}, 2, "argument --failures: want at least 1, not '0'"),
        (["--program", "a"], {}, 2, "argument --program: want PROGRAM=DAEMON, not 'a'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words: list[str], environment: dict[str, str], status: int, complaint: str
) -> None:
    command = [sys.executable, "-m", "preforkd", "supervisor", "listener", *words]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=DEADLINE)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert complaint in ended.stderr.splitlines()[-1]


def test_without_supervisor_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['supervisor'] = None; from preforkd import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "supervisor", "listener"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.stderr == "preforkd: supervisor is not installed: pip install 'preforkd[supervisor]'\n"
    assert ended.returncode == 1


def test_as_shipped_it_looks_after_a_daemon_and_comes_back_itself(supervise: Supervise) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    section = shipped("preforkd-listener.conf")["eventlistener:preforkd"]
    command = str(section["command"]).split()
    assert command[:4] == ["preforkd", "supervisor", "listener", "--metrics"]
    ours = [sys.executable, "-m", *command[:4], f"tcp://127.0.0.1:{port}", "--grace", "1", "--timeout", "1"]
    supervisor = supervise({})
    log = supervisor.runtime / "listener.log"
    listener = {"eventlistener:preforkd": {**section, "command": " ".join(ours), "stderr_logfile": log}}
    supervisor.change({**program("a", startsecs=1), **listener})
    assert supervisor.ctl("update").returncode == 0
    (a,) = ready(supervisor, "a")
    said = supervisor.log("preforkd", "stderr")
    said.wait_for("^watched program=a ")
    with stopped(a):
        said.wait_for(f"^missed program=a pid={a} missed=1 ", deadline=40)
        said.wait_for(f"^restart program=a pid={a} ", deadline=40)
        again(supervisor, "a", a)

    def value(sample: str) -> float:
        return samples(scrape(f"http://127.0.0.1:{port}")).get(sample, -1.0)

    named = '{group="a",name="a"}'
    assert value(f"supervisor_healthcheck_restarts_total{named}") == 1
    # supervisord tells it by events what has become of that.
    eventually(lambda: value('supervisor_process_exits_total{expected="false",group="a",name="a"}') == 1)
    assert value('supervisor_process_state_changes_total{group="a",name="a",to="STARTING"}') >= 1

    os.kill(supervisor.pid("preforkd"), signal.SIGKILL)
    said.wait_for("^supervisord_reached ", times=2)
    assert value("supervisor_up") == 1
    assert supervisor.ctl("reload").returncode == 0
    said.wait_for("^supervisord_reached ", times=3, deadline=40)
    assert value("supervisor_up") == 1
    supervisor.until("preforkd", "RUNNING")
    assert "UNKNOWN state" not in supervisor.said.text
