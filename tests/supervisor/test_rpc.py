"""``supervisorctl workers · scale · roll · reload``, by the sections that we ship, in a real supervisord."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault

import pytest
from supervisor.options import UnhosedConfigParser

from preforkd.supervisor.loop import FORGOTTEN
from tests.daemon import DEADLINE, eventually, preforkctl
from tests.supervisor.conftest import Supervise
from tests.supervisor.daemon import DEPLOY, Sections, Supervisor, preforkd_serve, unused_port

TCP = ("--listen", "tcp://127.0.0.1:0")
QUICK = ("--set", "probation=0")


def ours() -> Sections:
    """The sections that we ship, as they are."""
    parser = UnhosedConfigParser()
    parser.read_string((DEPLOY / "preforkd-rpc.conf").read_text())
    return {section: dict(parser.items(section)) for section in parser.sections()}


def program(*words: object, **options: object) -> dict[str, object]:
    return {"command": preforkd_serve(*words), "redirect_stderr": "true", "stopwaitsecs": 10, **options}


def started(supervise: Supervise, *words: object, **others: Mapping[str, object]) -> Supervisor:
    """A supervisord with the program x, which is ready, and others that need not be."""
    programs = {f"program:{name}": options for name, options in others.items()}
    supervisor = supervise({**ours(), "program:x": program(*(words or (":Pid", *TCP, *QUICK))), **programs})
    supervisor.log("x").wait_for("^ready ")
    return supervisor


def done(supervisor: Supervisor, *words: object) -> str:
    """What supervisorctl prints. It must succeed."""
    result = supervisor.ctl(*words)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    return result.stdout


def refused(supervisor: Supervisor, *words: object, status: int = 1) -> str:
    """What supervisorctl complains of. It must fail."""
    result = supervisor.ctl(*words)
    assert (result.returncode, result.stderr) == (status, ""), result.stdout
    return result.stdout


def control(supervisor: Supervisor, name: str = "x") -> str:
    return supervisor.log(name).wait_for(r"^control path=(\S+)")[1]


@contextmanager
def asking(supervisor: Supervisor, method: str, *arguments: object) -> Iterator[Future[Any]]:
    """A call that goes on meanwhile, and what becomes of it."""

    def call() -> Any:
        with supervisor.rpc as rpc:
            return getattr(rpc.preforkd, method)(*arguments)

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def slowest(supervisor: Supervisor, calls: int = 40) -> float:
    """How long the slowest of other calls to supervisord takes, in seconds."""
    worst = 0.0
    with supervisor.rpc as rpc:
        for _ in range(calls):
            began = time.monotonic()
            rpc.supervisor.getAllProcessInfo()
            worst = max(worst, time.monotonic() - began)
    return worst


# What a stranger types, and reads.


def test_workers_shows_what_preforkctl_status_shows(supervise: Supervise) -> None:
    supervisor = started(supervise, ":Pid", *TCP, "--max-children", 2)
    head, *lines = done(supervisor, "workers", "x").splitlines()
    assert re.fullmatch(rf"x: Pid: preforkd \S+ on CPython \S+, pid {supervisor.pid('x')}, serving, up \S+", head)
    assert [line.split()[2:] for line in lines if line.startswith("Pid ")] == [["1", "2", "2", "0"]]
    workers = [line.split() for line in lines if line.startswith("Pid#")]
    assert [each[0] for each in workers] == ["Pid#0", "Pid#1"]
    assert all(each[3] == "idle" and each[7].endswith("M") for each in workers)


def test_scale_waits_until_they_are_there_and_needs_no_service_where_there_is_one(supervise: Supervise) -> None:
    supervisor = started(supervise)
    assert done(supervisor, "scale", "x", 6) == "x: Pid has 6 workers\n"
    assert len(supervisor.log("x").matches("^worker_ready ")) >= 6
    assert done(supervisor, "scale", "x", "Pid", 1).startswith("x: Pid has 1 worker")


def test_scale_where_there_are_two_services(supervise: Supervise, tmp_path: Path) -> None:
    service = 'target = "preforkd_workers.samples:Upper"\nlisten = ["tcp://127.0.0.1:0"]\nmax_children = 2\n'
    (tmp_path / "two.toml").write_text(f"[services.left]\n{service}[services.right]\n{service}")
    supervisor = started(supervise, "-c", tmp_path / "two.toml")
    assert done(supervisor, "scale", "x", "left", 3) == "x: left has 3 workers\n"
    assert refused(supervisor, "scale", "x", 3) == "x: ERROR (service: which? There are left, right)\n"
    assert refused(supervisor, "scale", "x", "up", 3) == "x: ERROR (no service 'up'; there are left, right)\n"


def test_roll_replaces_all_workers_and_not_the_master(supervise: Supervise) -> None:
    supervisor = started(supervise, ":Pid", *TCP, "--max-children", 2)
    log, master = supervisor.log("x"), supervisor.pid("x")
    before = {match[1] for match in log.matches(r"^worker_ready .* pid=(\d+)")}
    assert done(supervisor, "roll", "x").startswith("x: Pid has 2 workers")
    assert {log.wait_for(r"^worker_exit .* pid=(\d+) cause=drained", times)[1] for times in (1, 2)} == before
    assert supervisor.pid("x") == master
    assert not log.matches("gen=2")


def test_reload_waits_for_the_verdict(supervise: Supervise) -> None:
    supervisor = started(supervise)
    assert re.fullmatch(r"x: reloaded: generation 2 after \d+\.\d s\n", done(supervisor, "reload", "x"))
    assert supervisor.log("x").matches("^reload_done gen=2")


FRAGILE = "from preforkd_workers.samples import Upper\n"


def test_a_reload_that_is_rolled_back_fails_with_the_traceback(supervise: Supervise, tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    supervisor = started(supervise, "fragile.py:Upper", *TCP, *QUICK)
    # What XML cannot hold, what is not ASCII, and what XML and its escapes are made of.
    (tmp_path / "fragile.py").write_text('raise RuntimeError("<é> & \\x1b[1m\\0 \\ud800 ☃")\n', "utf-8")
    said = refused(supervisor, "reload", "x")
    assert said.startswith("x: ERROR: reload rolled back: services.Upper:\nTraceback (most recent call last):\n")
    assert f'File "{tmp_path}/fragile.py", line 1, in <module>\n' in said
    assert said.endswith(r"RuntimeError: <\xe9> & \x1b[1m\x00 \ud800 \u2603" + "\n")
    (service,) = [line.split() for line in done(supervisor, "workers", "x").splitlines() if line.startswith("Upper ")]
    assert service[2] == "1"
    (tmp_path / "fragile.py").write_text(FRAGILE)
    assert done(supervisor, "reload", "x").startswith("x: reloaded: generation 3 ")


def test_reload_alone_still_restarts_supervisord(supervise: Supervise) -> None:
    supervisor = started(supervise)
    before = supervisor.pid("x")
    assert done(supervisor, "reload") == "Restarted supervisord\n"
    eventually(lambda: supervisor.ctl("pid", "x").stdout.strip() not in ("0", "", str(before)), "x is started anew")
    eventually(lambda: supervisor.ctl("workers", "x").returncode == 0, "the new x is found")


def test_all_programs_of_a_group_one_after_the_other_until_one_fails(supervise: Supervise, tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    name = "--set", "name=y%(process_num)s"
    options = {"numprocs": 2, "process_name": "y_%(process_num)s"}
    supervisor = supervise({**ours(), "program:y": program("fragile.py:Upper", *TCP, *QUICK, *name, **options)})
    for each in ("y:y_0", "y:y_1"):
        supervisor.log(each).wait_for("^ready ")
    assert done(supervisor, "scale", "y:*", 5) == "y:y_0: Upper has 5 workers\ny:y_1: Upper has 5 workers\n"
    assert done(supervisor, "scale", "y:y_1", 6) == "y:y_1: Upper has 6 workers\n"
    heads = [line for line in done(supervisor, "workers", "y:*").splitlines() if " preforkd " in line]
    assert [head.split()[:2] for head in heads] == [["y:y_0:", "y0:"], ["y:y_1:", "y1:"]]
    hint = "the group has y:y_0, y:y_1, and y:* means all"
    assert refused(supervisor, "roll", "y") == f"y: ERROR (no such process; {hint})\n"
    (tmp_path / "fragile.py").write_text("this is no Python\n")
    said = refused(supervisor, "reload", "y:*")
    assert said.startswith("y:y_0: ERROR: reload rolled back: ")
    assert said.endswith("\ny:y_1: left as it is\n")
    assert not supervisor.log("y:y_1").matches("^command do=reload")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("workers", "Error: a process name is required"),
        ("scale x", "Error: want a process name and a number"),
        ("scale x 0", "Error: workers: want 1 to 4096, not 0"),
        ("scale x four", "Error: workers: want a whole number, not 'four'"),
        ("scale x 99999999999999999999", "Error: workers: want 1 to 4096, not 99999999999999999999"),
        ("scale x ²", "Error: workers: want a whole number, not '²'"),
        ("roll", "Error: want a process name, and perhaps a service"),
        ("roll x y z", "Error: want a process name, and perhaps a service"),
        ("reload x y z", "Error: want a process name, and perhaps a service"),
    ],
)
def test_wrong_words_are_told_from_the_right_ones(supervise: Supervise, words: str, complaint: str) -> None:
    supervisor = supervise(ours())
    first, usage = refused(supervisor, *words.split()).splitlines()
    assert first == complaint
    assert usage.startswith(f"{words.split()[0]} <name>")


def test_programs_that_cannot_be_asked(supervise: Supervise) -> None:
    off = {"command": "sleep 600", "autostart": "false"}
    supervisor = started(supervise, stranger={"command": "sleep 600"}, off=off)
    pid = supervisor.pid("stranger")
    for command in ("workers", "roll", "reload"):
        assert refused(supervisor, command, "nix") == "nix: ERROR (no such process)\n"
        assert refused(supervisor, command, "off", status=7) == "off: ERROR (not running)\n"
        reason = f"pid {pid} is no preforkd with a control socket, or has only just started"
        assert refused(supervisor, command, "stranger") == f"stranger: ERROR ({reason})\n"
    assert supervisor.pid("stranger") == pid
    assert refused(supervisor, "reload", "x", "up") == (
        "x: ERROR (reload refused: there is no service up; the settings name Pid)\n"
    )
    result = supervisor.ctl("workers", "nix", "x")
    assert result.returncode == 1
    assert "\nx: Pid: preforkd " in result.stdout


def test_whoever_points_to_the_control_socket_of_another_is_not_believed(supervise: Supervise, tmp_path: Path) -> None:
    """supervisord may be root, and a program somebody else's."""
    (tmp_path / "liar.py").write_text(
        "import os, sys\n"
        "os.symlink(sys.argv[1], 'liar')\n"
        "lock = open('liar.lock', 'w+')\n"
        "print(os.getpid(), file=lock, flush=True)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    supervisor = started(supervise)
    command = f"{sys.executable} liar.py {control(supervisor)}"
    supervisor.change({"program:liar": {"command": command, "directory": tmp_path}})
    done(supervisor, "update")
    supervisor.log("liar").wait_for("^ready")
    reason = f"no daemon at {tmp_path}/liar: pid {supervisor.pid('x')} is there, not {supervisor.pid('liar')}"
    assert refused(supervisor, "reload", "liar") == f"liar: ERROR ({reason})\n"
    assert not supervisor.log("x").matches("^command ")


def test_a_daemon_that_a_shell_has_started_is_found(supervise: Supervise) -> None:
    command = f"sh -c '{preforkd_serve(':Pid', *TCP)}; exit $?'"
    supervisor = supervise(
        {**ours(), "program:x": {"command": command, "stopasgroup": "true", "redirect_stderr": "true"}}
    )
    supervisor.log("x").wait_for("^ready ")
    assert done(supervisor, "scale", "x", 2).startswith("x: Pid has 2 workers")


def test_help_is_given_once_and_only_on_what_there_is(supervise: Supervise) -> None:
    supervisor = supervise(ours())
    assert done(supervisor, "help", "workers") == (
        "workers <name>\t\tShow the services, listeners and workers of a preforkd\n"
    )
    assert done(supervisor, "help", "reload").splitlines() == [
        "reload \t\tRestart the remote supervisord.",
        "reload <name> [<service>]\tHave a preforkd read settings and code anew; roll back if they fail",
    ]
    assert "No help" not in done(supervisor, "help", "stop")
    assert done(supervisor, "help", "nonsense") == "*** No help on nonsense\n"
    listed = done(supervisor, "help").partition("preforkd commands (type help <topic>):")[2]
    assert listed.split("\n", 2)[2].split() == ["reload", "roll", "scale", "workers"]


def test_the_interactive_supervisorctl_has_the_same_commands(supervise: Supervise) -> None:
    supervisor = started(supervise)
    before = supervisor.pid("x")
    lines = "scale x 2\nworkers x\nreload x\nscale x\nreload\nn\nquit\n"
    command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(supervisor.configuration)]
    result = subprocess.run(
        command, input=lines, env=supervisor.environment, capture_output=True, text=True, timeout=DEADLINE
    )
    assert (result.returncode, result.stderr) == (0, "")
    said = result.stdout.split("supervisor> ")
    assert said[1].startswith("x: Pid has 2 workers")
    assert said[2].startswith("x: Pid: preforkd ")
    assert said[3].startswith("x: reloaded: generation 2 ")
    assert said[4].startswith("Error: want a process name and a number\n")
    assert said[5].startswith("Really restart the remote supervisord process y/N?")
    assert supervisor.pid("x") == before


