"""Reload as a transaction: new code and settings serve, or the old ones go on as if nothing had been."""

import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, eventually, kill
from tests.site import Site, Talk, free_port, udp

METRICS = 'metrics = "tcp://127.0.0.1:0"'
ONE = 'max_children = 1\nprobation = "0s"'
TWO = 'max_children = 2\nprobation = "0s"'
TRIED = 'max_children = 2\nprobation = "60s"\nprobation_requests = 5'


@pytest.fixture
def site(tmp_path: Path, serve: Serve) -> Site:
    return Site(tmp_path, serve)


@pytest.fixture
def talks() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# What a good reload does.


def test_a_reload_serves_the_code_that_has_changed_and_leaves_nobody_of_the_old(site: Site) -> None:
    site.start(TWO)
    old = site.daemon.workers()
    assert site.versions() == {"one"}
    site.write("two")
    assert "gen=2" in site.reload()
    assert site.versions() == {"two"}
    eventually(lambda: not set(old) & set(site.daemon.alive()))
    eventually(lambda: len(site.daemon.titled("mold app gen=2")) == 1)
    eventually(lambda: not site.daemon.titled("mold app gen=1"))


@pytest.mark.parametrize("text", ["preload = false", "max_surge = 0\nmax_unavailable = 1", "max_surge = 3", ""])
@pytest.mark.parametrize("probation", ["0s", "200ms"])
def test_every_budget_every_kind_of_import_and_probation_or_not(site: Site, text: str, probation: str) -> None:
    text = f'{text}\nprobation = "{probation}"\nmax_children = 3'
    site.start(text)
    for version in ("two", "three"):
        site.write(version)
        site.reload()
        assert site.versions() == {version}
        eventually(lambda: len(site.daemon.workers()) == 3)


def test_many_reloads_leave_no_descriptor_and_no_process_behind(site: Site) -> None:
    site.start(TWO, METRICS)
    site.reload()

    def family() -> int:
        return len(site.daemon.family())

    eventually(lambda: family() == 5)  # two workers and the exporter, and their two molds
    descriptors = site.daemon.descriptors()
    for number in range(20):
        if number % 4 == 3:
            site.write("broken", "import no_such_module")
            site.reload("rolled_back")
        else:
            site.write(f"v{number}")
            site.reload()
    eventually(lambda: family() == 5)
    assert site.daemon.descriptors() == descriptors
    counted = site.daemon.metrics()
    assert counted['preforkd_reloads_total{result="done"}'] == 16
    assert counted['preforkd_reloads_total{result="rolled_back"}'] == 5
    assert counted['preforkd_reloads_total{result="refused"}'] == 0
    assert counted["preforkd_last_reload_success_timestamp_seconds"] > 1.6e9
    assert 0 < counted["preforkd_reload_duration_seconds"] < DEADLINE
    assert counted['preforkd_workers{service="app",state="draining"}'] == 0


def test_a_conversation_keeps_its_generation_and_its_worker_leaves_when_it_ends(site: Site) -> None:
    site.start(TWO)
    with Talk(site.daemon) as talk:
        site.write("two")
        site.reload()
        assert talk.ask("version") == "one"
        assert site.versions() == {"two"}
    exit_line = site.daemon.log.wait_for(rf"^worker_exit .*pid={talk.pid} ")[0]
    assert site.daemon.log.matches(rf"^worker_exit .*pid={talk.pid} cause=drained "), exit_line


def test_old_workers_say_how_they_went(site: Site) -> None:
    site.start('max_children = 3\nprobation = "0s"\ngraceful_timeout = "1s"\neof_timeout = "1s"')
    with Talk(site.daemon) as drained, Talk(site.daemon) as waiting, Talk(site.daemon) as stuck:
        assert waiting.ask("until_eof") == stuck.ask("forever") == "waiting"
        site.reload()
        drained.close()
        for talk, cause in ((drained, "drained"), (waiting, "eof"), (stuck, "deadline")):
            site.daemon.log.wait_for(rf"^worker_exit .*pid={talk.pid} cause={cause} ")


