"""preforkctl: every command against a real daemon, what it shows, and its exit status."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from preforkd import completion, ctl
from tests.conftest import TARGETS, Serve
from tests.daemon import DEADLINE, Daemon, Log, eventually, preforkctl
from tests.test_control import Client as ControlClient
from tests.test_hardship import limited
from tests.test_stop import Client, timeouts

TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0")
TWO = ("--max-children", "2")

COMPLETIONS = Path(__file__).parent.parent / "deploy" / "completions"


def done(daemon: Daemon, *words: object) -> str:
    """What it prints. It must succeed and complain of nothing."""
    result = daemon.ctl(*words)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


def refused(daemon: Daemon, *words: object) -> str:
    """What it complains of. It must fail and print nothing else."""
    result = daemon.ctl(*words)
    assert (result.returncode, result.stdout) == (1, ""), result.stdout
    return result.stderr


@contextmanager
def running(daemon: Daemon, *words: object) -> Iterator[tuple[subprocess.Popen[bytes], Log]]:
    """preforkctl while it runs, and what it prints."""
    command = [sys.executable, "-m", "preforkd.ctl", "-s", daemon.control, *map(str, words)]
    process = subprocess.Popen(command, env=daemon.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = Log(process.stdout)
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()
        said.close()


# What is told.


def test_ping_tells_who_answers(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    assert re.fullmatch(rf"Upper: preforkd \S+ on CPython 3\S+, pid {daemon.pid}\n", done(daemon, "ping"))


def test_status_shows_services_listeners_and_workers(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *TWO)
    with Client(daemon) as client:
        peer = "{}:{}".format(*client.socket.getsockname())
        shown = done(daemon, "status")
        assert client.ask(b"say still here") == b"still here\n"
    head, services, listeners, workers = (part.splitlines() for part in shown.split("\n\n"))
    assert re.fullmatch(rf"Obey: preforkd \S+ on CPython \S+, pid {daemon.pid}, serving, up \d+\.\ds", head[0])
    assert services[0].split() == ["SERVICE", "TARGET", "GEN", "WORKERS", "READY", "BUSY"]
    assert services[1].split() == ["Obey", f"{TARGETS}:Obey", "1", "2", "2", "1"]
    assert services[2].split() == ["metrics", "preforkd.exporter:Exporter", "1", "1", "1", "0"]
    assert listeners[0].split() == ["LISTENER", "SERVICE", "BACKLOG", "LIMIT", "DROPS"]
    assert listeners[1].split() == [daemon.url("Obey"), "Obey", "0", "1024", "0"]
    assert workers[0].split() == ["WORKER", "GEN", "PID", "STATE", "SINCE", "PEER", "REQUESTS", "MEMORY"]
    (busy,) = [line.split() for line in workers if " busy " in line]
    assert re.fullmatch(r"Obey#\d", busy[0])
    assert busy[1:4] == ["1", str(client.pid), "busy"]
    assert re.fullmatch(r"\d+\.\ds", busy[4])
    assert busy[5:7] == [peer, "0"]
    assert re.fullmatch(r"\d+\.\dM", busy[7])
    assert [line.split()[3:6:2] for line in workers if " idle " in line] == [["idle", "-"]] * 2
    columns = [match.start() for match in re.finditer(r"\S+", workers[0])]
    assert all(line[column - 1] == " " != line[column] for line in workers[1:] for column in columns[1:])


def test_status_shows_the_backlog_and_who_is_leaving(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as first, Client(daemon) as second:
        daemon.signal(signal.SIGTTOU)
        eventually(lambda: b"True\n" in (first.ask(b"draining"), second.ask(b"draining")))
        with daemon.connect():
            report = json.loads(done(daemon, "status", "--json"))
        (service,) = report["services"]
        assert (service["size"], service["listeners"][0]["backlog"]) == (1, 1)
        assert sorted(worker["state"] for worker in service["workers"]) == ["busy", "draining"]
        assert {worker["pid"] for worker in service["workers"]} == {first.pid, second.pid}
        assert all(worker["memory"] > 1 << 20 and ":" in worker["peer"] for worker in service["workers"])


def test_status_tells_how_far_a_reload_is(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, "--set", "probation=60")
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("^worker_ready .* gen=2 ")
    assert re.search(r"^now: reload, probation for \d+\.\ds, generation 2$", done(daemon, "status"), re.MULTILINE)
    report = json.loads(done(daemon, "status", "--json"))
    assert report["now"] | {"seconds": 0} == {"what": "reload", "phase": "probation", "seconds": 0, "generation": 2}


def test_a_daemon_that_does_not_turn_its_loop_is_not_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    path = daemon.control
    monkeypatch.setattr(ctl, "PATIENCE", 1.0)
    daemon.signal(signal.SIGSTOP)
    try:
        assert ctl.main(["-s", path, "reload"]) == 1
    finally:
        daemon.signal(signal.SIGCONT)
    assert "no answer within 1 s" in capsys.readouterr().err


def test_status_tells_starting_and_stopping(serve: Serve, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    os.mkfifo(hold)
    (tmp_path / "slow.py").write_text(f"from tests.targets import Obey\nopen({str(hold)!r}).read()\n")
    root = str(Path(__file__).parent.parent)
    paths = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    daemon = serve("slow:Obey", *TCP, *TWO, ready=False, environment=paths)
    assert json.loads(done(daemon, "status", "--json"))["state"] == "starting"
    assert "not ready yet" in refused(daemon, "drain")
    hold.write_text("")
    daemon.ready()
    with Client(daemon):
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("^stopping")
        report = json.loads(done(daemon, "status", "--json"))
        assert report["state"] == "stopping"
        assert "draining" in [worker["state"] for worker in report["services"][0]["workers"]]
        assert "stopping" in refused(daemon, "scale", "Obey", 3)
        assert "stopping" in refused(daemon, "drain")
        assert "stopping" in refused(daemon, "refill")


def test_events_are_those_of_the_log_with_their_time(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP)
    lines = [re.sub(r" at=\S+", "", line) for line in done(daemon, "events").splitlines()]
    logged = [re.sub(r" at=\S+", "", line) for line in daemon.log.lines]
    assert lines == logged[: len(lines)]
    assert any(line.startswith("ready pid=") for line in lines)
    records = [json.loads(line) for line in done(daemon, "events", "--json").splitlines()]
    (ready,) = [record for record in records if record["event"] == "ready"]
    assert ready["workers"] == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ready["at"])


def test_events_can_be_followed_and_the_last_1000_are_kept(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    with running(daemon, "events", "--follow") as (_, said):
        said.wait_for("^ready ")
        os.kill(daemon.workers()[0], signal.SIGKILL)
        said.wait_for("^worker_exit .* cause=crash signal=SIGKILL")
    with ControlClient(daemon.control) as client:
        for _ in range(600):
            client.ask("scale", service="Upper", workers=1, wait=False)  # two events each
    assert len(done(daemon, "events").splitlines()) == 1000


def test_stacks_of_one_worker_or_of_all(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *TWO)
    with Client(daemon) as client:
        client.socket.sendall(b"spin\n")
        assert client.answers.readline() == b"spinning\n"
        report = json.loads(done(daemon, "status", "--json"))
        (slot,) = [each["slot"] for each in report["services"][0]["workers"] if each["busy"]]
        shown = done(daemon, "stacks", f"Obey#{slot}")
        assert re.search(rf'^Obey#{slot}\|   File ".*targets.py", line \d+ in obey$', shown, re.MULTILINE)
        assert all(line.startswith(f"Obey#{slot}| ") for line in shown.splitlines())
        assert done(daemon, "stacks", slot).startswith(shown.splitlines()[0])
        assert shown.splitlines()[0] in daemon.log.lines
        everybody = done(daemon, "stacks")
        assert set(re.findall(r"^(\S+)\| Stack", everybody, re.MULTILINE)) == {"Obey#0", "Obey#1", "metrics#0"}
        done(daemon, "stop", "--now")


def test_stacks_tells_who_has_not_answered(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    (stopped,) = [worker for worker in daemon.workers() if b"#0" in Path(f"/proc/{worker}/cmdline").read_bytes()]
    os.kill(stopped, signal.SIGSTOP)
    answer = [json.loads(line) for line in done(daemon, "stacks", "--json").splitlines()]
    os.kill(stopped, signal.SIGCONT)
    assert answer[-1] == {"silent": ["Upper#0"]}
    assert {each["of"] for each in answer[:-1]} == {"Upper#1"}


def test_stacks_waits_for_who_is_slow(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    (stopped,) = [worker for worker in daemon.workers() if b"#0" in Path(f"/proc/{worker}/cmdline").read_bytes()]
    os.kill(stopped, signal.SIGSTOP)
    with ControlClient(daemon.control) as client:
        client.send({"v": 1, "do": "stacks"})
        assert client.hear()["of"] == "Upper#1"
        os.kill(stopped, signal.SIGCONT)
        while (said := client.hear()).get("of") != "Upper#0":
            assert "event" in said
        while "event" in (said := client.hear()):
            pass
        assert said == {"ok": True, "silent": []}


# What is changed.


def test_scale_waits_until_the_pool_is_full(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    assert done(daemon, "scale", "Upper", 5) == "scale: done workers=Upper:5 draining=0\n"
    assert len(daemon.workers()) == 5
    assert done(daemon, "scale", "Upper", 5)
    done(daemon, "scale", "Upper", 1)
    eventually(lambda: len(daemon.workers()) == 1)
    assert daemon.log.matches("^resized service=Upper workers=1 before=5")
    assert daemon.log.matches(r"^command do=scale service=Upper workers=1 wait=True uid=\d+ client=\d+")


def test_scale_down_does_not_wait_for_long_conversations_but_tells_of_them(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as first, Client(daemon) as second:
        assert done(daemon, "scale", "Obey", 1) == "scale: done workers=Obey:1 draining=1\n"
        assert first.ask(b"say a") == b"a\n"
        assert second.ask(b"say b") == b"b\n"


def test_scale_says_why_workers_cannot_start(serve: Serve, tmp_path: Path) -> None:
    target = tmp_path / "fragile.py"
    shutil.copy(TARGETS, target)
    daemon = serve("fragile.py:Upper", *TCP, *TWO, "--set", "preload=false")
    target.write_text("this is no Python\n")
    complaint = refused(daemon, "scale", "Upper", 3)
    assert complaint.startswith("Upper: its target could not be started; it goes on trying\n")
    assert "this is no Python" in complaint
    assert complaint.rstrip().endswith("SyntaxError: invalid syntax")
    assert len(daemon.workers()) == 2
    assert daemon.ask(b"a\n") == b"A\n"


def test_scale_has_a_deadline_and_says_what_the_system_refused(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO, "--set", "boot_timeout=1s")
    with ControlClient(daemon.control) as client:
        assert client.ask("ping")["ok"]
        with limited(daemon.pid, resource.RLIMIT_NOFILE, 3):
            answer = client.ask("scale", service="Upper", workers=4)
        assert answer["error"] == "after 1 s Upper has 2 of 4 workers (Too many open files); it goes on trying"
        eventually(lambda: len(daemon.workers()) == 4)


def test_who_asks_for_a_size_is_told_when_somebody_else_asks_for_another(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    with ControlClient(daemon.control) as client, ControlClient(daemon.control) as other:
        assert client.ask("ping")["ok"]
        assert other.ask("ping")["ok"]
        with limited(daemon.pid, resource.RLIMIT_NOFILE, 3):
            client.send({"v": 1, "do": "scale", "service": "Upper", "workers": 4})
            daemon.log.wait_for("^spawn_refused ")
            other.send({"v": 1, "do": "scale", "service": "Upper", "workers": 2})
            assert "meanwhile somebody else" in client.hear()["error"]
            assert other.hear()["ok"]


def test_scale_of_what_is_not_there(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    assert refused(daemon, "scale", "Lower", 3) == "preforkctl: no service 'Lower'; there are Upper\n"
    assert refused(daemon, "scale", "metrics", 3) == "preforkctl: no service 'metrics'; there are Upper\n"
    assert "there is no service Lower; the settings name Upper" in refused(daemon, "reload", "Lower")


def test_drain_waits_until_all_have_left_and_refill_until_all_are_back(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *TWO)
    with Client(daemon) as client, running(daemon, "drain") as (process, said), ControlClient(daemon.control) as other:
        daemon.log.wait_for("^draining")
        other.send({"v": 1, "do": "drain"})
        eventually(lambda: len(daemon.workers()) == 1)
        done(daemon, "ping")
        other.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.socket.recv(1)
        other.socket.settimeout(DEADLINE)
        client.close()
        assert other.hear() == {"ok": True}
        said.wait_for("^drain: done")
        assert process.wait(DEADLINE) == 0
    assert daemon.workers() == []
    assert daemon.metrics()['preforkd_workers_max{service="Obey"}'] == 0
    assert json.loads(done(daemon, "status", "--json"))["state"] == "drained"
    assert "refill first" in refused(daemon, "scale", "Obey", 3)
    with daemon.connect() as waiting:
        waiting.sendall(b"say patience\n")
        assert done(daemon, "refill") == "refill: done workers=Obey:2 draining=0\n"
        assert len(daemon.workers("Obey")) == 2
        assert waiting.recv(100) == b"patience\n"
    assert "not drained" in refused(daemon, "refill")


def test_who_waits_for_a_drain_is_told_of_a_refill(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon), ControlClient(daemon.control) as client:
        client.send({"v": 1, "do": "drain"})
        daemon.log.wait_for("^draining")
        done(daemon, "refill", "--no-wait")
        assert "asked to refill" in client.hear()["error"]


def test_kill_ends_one_worker_with_its_stacks_and_it_is_replaced(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *METRICS, *TWO)
    with Client(daemon) as client:
        assert client.ask(b"say here") == b"here\n"
        report = json.loads(done(daemon, "status", "--json"))
        (slot,) = [each["slot"] for each in report["services"][0]["workers"] if each["busy"]]
        assert done(daemon, "kill", slot) == f"kill: done pid={client.pid}\n"
        assert client.rest() == b""
        daemon.log.wait_for(rf"^worker_exit .* pid={client.pid} cause=operator signal=SIGABRT")
    eventually(lambda: len(daemon.workers("Obey")) == 2)
    assert daemon.metrics()['preforkd_worker_exits_total{reason="operator",service="Obey"}'] == 1
    assert "Obey has no worker in slot 7; there are " in refused(daemon, "kill", "Obey#7")
    assert "no service 'Lower'" in refused(daemon, "kill", "Lower#0")
    assert "want a worker, as service#3" in refused(daemon, "kill", "Obey#x")


def test_a_bare_slot_needs_a_single_service(serve: Serve, tmp_path: Path) -> None:
    services = "".join(
        f'[services.{name}]\ntarget = "{TARGETS}:Upper"\nlisten = ["tcp://127.0.0.1:0"]\nmax_children = 1\n'
        for name in ("one", "two")
    )
    (tmp_path / "both.toml").write_text(services)
    daemon = serve("-c", "both.toml")
    assert "want a worker, as service#3" in refused(daemon, "kill", "0")
    assert done(daemon, "kill", "two#0")
    assert daemon.log.matches("^worker_exit service=two slot=0 .* cause=operator")


def test_a_worker_that_ignores_the_first_signal_is_killed_by_the_second(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, "--max-children", "1")
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGSTOP)
    assert done(daemon, "kill", 0) == f"kill: done pid={worker}\n"
    assert daemon.log.matches(rf"^worker_exit .* pid={worker} cause=operator signal=SIGKILL")


def test_stop_waits_until_the_daemon_is_gone(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client, running(daemon, "stop") as (process, said):
        said.wait_for("^stopping")
        eventually(lambda: client.ask(b"draining") == b"True\n")
        assert process.poll() is None
        client.close()
        assert process.wait(DEADLINE) == 0
        assert daemon.process.poll() == 0
    assert daemon.log.matches("^stopping haste=none")


def test_stop_now_kills_and_stop_without_waiting_returns_at_once(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO, *timeouts(3600, 3600))
    with Client(daemon):
        assert done(daemon, "stop", "--no-wait") == "stop: done\n"
        done(daemon, "stop", "--no-wait")  # of which nothing is hurried, unlike by a second SIGTERM
        assert daemon.process.poll() is None
        done(daemon, "stop", "--now")
        assert daemon.process.poll() == 0
    assert [match.string.split()[1] for match in daemon.log.matches("^stopping ")] == ["haste=none"] * 2 + [
        "haste=kill"
    ]


# Exit statuses, and which daemon is meant.


def test_no_daemon_is_status_3(tmp_path: Path) -> None:
    missing = preforkctl("-s", tmp_path / "x.sock", "ping")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert missing.stderr == f"preforkctl: no daemon at {tmp_path}/x.sock: No such file or directory\n"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "x.sock"))
    assert preforkctl("-s", tmp_path / "x.sock", "ping").returncode == 3
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    assert preforkctl("mail", "ping", environment=environment).returncode == 3


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("relaod",),
        ("scale", "Upper"),
        ("scale", "Upper", "0"),
        ("scale", "Upper", "many"),
        ("-s", "/x", "mail", "ping"),
        ("ping", "--loudly"),
    ],
)
def test_wrong_usage_is_status_2(words: tuple[str, ...]) -> None:
    result = preforkctl(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: preforkctl")


def test_a_socket_that_may_not_be_opened_is_status_1(tmp_path: Path) -> None:
    (tmp_path / "x.sock").write_text("no socket")
    result = preforkctl("-s", tmp_path / "x.sock", "ping")
    assert (result.returncode, result.stdout) in ((1, ""), (3, ""))
    assert result.stderr.count("\n") == 1


def test_the_daemon_may_be_named_or_be_the_only_one(serve: Serve) -> None:
    first = serve(":Upper", *TCP, *TWO, "--set", "name=mail")
    shared = {"XDG_RUNTIME_DIR": first.runtime}
    environment = first.environment
    alone = preforkctl("ping", environment=environment)
    assert (alone.returncode, alone.stdout[:5]) == (0, "mail:"), alone.stderr
    second = serve(":Upper", *TCP, *TWO, "--set", "name=web", environment=shared)
    assert preforkctl("web", "ping", environment=environment).stdout.startswith("web:")
    assert preforkctl("mail", "ping", environment=environment).stdout.startswith("mail:")
    which = preforkctl("ping", environment=environment)
    assert which.returncode == 2
    assert which.stderr.endswith("which daemon? There are mail, web\n")
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    assert preforkctl("ping", environment=environment).stdout.startswith(
        "mail:"
    )  # what is left of the other is no daemon
    given = {**environment, "PREFORKD_CONTROL": first.control, "XDG_RUNTIME_DIR": "/nowhere"}
    assert preforkctl("ping", environment=given).returncode == 0


def test_only_status_loads_what_is_heavy() -> None:
    code = "import sys, preforkd.ctl; print({'psutil', 'asyncio', 'subprocess'} & set(sys.modules) or '')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE).stdout == "\n"


# Answers that only a peer of our own can give.


@contextmanager
def answering(path: Path, *answers: Callable[[dict[str, object]], list[bytes]]) -> Iterator[list[object]]:
    """A daemon of which nothing is real but the socket: each connection asks once, beside pings, and gets these."""
    asked: list[object] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(DEADLINE)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as lines:
                    for line in lines:
                        request = json.loads(line)
                        if request["do"] == "ping":
                            connection.sendall(b'{"v": 1, "ok": true}\n')
                            continue
                        asked.append(request["do"])
                        connection.sendall(b"".join(answer(request)))
                        break
            listener.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_an_upgrade_that_cuts_the_connection_is_asked_after(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    told = b'{"v": 1, "event": "preflight", "python": "3.13"}\n'
    good = b'{"v": 1, "ok": true, "version": "0.2.0", "before": "0.1.0"}\n'
    bad = b'{"v": 1, "ok": false, "error": "rolled back"}\n'
    with answering(path, lambda _: [told], lambda _: [], lambda _: [good]) as asked:
        result = preforkctl("-s", path, "upgrade")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "preflight python=3.13\noutcome: done version=0.2.0 before=0.1.0\n"
    assert asked == ["upgrade", "outcome", "outcome"]
    path.unlink()
    with answering(path, lambda _: [], lambda _: [bad]):
        result = preforkctl("-s", path, "upgrade")
    assert (result.returncode, result.stderr) == (1, "preforkctl: rolled back\n")
    path.unlink()
    with answering(path, lambda _: []):  # and is gone
        result = preforkctl("-s", path, "upgrade")
    assert result.returncode == 1
    assert result.stderr.startswith("preforkctl: the daemon has gone in the middle of the upgrade: ")
    path.unlink()
    with answering(path, lambda _: [], lambda _: [b'{"v": 1, "ok": true, "result": "none yet"}\n']):
        result = preforkctl("-s", path, "upgrade")
    assert result.returncode == 1
    assert "preforkctl: another daemon has been started in the middle of the upgrade" in result.stderr


def test_a_daemon_that_hangs_up_has_not_done_what_was_asked(tmp_path: Path) -> None:
    with answering(tmp_path / "x.sock", lambda _: [b'{"v": 1, "ev']):
        result = preforkctl("-s", tmp_path / "x.sock", "scale", "x", 1)
    assert (result.returncode, result.stderr) == (1, "preforkctl: the daemon has hung up before it answered\n")


def test_a_traceback_is_shown_as_it_is(tmp_path: Path) -> None:
    text = 'Traceback (most recent call last):\n  File "x.py", line 1\nSyntaxError: invalid syntax'
    line = json.dumps({"v": 1, "ok": False, "error": text}).encode() + b"\n"
    with answering(tmp_path / "x.sock", lambda _: [line]):
        result = preforkctl("-s", tmp_path / "x.sock", "reload")
    assert (result.returncode, result.stderr) == (1, f"{text}\n")


def test_a_daemon_that_is_stopped_is_given_up_on(serve: Serve) -> None:
    daemon = serve(":Upper", *TCP, *TWO)
    daemon.signal(signal.SIGSTOP)
    complaint = refused(daemon, "ping")
    daemon.signal(signal.SIGCONT)
    assert complaint == f"preforkctl: {daemon.control}: no answer within 10 s\n"


# Completion.


@pytest.mark.parametrize(("shell", "file"), [("bash", "preforkctl.bash"), ("zsh", "_preforkctl")])
def test_the_completion_is_made_from_the_table(shell: str, file: str) -> None:
    """``python -m preforkd.ctl --completion SHELL`` writes it anew."""
    assert (COMPLETIONS / file).read_text() == completion.SHELLS[shell]()
    assert preforkctl("--completion", shell).stdout == completion.SHELLS[shell]()


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("rel", "reload"),
        ("mail rel", "reload"),
        ("stop --no", "--now"),
        ("scale echo 3 --no", "--no-wait"),
        ("events --f", "--follow"),
        ("-s /x sta", "stacks|status"),
        ("-s /us", "/usr"),
    ],
)
def test_bash_completes(typed: str, wanted: str) -> None:
    words = f"preforkctl {typed}".split()
    script = '. "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _preforkctl; printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "--norc", "-c", script, str(COMPLETIONS / "preforkctl.bash"), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert result.stderr == ""
    assert set(wanted.split("|")) <= set(result.stdout.split())
    assert len(result.stdout.split()) <= 2


BASH = (["bash", "--norc", "--noprofile", "-i"], f'. "{COMPLETIONS}/preforkctl.bash"')
ZSH = (["zsh", "-f", "-i"], f'fpath=("{COMPLETIONS}" $fpath); autoload -Uz compinit; compinit -u -D')


@pytest.mark.parametrize(
    ("shell", "load"),
    [
        pytest.param(*BASH, id="bash"),
        pytest.param(*ZSH, id="zsh", marks=pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")),
    ],
)
def test_a_shell_completes_at_the_tab_key(shell: list[str], load: str) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(shell, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as terminal:

        def see(mark: bytes) -> None:
            said = b""
            while mark not in said:
                said += terminal.read(4096)

        try:
            os.write(ours, f"{load}; preforkctl() {{ echo ran:$*:; }}; echo load''ed\n".encode())
            see(b"loaded")
            for typed, completed in (("rel", "reload"), ("mail rel", "mail reload"), ("events --f", "events --follow")):
                os.write(ours, f"preforkctl {typed}\t\n".encode())
                see(f"ran:{completed}:".encode())
        finally:
            process.kill()
            process.wait()