def test_the_interface_may_be_in_a_file_that_is_included(supervise: Supervise, tmp_path: Path) -> None:
    """But not the plugin: supervisorctl reads one file only, as the comment in ours says."""
    sections = ours()
    lines = (f"{key}={value}" for key, value in sections["rpcinterface:preforkd"].items())
    (tmp_path / "rpc.conf").write_text("\n".join(["[rpcinterface:preforkd]", *lines]))
    plugin = {"ctlplugin:preforkd": sections["ctlplugin:preforkd"]}
    supervisor = supervise({**plugin, "include": {"files": tmp_path / "rpc.conf"}, "program:x": program(":Pid", *TCP)})
    supervisor.log("x").wait_for("^ready ")
    assert done(supervisor, "workers", "x").startswith("x: Pid: ")


def test_a_supervisord_without_the_interface_is_told_from_a_program_that_is_none_of_ours(supervise: Supervise) -> None:
    plugin = {"ctlplugin:preforkd": ours()["ctlplugin:preforkd"]}
    supervisor = supervise({**plugin, "program:x": program(":Pid", *TCP)})
    assert refused(supervisor, "workers", "x") == (
        "x: ERROR (supervisord does not know preforkd: is [rpcinterface:preforkd] in its configuration file, "
        "and has it been restarted since?)\n"
    )