def test_the_oldest_of_too_many_generations_is_hurried_and_the_others_are_not(site: Site, talks: ExitStack) -> None:
    site.start(TWO, "max_old_generations = 2")
    old = []
    for _ in range(3):
        talk = talks.enter_context(Talk(site.daemon))
        assert talk.ask("until_eof") == "waiting"
        old.append(talk)
        site.reload()
    site.daemon.log.wait_for(rf"^end_of_file .*gen=1 pid={old[0].pid}\b")
    assert old[0].answers.readline() == b"eof\n"
    site.daemon.log.wait_for(rf"^worker_exit .*pid={old[0].pid}\b")
    assert len(site.daemon.log.matches("^end_of_file")) == 1


def test_what_fails_again_and_again_does_not_pile_up_either_nor_is_the_serving_generation_cut(
    site: Site, talks: ExitStack
) -> None:
    site.start(TRIED, "max_old_generations = 2")
    first = talks.enter_context(Talk(site.daemon))
    assert first.ask("until_eof") == "waiting"
    tried: list[Talk] = []
    for _ in range(3):
        site.hup()
        site.daemon.log.wait_for("^reload .*phase=probation", len(tried) + 1)
        site.daemon.log.wait_for(rf"^worker_ready .*gen={len(tried) + 2}\b")
        while True:
            talk = talks.enter_context(Talk(site.daemon))
            if site.daemon.log.matches(rf"^worker_ready .*gen={len(tried) + 2} pid={talk.pid}\b"):
                break
            talk.close()
        assert talk.ask("until_eof") == "waiting"
        tried.append(talk)
        kill(int(site.daemon.log.wait_for(rf"^mold_ready .*gen={len(tried) + 1} pid=(\d+)")[1]))
        site.ended("rolled_back")
    site.daemon.log.wait_for(rf"^end_of_file .*pid={tried[0].pid}\b")
    assert [match[1] for match in site.daemon.log.matches(r"^end_of_file .*pid=(\d+)")] == [str(tried[0].pid)]
    site.settings('max_children = 2\nprobation = "0s"', "max_old_generations = 2")
    site.reload()  # three are leaving now: the second and the third that were tried, and those who served
    site.daemon.log.wait_for(rf"^end_of_file .*pid={tried[1].pid}\b")
    assert not site.daemon.log.matches(rf"^end_of_file .*pid={first.pid}\b")


# Sizes, time-outs, and what an operator has said of them.


@pytest.mark.parametrize("size", [1, 6])
def test_the_size_of_a_pool_follows_its_settings(site: Site, size: int) -> None:
    site.start('max_children = 3\nprobation = "0s"')
    site.settings(f'max_children = {size}\nprobation = "0s"')
    site.reload()
    eventually(lambda: len(site.daemon.workers()) == size)


@pytest.mark.parametrize(("size", "after"), [(2, 3), (4, 4)])
def test_a_size_that_an_operator_has_set_stays_unless_the_settings_say_another(
    site: Site, size: int, after: int
) -> None:
    site.start(TWO)
    site.daemon.signal(signal.SIGTTIN)
    eventually(lambda: len(site.daemon.workers()) == 3)
    site.settings(f'max_children = {size}\nprobation = "0s"')
    site.reload()
    eventually(lambda: len(site.daemon.workers()) == after)


def test_a_boot_timeout_that_is_longer_holds_for_the_worker_on_probation(site: Site) -> None:
    site.start('max_children = 1\npreload = false\nboot_timeout = "4s"')
    site.write("two", "import time; time.sleep(5)")
    site.settings('max_children = 1\npreload = false\nboot_timeout = "30s"\nprobation = "100ms"')
    site.reload()
    assert site.versions(2) == {"two"}


# Settings that cannot be.


def test_settings_with_faults_are_refused_with_every_fault_and_nothing_has_changed(site: Site) -> None:
    site.start(TWO, METRICS)
    eventually(lambda: len(site.daemon.family()) == 5, "two molds, three workers, and nobody any more in the middle")
    before = site.daemon.family()
    site.settings('max_children = 0\nprobbation = "0s"\nboot_timeout = "x"')
    assert "phase=settings" in site.reload("refused")
    for fault in ("max_children: at least 1", "did you mean probation", "boot_timeout: "):
        assert site.daemon.log.matches(rf"^reload\| .*{fault}"), site.daemon.log.text
    assert site.daemon.family() == before
    assert site.daemon.metrics()['preforkd_reloads_total{result="refused"}'] == 1


@pytest.mark.parametrize(
    ("text", "daemon", "named"),
    [
        ("allow_reuse_port = true", "", "services.app.allow_reuse_port"),
        ("allow_reuse_address = false", "", "services.app.allow_reuse_address"),
        ("", 'name = "other"', "name"),
        ("", "ready_fd = 7", "ready_fd"),
        ("", 'control = "/nowhere/else"', "control"),
    ],
)
def test_what_needs_a_restart_is_refused_by_name(site: Site, text: str, daemon: str, named: str) -> None:
    site.start()
    site.settings(text, daemon)
    assert f"{named}: changed, which a reload cannot bring into effect; needs a restart" in site.reload("refused")


@pytest.mark.parametrize("gone", ["settings", "unreadable"])
def test_a_file_of_settings_that_is_gone_or_rubbish_is_refused(site: Site, gone: str) -> None:
    site.start(TWO)
    path = site.directory / "preforkd.toml"
    path.write_bytes(b"\xff = [") if gone == "unreadable" else path.unlink()
    assert "preforkd.toml" in site.reload("refused")
    assert site.versions(2) == {"one"}


# A mold that fails: the old generation is not touched.

BROKEN = {
    "syntax": ("def", "SyntaxError: "),
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "name": ("del Handler", "Handler"),
    "raise": ("raise ValueError('as told')", "ValueError: as told"),
    "hang": ("time.sleep(60)", "the import of app.py:Handler took longer than boot_timeout"),
    "os_exit": ("os._exit(3)", "the import ended the process (status 3)"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "kill": ("os.kill(os.getpid(), 9)", "the import ended the process (signal SIGKILL)"),
}


@pytest.mark.parametrize("preload", ["true", "false"])
@pytest.mark.parametrize("how", BROKEN)
def test_code_that_is_broken_leaves_the_old_code_serving(site: Site, how: str, preload: str) -> None:
    code, said = BROKEN[how]
    site.start(f'max_children = 2\nboot_timeout = "4s"\npreload = {preload}')
    old = site.daemon.workers()
    site.write("broken", code)
    line = site.reload("rolled_back")
    assert f"phase={'molds' if preload == 'true' else 'probation'}" in line
    if preload == "true" or how not in ("hang", "os_exit", "kill"):
        assert said in site.daemon.log.text, site.daemon.log.text
    assert site.daemon.workers() == old
    assert site.versions(4) == {"one"}
    eventually(lambda: len(site.daemon.titled("mold app")) == 1)
    site.write("three")
    site.settings(TWO)
    site.reload()
    assert site.versions(4) == {"three"}


def test_the_old_generation_is_at_full_strength_from_the_old_mold_when_its_files_are_gone(site: Site) -> None:
    site.start(TRIED)
    (site.directory / "app.py").unlink()
    site.reload("rolled_back")
    for _ in range(2):
        old = site.daemon.workers()
        kill(old[0])
        eventually(lambda old=old: len(set(site.daemon.workers()) - set(old)) == 1)  # type: ignore[misc]
    assert site.versions(4) == {"one"}
    eventually(lambda: not site.daemon.titled("mold app gen=2"))


# Probation.


def on_probation(site: Site, text: str = TRIED) -> int:
    """Take a reload as far as its probation; returns the pid of the worker that is tried."""
    site.start(text)
    site.write("two")
    site.hup()
    site.daemon.log.wait_for("^reload .*phase=probation")
    return int(site.daemon.log.wait_for(r"^worker_ready .*gen=2 pid=(\d+)")[1])


def ask_of(site: Site, pid: int, line: str, times: int = 1) -> None:
    """Ask this very worker, by asking until it is the one who answers."""
    with ExitStack() as others:
        while times:
            talk = others.enter_context(Talk(site.daemon))
            if talk.pid == pid:
                talk.ask(line)
                talk.close()
                times -= 1


def test_one_worker_serves_on_probation_beside_all_of_the_old_and_then_all_are_replaced(site: Site) -> None:
    pid = on_probation(site)
    eventually(lambda: len(site.daemon.workers()) == 3)
    ask_of(site, pid, "version", 5)
    site.ended()
    assert pid in site.daemon.workers()
    assert site.versions() == {"two"}


def test_a_worker_that_dies_on_probation_has_failed(site: Site) -> None:
    pid = on_probation(site)
    kill(pid)
    assert "phase=probation" in site.ended("rolled_back")
    assert site.versions() == {"one"}
    eventually(lambda: len(site.daemon.workers()) == 2)


def test_a_worker_that_errs_on_probation_has_failed(site: Site) -> None:
    pid = on_probation(site)
    ask_of(site, pid, "raise", 5)
    assert "on probation 5 of 5 requests have raised" in site.ended("rolled_back")
    assert site.versions() == {"one"}


def test_a_worker_that_errs_as_much_as_the_old_ones_passes(site: Site) -> None:
    pid = on_probation(site)
    for old in set(site.daemon.workers()) - {pid}:
        ask_of(site, old, "raise", 5)
    ask_of(site, pid, "raise", 3)
    ask_of(site, pid, "version", 2)
    site.ended()


def test_fewer_errors_than_say_anything_do_not_fail_a_probation(site: Site) -> None:
    pid = on_probation(site, 'max_children = 1\nprobation = "3s"')
    ask_of(site, pid, "raise", 4)
    site.ended()
    assert site.versions(4) == {"two"}


# Somebody is killed in the middle of it.


def mold(site: Site, generation: int) -> int:
    return int(site.daemon.log.wait_for(rf"^mold_ready service=app gen={generation} pid=(\d+)")[1])


def test_the_new_mold_is_killed_on_probation(site: Site) -> None:
    on_probation(site)
    kill(mold(site, 2))
    assert "the new mold died" in site.ended("rolled_back")
    eventually(lambda: len(site.daemon.workers()) == 2)
    assert site.versions() == {"one"}


def test_the_new_mold_is_killed_while_it_imports(site: Site) -> None:
    site.start(TRIED)
    site.write("two", "time.sleep(60)")
    site.hup()
    site.daemon.log.wait_for("^reload_started")
    eventually(lambda: site.daemon.titled("mold app gen=2"))
    kill(site.daemon.titled("mold app gen=2")[0])
    assert "phase=molds" in site.ended("rolled_back")
    assert site.versions(4) == {"one"}


def test_old_workers_and_the_old_mold_may_be_killed_on_probation(site: Site) -> None:
    pid = on_probation(site)
    kill(mold(site, 1))
    old = set(site.daemon.workers()) - {pid}
    for each in old:
        kill(each)
    eventually(lambda: len(site.daemon.workers()) == 3)
    ask_of(site, pid, "version", 5)
    site.ended()
    assert site.versions() == {"two"}
    eventually(lambda: len(site.daemon.titled("mold app")) == 1)


ROLLED = 'max_children = 12\nprobation = "0s"'


def in_the_middle(site: Site) -> None:
    """Take a reload as far as the middle of its roll."""
    site.start(ROLLED)
    site.write("two", "time.sleep(0.1)")  # in every worker
    site.settings(f"{ROLLED}\npreload = false")
    site.hup()
    site.daemon.log.wait_for("^worker_ready .*gen=2", 2)


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_roll_forgives_one_crash_and_not_two(site: Site, crashes: int) -> None:
    in_the_middle(site)
    for index in range(crashes):
        kill(int(site.daemon.log.wait_for(r"^worker_ready .*gen=2 pid=(\d+)", index + 1)[1]))
    site.ended("done" if crashes == 1 else "rolled_back")
    eventually(lambda: len(site.daemon.workers()) == 12)
    assert site.versions() == {"two" if crashes == 1 else "one"}


def test_an_old_worker_is_killed_in_the_middle_of_a_roll(site: Site) -> None:
    in_the_middle(site)
    kill(int(site.daemon.log.wait_for(r"^worker_ready .*gen=1 pid=(\d+)")[1]))
    site.ended()
    assert site.versions() == {"two"}


def test_the_old_mold_is_killed_in_the_middle_of_a_roll(site: Site) -> None:
    in_the_middle(site)
    kill(mold(site, 1))
    site.ended()
    assert site.versions() == {"two"}


def test_the_new_mold_is_killed_in_the_middle_of_a_roll(site: Site) -> None:
    in_the_middle(site)
    kill(mold(site, 2))
    assert "phase=rolling" in site.ended("rolled_back")
    assert site.versions() == {"one"}
    eventually(lambda: len(site.daemon.workers()) == 12)


def test_a_worker_that_does_not_boot_in_the_middle_of_a_roll(site: Site) -> None:
    site.start(ROLLED)
    site.settings(f"{ROLLED}\npreload = false")
    site.write("two", "import os; os.path.exists('broken') and no_such_name; time.sleep(0.1)")
    site.hup()
    site.daemon.log.wait_for("^worker_ready .*gen=2", 2)
    (site.directory / "broken").touch()
    assert "NameError" in site.ended("rolled_back")
    eventually(lambda: len(site.daemon.workers()) == 12)
    assert site.versions() == {"one"}


# One after the other, and stop.


def test_a_reload_during_a_reload_begins_when_that_has_ended_with_the_newest_files(site: Site) -> None:
    pid = on_probation(site)
    site.write("three")
    for _ in range(5):
        site.hup()
    ask_of(site, pid, "version", 5)
    site.ended()
    site.daemon.log.wait_for("^reload .*gen=3 phase=probation")
    pid = int(site.daemon.log.wait_for(r"^worker_ready .*gen=3 pid=(\d+)")[1])
    ask_of(site, pid, "version", 5)
    site.ended()
    assert site.versions() == {"three"}
    assert len(site.daemon.log.matches("^reload_started")) == 2


def test_the_next_reload_begins_at_once(site: Site) -> None:
    in_the_middle(site)
    site.hup()
    site.ended()
    site.ended()
    lines = [line for line in site.daemon.log.lines if line.startswith(("reload_done gen=2", "reload_started gen=3"))]
    done, started = (float(line.rpartition(":")[2].removesuffix("Z")) for line in lines)
    assert (started - done) % 60 < 2


def test_a_reload_while_it_boots_begins_when_it_is_ready(site: Site) -> None:
    site.write("one", "time.sleep(1)")
    site.settings(TWO)
    site.daemon = site.serve("-c", "preforkd.toml", ready=False)
    eventually(lambda: site.daemon.titled("mold app"))
    site.hup()
    site.write("two")
    site.daemon.ready()
    site.ended()
    assert site.versions(4) == {"two"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("phase", ["molds", "probation", "rolling"])
def test_a_stop_ends_a_reload_in_every_phase(site: Site, phase: str, number: signal.Signals) -> None:
    match phase:
        case "molds":
            site.start(TRIED, METRICS)
            site.write("two", "time.sleep(60)")
            site.hup()
            site.daemon.log.wait_for("^reload_started")
        case "probation":
            on_probation(site)
        case "rolling":
            in_the_middle(site)
    site.hup()  # and that one never begins
    assert site.daemon.stop(number) == 0
    assert f"phase={phase}" in site.ended("abandoned")
    assert len(site.daemon.log.matches("^reload_started")) == 1


def test_the_line_that_ends_a_reload_says_whose_fault_it_is_and_which(site: Site) -> None:
    site.start(TWO)
    site.write("broken", "raise SystemExit(3)")
    assert 'phase=molds reason="services.app: SystemExit: 3"' in site.reload("rolled_back")
    site.settings("max_children = 0\nmax_surge = -1")
    assert 'phase=settings reason="services.app.max_children: ' in site.reload("refused")
    assert '; and 1 more"' in site.daemon.log.lines[-1]
    assert len(site.daemon.log.matches("^signal name=SIGHUP")) == 2


def test_with_the_old_mold_dead_and_the_files_broken_the_verdict_does_not_wait_for_it(site: Site) -> None:
    site.start(TWO)
    site.write("broken", "raise SystemExit(3)")
    kill(site.daemon.titled("mold app")[0])
    site.daemon.log.wait_for("^mold_exit .*retry_in=0.5s")
    kill(site.daemon.workers()[0])
    assert float(site.reload("rolled_back").partition(" seconds=")[2].split()[0]) < 5.0
    failures = site.daemon.log.matches("^boot_failed service=app .* gen=1")
    stacks = site.daemon.log.matches(r"^app\| SystemExit: 3")
    assert len(failures) == len(stacks) >= 2  # each is told once
    assert not site.daemon.log.matches("the import ended the process")
    site.write("two")
    site.reload()
    assert site.versions() == {"two"}
    eventually(lambda: len(site.daemon.workers()) == 2)


# Listeners and services.


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), DEADLINE).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_listener_that_moves_is_bound_before_the_old_one_is_closed(site: Site) -> None:
    site.start(TWO)
    old, new = site.daemon.address()[1], free_port()
    site.settings(TWO, listen=f"tcp://127.0.0.1:{new}")
    site.reload()
    events = [line.split()[0] for line in site.daemon.log.lines if line.startswith(("listening", "closed", "reload_d"))]
    assert events == ["listening", "listening", "closed", "reload_done"]
    assert is_open(new)
    assert not is_open(old)