def test_what_other_programs_call(supervise: Supervise) -> None:
    """An answer is the daemon's own, as JSON; a fault says why there is none."""
    supervisor = started(supervise)
    with supervisor.rpc as rpc:
        assert json.loads(rpc.preforkd.workers("x"))["pid"] == supervisor.pid("x")
        assert json.loads(rpc.preforkd.scale("x", 2))["workers"] == {"Pid": 2}
        assert json.loads(rpc.preforkd.reload("x", "Pid"))["generation"] == 2
        calls = [{"methodName": "preforkd.scale", "params": ["x", each]} for each in (3, 5000, 1)]
        first, second, third = rpc.system.multicall(calls)
        assert [json.loads(each)["workers"] for each in (first, third)] == [{"Pid": 3}, {"Pid": 1}]
        assert second["faultString"] == "FAILED: workers: want 1 to 4096, not 5000"
        assert rpc.system.methodSignature("preforkd.scale") == ["string", "string", "int", "string"]
        ours = [name for name in rpc.system.listMethods() if name.startswith("preforkd.")]
        assert ours == ["preforkd.reload", "preforkd.roll", "preforkd.scale", "preforkd.workers"]
        for arguments, fault in (
            (("nix",), "BAD_NAME: nix"),
            (("x", "many"), "FAILED: workers: want a whole number, not 'many'"),
            (("x", True), "FAILED: workers: want a whole number, not True"),
        ):
            with pytest.raises(Fault) as raised:
                (rpc.preforkd.scale if arguments[1:] else rpc.preforkd.roll)(*arguments)
            assert raised.value.faultString == fault