def test_a_listener_for_code_that_fails_is_closed_again(site: Site) -> None:
    site.start(TWO)
    new = free_port()
    site.settings(TWO, listen=f"tcp://127.0.0.1:{new}")
    site.write("broken", "1/0")
    site.reload("rolled_back")
    assert not is_open(new)
    assert site.versions(2) == {"one"}


def test_an_address_that_somebody_else_has_is_refused(site: Site) -> None:
    site.start(TWO)
    with socket.create_server(("127.0.0.1", 0)) as other:
        site.settings(TWO, listen=f"tcp://127.0.0.1:{other.getsockname()[1]}")
        assert "address in use" in site.reload("refused")
    assert site.versions(2) == {"one"}


def test_more_services_than_fit_are_refused_and_the_daemon_lives(site: Site) -> None:
    site.start(TWO)
    many = (f'[services.{"x" * 600}{n}]\ntarget = "app.py:Handler"\nlisten = ["tcp://127.0.0.1:0"]' for n in range(99))
    site.settings(TWO + "\n" + "\n".join(many))
    assert "have fewer, or shorter names" in site.reload("refused")
    assert site.versions() == {"one"}


def test_another_host_with_a_port_of_our_own_needs_a_restart(site: Site) -> None:
    site.start(TWO)
    site.settings(TWO, listen=f"tcp://127.0.0.1:{free_port()}")
    site.reload()
    port = port_of(site.daemon.url(index=1))
    site.settings(TWO, listen=f"tcp://0.0.0.0:{port}")
    said = f"tcp://0.0.0.0:{port}: tcp://127.0.0.1:{port} of ours has the port; needs a restart"
    assert said in site.reload("refused")