def test_of_another_machine_memory_is_not_told(supervise: Supervise) -> None:
    port = unused_port()
    inet = {"inet_http_server": {"port": f"127.0.0.1:{port}"}}
    supervisor = supervise({**ours(), **inet, "program:x": program(":Pid", *TCP, "--max-children", 1)})
    supervisor.log("x").wait_for("^ready ")
    (worker,) = [
        line.split()
        for line in done(supervisor, "-s", f"http://127.0.0.1:{port}", "workers", "x").splitlines()
        if line.startswith("Pid#")
    ]
    assert worker[-1] == "-"


def test_what_is_no_option_of_theirs_is_a_fault(tmp_path: Path) -> None:
    for name, module in (("ctlplugin:preforkd", "supervisorctl"), ("rpcinterface:preforkd", "supervisord")):
        supervisor = Supervisor(tmp_path, {name: {**ours()[name], "patience": 3}})
        command = [sys.executable, "-m", f"supervisor.{module}", "-c", str(supervisor.configuration)]
        command += ["-n"] if module == "supervisord" else ["workers", "x"]
        result = subprocess.run(command, env=supervisor.environment, capture_output=True, text=True, timeout=DEADLINE)
        shutil.rmtree(supervisor.runtime)
        assert f"[{name}] has no option patience" in result.stdout + result.stderr
        assert result.returncode