def test_a_service_of_another_name_takes_over_the_listener_of_one_that_goes(site: Site) -> None:
    listen = f"tcp://127.0.0.1:{free_port()}"
    site.write("one")
    site.settings(TWO, listen=listen)
    site.daemon = site.serve("-c", "preforkd.toml")
    site.write("two")
    site.settings(TWO, listen=listen, name="other")
    with Talk(site.daemon) as talk:
        site.reload()
        eventually(lambda: site.versions() == {"two"})
        assert talk.ask("version") == "one"
    assert not site.daemon.log.matches("^closed")
    eventually(lambda: not site.daemon.titled("worker app#") + site.daemon.titled("mold app "))


def test_a_socket_file_that_somebody_has_removed_is_made_again(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    site.write("one")
    site.settings(TWO, listen=f"unix:{path}")
    site.daemon = site.serve("-c", "preforkd.toml")
    path.unlink()
    site.reload()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"version\n")
        assert client.recv(9) == b"one\n"
    site.reload()
    assert path.exists()


def test_a_size_that_is_changed_while_the_workers_are_drained_counts_when_they_are_refilled(site: Site) -> None:
    site.start(TWO)
    assert site.daemon.ctl("drain").returncode == 0
    site.settings(TWO.replace("2", "3"))
    site.reload()
    assert "workers=app:3" in site.daemon.ctl("refill").stdout


def test_a_limit_that_is_lowered_while_we_run_is_no_end_of_reloads(site: Site) -> None:
    site.start(TWO)
    resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE, (200, 200))
    site.reload()
    site.settings(TWO + '\nboot_timeout = "1s"')
    eventually(lambda: len(site.daemon.family()) == 3)
    site.daemon.ctl("ping")  # by now the master has let go of those who have left
    taken = {int(name) for name in os.listdir(f"/proc/{site.daemon.pid}/fd")}
    free = next(number for number in range(200) if number not in taken)
    resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE, (free + 1, 200))  # for the file, but for no socket pair
    line = site.reload("rolled_back")
    assert 'reason="services.app: no mold could be forked: Too many open files"' in line
    resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE, (200, 200))
    site.reload()


def test_services_come_and_go_and_come_again_while_their_old_workers_drain(site: Site) -> None:
    port = free_port()
    second = f'\n[services.second]\ntarget = "app.py:Handler"\nlisten = ["tcp://127.0.0.1:{port}"]\n{ONE}'
    site.start(TWO, METRICS)
    for _ in range(2):
        site.settings(TWO + second, METRICS)
        site.reload()
        with Talk(site.daemon, "second") as talk:
            site.settings(TWO, METRICS)
            site.reload()
            assert not is_open(port)
            assert talk.ask("version") == "one"
            site.settings(TWO + second, METRICS)
            site.reload()
            assert talk.ask("version") == "one"
            assert is_open(port)
        site.daemon.log.wait_for(rf"^worker_exit service=second .*pid={talk.pid} cause=drained")
        site.settings(TWO, METRICS)
        site.reload()
    eventually(lambda: not site.daemon.titled("worker second") + site.daemon.titled("mold second"))
    assert not any('service="second"' in name for name in site.daemon.metrics())