# supervisord has one thread.

# Of a call: what it may take while a daemon does not answer, in seconds, where an idle machine needs a thousandth.
STALL = 1.0


def test_an_answer_wakes_supervisord_which_otherwise_looks_once_a_second(supervise: Supervise) -> None:
    supervisor = started(supervise)
    took = []
    with supervisor.rpc as rpc:
        for _ in range(20):
            began = time.monotonic()
            rpc.preforkd.workers("x")
            took.append(time.monotonic() - began)
    assert sorted(took)[10] < 0.5


def test_a_slow_reload_keeps_nobody_waiting(supervise: Supervise, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    os.mkfifo(hold)
    (tmp_path / "slow.py").write_text(FRAGILE)
    supervisor = started(supervise, "slow.py:Upper", *TCP, *QUICK)
    (tmp_path / "slow.py").write_text(f"{FRAGILE}open({str(hold)!r}).read()\n")
    with asking(supervisor, "reload", "x") as verdict:
        supervisor.log("x").wait_for("^command do=reload")
        assert slowest(supervisor) < STALL
        assert "\nnow: reload, molds for " in done(supervisor, "workers", "x")
        with asking(supervisor, "scale", "x", 2) as scaled:
            assert json.loads(scaled.result(DEADLINE))["workers"] == {"Upper": 2}
        assert not verdict.done()
        hold.write_text("")
        assert json.loads(verdict.result(DEADLINE))["generation"] == 2


def test_a_daemon_that_does_not_answer_costs_nobody_else_anything_and_the_call_ends(supervise: Supervise) -> None:
    supervisor = started(supervise, other=program(":Upper", *TCP))
    supervisor.log("other").wait_for("^ready ")
    pid, descriptors = supervisor.pid("x"), open_files(supervisor)
    os.kill(pid, signal.SIGSTOP)
    try:
        with asking(supervisor, "workers", "x") as status, asking(supervisor, "reload", "x") as verdict:
            eventually(lambda: connections(control(supervisor)) == 3, "both have asked, and the reload pings as well")
            assert slowest(supervisor) < STALL
            assert done(supervisor, "workers", "other")
            for call in (status, verdict):
                with pytest.raises(Fault, match=r"FAILED: no answer within 10 s: the daemon is stopped"):
                    call.result(DEADLINE)
        eventually(lambda: open_files(supervisor) <= descriptors, "nothing is left open")
        with crowded(control(supervisor)):
            assert refused(supervisor, "workers", "x") == (
                "x: ERROR (no answer: the daemon takes no connections any more, it is stopped or stuck)\n"
            )
    finally:
        os.kill(pid, signal.SIGCONT)


def connections(path: str) -> int:
    """How many have connected to this socket and not been hung up on."""
    return sum(line.endswith(f" {path}") for line in Path("/proc/net/unix").read_text().splitlines()) - 1


def open_files(supervisor: Supervisor) -> int:
    return len(os.listdir(f"/proc/{supervisor.process.pid}/fd"))


@contextmanager
def crowded(path: str) -> Iterator[None]:
    """As many who wait at this socket as there may be."""
    waiting = []
    try:
        while True:
            waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            try:
                waiting[-1].connect(path)
            except BlockingIOError:
                break
        yield
    finally:
        for each in waiting:
            each.close()


def test_what_nobody_waits_for_any_more_is_let_go_of(supervise: Supervise) -> None:
    supervisor = started(supervise, ":Pid", *TCP, "--set", "probation=60")
    descriptors = open_files(supervisor)
    command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(supervisor.configuration), "reload", "x"]
    client = subprocess.Popen(command, env=supervisor.environment, stdout=subprocess.DEVNULL)
    supervisor.log("x").wait_for("^worker_ready .* gen=2 ")
    assert connections(control(supervisor))
    client.kill()
    client.wait()
    eventually(lambda: not connections(control(supervisor)), "supervisord has hung up")
    eventually(lambda: open_files(supervisor) <= descriptors, "nothing is left open")