def test_the_exporter_comes_moves_and_goes(site: Site) -> None:
    site.start(TWO)
    first, second = free_port(), free_port()
    site.settings(TWO, f'metrics = "tcp://127.0.0.1:{first}"')
    site.reload()
    assert site.daemon.metrics()['preforkd_reloads_total{result="done"}'] == 1
    site.settings(TWO, f'metrics = "tcp://127.0.0.1:{second}"')
    site.reload()
    assert (is_open(first), is_open(second)) == (False, True)
    site.settings(TWO)
    site.reload()
    assert not is_open(second)
    eventually(lambda: not site.daemon.titled("worker metrics") + site.daemon.titled("mold metrics"))


def test_unix_sockets_move_between_services_and_change_their_mode(site: Site) -> None:
    a, b = site.directory / "a.sock", site.directory / "b.sock"

    def settle(first: Path, second: Path, options: str = "") -> None:
        other = f'[services.other]\ntarget = "app.py:Handler"\nlisten = ["unix:{second}"]'
        site.settings(f"{TWO}\n{other}\n{TWO}", listen=f"unix:{first}{options}")

    def ask(path: Path) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.connect(str(path))
            client.sendall(b"version\n")
            return client.recv(100).decode()

    site.write("one")
    settle(a, b)
    site.daemon = site.serve("-c", "preforkd.toml")
    settle(b, a, "?mode=0600")
    site.reload()
    assert ask(a) == ask(b) == "one\n"
    assert (a.stat().st_mode & 0o777, b.stat().st_mode & 0o777) == (0o666, 0o600)
    settle(b, site.directory / "c.sock")
    site.reload()
    assert not a.exists()
    assert ask(b) == ask(site.directory / "c.sock") == "one\n"
    assert b.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("unix-dgram:{path}", "unix cannot become unix-dgram in place; needs a restart"),
        ("unix:{path}?user=nobody-of-that-name", "there is no user 'nobody-of-that-name'"),
        ("fd:5", "is passed at the start; needs a restart"),
        ("fd:8", "is passed at the start; needs a restart"),
        ("tcp://" + "a" * 64 + ":1", "no host can have such a name"),
    ],
)
def test_listeners_that_cannot_be_are_refused_and_the_master_survives_them(site: Site, listen: str, said: str) -> None:
    path = site.directory / "a.sock"
    site.write("one")
    site.settings(TWO, listen=f"unix:{path}")
    site.daemon = site.serve("-c", "preforkd.toml")
    eventually(lambda: len(site.daemon.family()) == 3)  # two workers and a mold
    before = site.daemon.family(), site.daemon.descriptors()
    site.settings(TWO, listen=listen.format(path=path))
    assert said in site.reload("refused")
    assert (site.daemon.family(), site.daemon.descriptors()) == before
    site.settings(TWO, listen=f"unix:{path}")
    site.reload()


def test_a_datagram_that_is_being_answered_is_answered_although_its_listener_goes(site: Site) -> None:
    os.mkfifo(site.directory / "gate")

    def settle(port: int) -> None:
        site.settings(ONE, listen=f"udp://127.0.0.1:{port}")
        path = site.directory / "preforkd.toml"
        path.write_text(path.read_text().replace("Handler", "Datagram"))

    site.write("one")
    settle(free_port(socket.SOCK_DGRAM))
    site.daemon = site.serve("-c", "preforkd.toml")
    with udp(site.daemon.address()) as client:
        client.send(b"slow")
        assert client.recv(100) == b"begun"
        new = free_port(socket.SOCK_DGRAM)
        settle(new)
        site.write("two")
        site.reload()
        with open(site.directory / "gate", "w"):
            pass
        assert client.recv(100) == b"one"
    with udp(("127.0.0.1", new)) as client:
        client.send(b"quick")
        assert client.recv(100) == b"two"


def test_a_longer_queue_takes_effect(site: Site) -> None:
    site.start(TWO, METRICS)
    limit = f'preforkd_listen_backlog_limit{{listener="{site.daemon.url()}",service="app"}}'
    eventually(lambda: site.daemon.metrics().get(limit) == 1024)
    site.settings(f"{TWO}\nrequest_queue_size = 77", METRICS)
    site.reload()
    eventually(lambda: site.daemon.metrics()[limit] == 77)


def test_where_any_port_will_do_every_service_keeps_its_own(site: Site) -> None:
    any_port = f'\n[services.{{}}]\ntarget = "app.py:Handler"\nlisten = ["tcp://127.0.0.1:0"]\n{ONE}'
    site.start(TWO + any_port.format("second"), METRICS)
    ports = [site.daemon.address(name)[1] for name in ("app", "second", "metrics")]
    site.settings(ONE + any_port.format("zeroth") + any_port.format("second"), METRICS, name="app")
    site.reload()
    assert not site.daemon.log.matches("^closed")
    site.settings(ONE, METRICS, name="second")
    site.reload()
    assert [is_open(port) for port in ports] == [False, True, True]


def test_a_scrape_is_answered_at_every_moment(site: Site) -> None:
    site.start(TWO, METRICS)
    done = 'preforkd_reloads_total{result="done"}'
    before = 0.0
    for number in range(1, 6):
        site.write(f"v{number}")
        site.hup()
        while (now := site.daemon.metrics())[done] < number:
            assert now['preforkd_workers_max{service="app"}'] == 2
            assert now['preforkd_worker_spawns_total{service="app"}'] >= before
            before = now['preforkd_worker_spawns_total{service="app"}']
        site.ended()


def test_a_master_short_of_descriptors_takes_a_reload_back(site: Site) -> None:
    tried = on_probation(site, f'{TRIED}\nboot_timeout = "1s"')
    limits = resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE, (5, limits[1]))
    ask_of(site, tried, "version", 5)
    site.daemon.log.wait_for("^spawn_refused .*RLIMIT_NOFILE")
    assert "phase=rolling" in site.ended("rolled_back")
    assert len(site.daemon.workers()) >= 2  # of both generations: nobody is sent away before there is another
    resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE, limits)
    eventually(lambda: site.versions(4) == {"one"})
    eventually(lambda: tried not in site.daemon.alive())
    site.settings(TWO)
    site.reload()
    assert site.versions(4) == {"two"}


def test_a_limit_that_is_lowered_while_it_runs_is_no_failure_of_the_code(site: Site) -> None:
    site.start(TWO)
    resource.prlimit(site.daemon.pid, resource.RLIMIT_NOFILE, (200, 200))
    site.reload()


def test_a_stop_during_a_reload_does_not_wait_when_it_must_not_block(site: Site) -> None:
    on_probation(site, f"{TRIED}\nblock_on_close = false")
    talk = Talk(site.daemon)
    assert site.daemon.stop() == 0
    assert talk.ask("version") in ("one", "two")
    talk.close()
    eventually(lambda: not site.daemon.family())


def test_more_services_than_can_be_described_are_refused_and_the_master_survives_them(site: Site) -> None:
    site.start(TWO)
    many = [
        f'[services.{"x" * 1000}{number}]\ntarget = "app.py:Handler"\nlisten = ["unix:@{site.daemon.pid}.{number}"]'
        for number in range(60)
    ]
    site.settings("\n".join([TWO, *many]))
    assert "bytes of description, not 65536; have fewer, or shorter names" in site.reload("refused")
    site.settings(TWO)
    site.reload()


def test_a_reload_is_done_when_the_old_workers_have_heard_of_it_and_does_not_wait_for_one_who_cannot(
    site: Site,
) -> None:
    site.start(TWO)
    stopped = site.daemon.workers()[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        line = site.reload()
    finally:
        os.kill(stopped, signal.SIGCONT)
    seconds = float(line.partition("seconds=")[2].split()[0])
    assert 1.0 <= seconds < 10.0