def test_a_daemon_that_dies_in_the_middle_ends_the_call(supervise: Supervise) -> None:
    supervisor = started(supervise, ":Pid", *TCP, "--set", "probation=60")
    with asking(supervisor, "reload", "x") as verdict:
        supervisor.log("x").wait_for("^worker_ready .* gen=2 ")
        os.kill(supervisor.pid("x"), signal.SIGKILL)
        with pytest.raises(Fault, match=r"FAILED: (no daemon at|it has hung up)"):
            verdict.result(DEADLINE)


def test_a_stop_ends_the_reload_that_is_waited_for(supervise: Supervise) -> None:
    supervisor = started(supervise, ":Pid", *TCP, "--set", "probation=60")
    with asking(supervisor, "reload", "x") as verdict:
        supervisor.log("x").wait_for("^worker_ready .* gen=2 ")
        done(supervisor, "stop", "x")
        with pytest.raises(Fault, match="FAILED: reload abandoned: the daemon is told to stop"):
            verdict.result(DEADLINE)


def test_a_supervisord_that_restarts_lets_go_of_everything_first(supervise: Supervise) -> None:
    """Of a daemon too that outlives it, because a shell has not passed on the signal."""
    command = f"sh -c '{preforkd_serve(':Pid', *TCP, '--set', 'probation=60')}; exit $?'"
    supervisor = supervise({**ours(), "program:x": {"command": command, "redirect_stderr": "true"}})
    log = supervisor.log("x")
    master = int(log.wait_for(r"^ready pid=(\d+)")[1])
    try:
        with asking(supervisor, "reload", "x") as verdict:
            log.wait_for("^worker_ready .* gen=2 ")
            supervisor.change({"program:x": {"autostart": "false"}})
            done(supervisor, "reload")
            with pytest.raises((Fault, OSError)):
                verdict.result(DEADLINE)
        supervisor.said.wait_for("supervisord started with pid", 2)
        with ExitStack() as stack:  # these have the numbers of descriptors that were ours
            others = [stack.enter_context(supervisor.rpc) for _ in range(12)]
            end = time.monotonic() + FORGOTTEN + 2
            while time.monotonic() < end:
                for other in others:
                    other.supervisor.getPID()
    finally:
        os.kill(master, signal.SIGTERM)
    assert not supervisor.said.matches("Traceback|uncaptured")


def test_a_reload_goes_on_over_an_upgrade(supervise: Supervise) -> None:
    supervisor = started(supervise)
    preforkctl("-s", control(supervisor), "upgrade", "--no-wait")
    said = done(supervisor, "reload", "x")
    assert re.fullmatch(r"x: reloaded(, by an upgrade)?: generation [23] after .* s\n", said)
    assert supervisor.log("x").matches("^upgraded ")
