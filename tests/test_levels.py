"""Levels of loggers: of the settings, and of an operator while the daemon runs."""

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from preforkd.children import Child
from preforkd.levels import LEVELS, Levels, levels_in
from preforkd.plan import Timeouts, Wanted
from preforkd.pool import Pool
from preforkd.sources import Faults, Value, check, from_environment, from_pairs
from preforkd.wear import ENDLESS, Endurance
from preforkd_workers.levels import Levels as LevelsOfWorker
from preforkd_workers.scoreboard import LEVELS_LENGTH, Scoreboard
from preforkd_workers.spec import UNLIMITED
from tests.conftest import Serve
from tests.daemon import DEADLINE, Conversation, Daemon, eventually, preforkctl

LEVELED = f"{Path(__file__).parent / 'leveled.py'}:Leveled"
TCP = ("--listen", "tcp://127.0.0.1:0")
KINDS = {
    "process": ["--max-children", 2],
    "thread": ["--kind", "thread", "--threads", 2, "--max-children", 2],
    "gevent": ["--kind", "gevent", "--greenlets", 2, "--max-children", 2],
}

kinds = pytest.mark.parametrize("kind", KINDS)


class Client(Conversation):
    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon.connect())

    def ask(self, order: str) -> str:
        self.socket.sendall(f"{order}\n".encode())
        return self.answers.readline().decode().rstrip()

    def has(self, logger: str, level: str) -> Callable[[], bool]:
        return lambda: self.ask(f"level {logger}") == level


@pytest.fixture
def every_worker() -> Iterator[Callable[[Daemon], list[Client]]]:
    """A client of each of two workers: as many as they have lanes."""
    with ExitStack() as stack:

        def clients(daemon: Daemon, lanes: int = 4) -> list[Client]:
            found = [stack.enter_context(Client(daemon)) for _ in range(lanes)]
            assert len({client.ask("pid") for client in found}) == 2
            return found

        yield clients


EveryWorker = Callable[..., list[Client]]


def levels(daemon: Daemon) -> dict[str, list[str]]:
    """What preforkctl shows."""
    shown = daemon.ctl("log-level")
    assert (shown.returncode, shown.stderr) == (0, "")
    head, *rows = [line.split() for line in shown.stdout.splitlines()]
    assert head == ["LOGGER", "LEVEL", "SETTINGS"]
    return {row[0]: row[1:] for row in rows}


# Workers that run.


@kinds
def test_a_level_is_that_of_every_worker_at_once_and_taken_back(
    serve: Serve, kind: str, every_worker: EveryWorker
) -> None:
    daemon = serve(LEVELED, *TCP, *KINDS[kind])
    clients = every_worker(daemon, 2 if kind == "process" else 4)
    for logger, own in ("app.mail", "NOTSET"), ("root", "WARNING"), ("own", "INFO"):
        assert daemon.ctl("log-level", logger, "Debug").returncode == 0
        for client in clients:
            eventually(client.has(logger, "DEBUG"))
        assert levels(daemon)[logger] == ["debug", "-"]
        assert daemon.ctl("log-level", logger, "default").returncode == 0
        for client in clients:
            eventually(client.has(logger, own))
        assert levels(daemon) == {"preforkd": ["-", "-"]}
    daemon.log.wait_for(r"^log_level logger=own now=debug before=default uid=\d+")


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_worker_that_is_busy_hears_of_it_in_the_middle_of_its_request(serve: Serve, kind: str) -> None:
    daemon = serve(LEVELED, *TCP, *KINDS[kind])
    with Client(daemon) as client:
        assert client.ask("spin_until app DEBUG") == "spinning"
        daemon.ctl("log-level", "app", "debug")
        assert client.answers.readline() == b"DEBUG\n"


def test_the_last_of_many_changes_is_what_all_workers_come_to(serve: Serve, every_worker: EveryWorker) -> None:
    daemon = serve(LEVELED, *TCP, *KINDS["thread"])
    clients = every_worker(daemon)
    for level in [*LEVELS, *LEVELS]:
        assert daemon.ctl("log-level", "app", level).returncode == 0
        assert daemon.ctl("log-level", f"app.{level}", "info").returncode == 0
    for client in clients:
        eventually(client.has("app", "CRITICAL"))
        for level in LEVELS:
            eventually(client.has(f"app.{level}", "INFO"))


WITHOUT_LOGGING = """
import sys
from preforkd_workers.levels import Levels
from preforkd_workers.scoreboard import Scoreboard
board = Scoreboard.private("test")
levels = Levels(board)
levels.expect()
board.keep_log_levels({"app": 40})
levels.look(print)
levels.apply()
assert "logging" not in sys.modules
from logging import DEBUG, getLogger, handlers
assert getLogger("app").level == 40
assert getLogger("other").level == 0
board.keep_log_levels({"app": 10})
levels.apply()
assert getLogger("app").level == DEBUG
"""


def test_levels_do_not_import_logging_and_are_there_when_somebody_has_imported_it() -> None:
    subprocess.run([sys.executable, "-Werror", "-c", WITHOUT_LOGGING], check=True)


class Read(Scoreboard):
    """Counts how often its levels were read: what each worker reads for itself, it does not share with the others."""

    times = 0

    def levels_now(self) -> tuple[int, dict[str, int]]:
        self.times += 1
        return super().levels_now()


def test_what_the_mold_has_read_its_workers_do_not_read_unless_there_are_levels() -> None:
    """For logging is there in every process of ours: setproctitle imports it."""
    board = Read.private("test")
    levels = LevelsOfWorker(board)
    levels.expect()
    levels.apply()
    assert board.times == 1
    levels.apply()
    assert board.times == 1
    board.keep_log_levels({"app.read": 10})
    levels.apply()
    levels.apply()
    assert board.times == 3
    board.keep_log_levels({})
    levels.apply()
    levels.apply()
    assert board.times == 4


def test_a_level_that_the_target_has_set_meanwhile_is_kept_when_ours_is_taken_back(serve: Serve) -> None:
    daemon = serve(LEVELED, *TCP, "--max-children", 1)
    with Client(daemon) as client:
        daemon.ctl("log-level", "app", "debug")
        eventually(client.has("app", "DEBUG"))
        assert client.ask("set app ERROR") == "set"
        daemon.ctl("log-level", "app", "default")
        daemon.ctl("log-level", "seen", "info")
        eventually(client.has("seen", "INFO"))
        assert client.ask("level app") == "ERROR"


# What is written.


@kinds
def test_what_a_level_lets_pass_is_written_although_nobody_has_configured_logging(serve: Serve, kind: str) -> None:
    daemon = serve(LEVELED, *TCP, *KINDS[kind], "--max-children", 1)
    with Client(daemon) as client:
        client.ask("say app.mail DEBUG too-early")
        daemon.ctl("log-level", "app", "debug")
        eventually(client.has("app", "DEBUG"))
        client.ask("say app.mail DEBUG now")
        client.ask("say other INFO not-asked-for")
        client.ask("say own INFO not-asked-for")
        client.ask("say own WARNING as-ever")
        daemon.log.wait_for("^as-ever$")
        daemon.ctl("log-level", "app", "default")
        eventually(client.has("app", "NOTSET"))
        client.ask("say app.mail DEBUG too-late")
        client.ask("say app.mail ERROR as-ever")
        daemon.log.wait_for("^as-ever$", 2)
    assert len(daemon.log.matches("^now$")) == 1
    assert not daemon.log.matches("too-early|not-asked-for|too-late")


def test_basic_config_works_as_ever(serve: Serve) -> None:
    daemon = serve(LEVELED, *TCP, "--max-children", 1, "--set", "log_levels=app=debug")
    with Client(daemon) as client:
        client.ask("say app DEBUG plain")
        assert client.ask("basic_config") == "1"
        client.ask("say app DEBUG once")
        client.ask("say other WARNING once")
        daemon.log.wait_for("^configured: other once$")
    assert [match[0] for match in daemon.log.matches("plain|.*once$")] == [
        "plain",
        "configured: app once",
        "configured: other once",
    ]


def test_the_daemons_own_events_have_a_level_and_whoever_asks_hears_of_all(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(LEVELED, *TCP, "--max-children", 1, "--set", "log_levels=preforkd=error", ready=False)
    eventually(lambda: daemon.titled("worker Leveled#0"))
    control = Path(daemon.runtime) / "preforkd" / "Leveled" / "control.sock"
    ask = partial(preforkctl, "-s", control, environment=daemon.environment)
    eventually(lambda: "worker_ready" in ask("events").stdout)
    os.kill(daemon.titled("worker Leveled#0")[0], signal.SIGSEGV)
    daemon.log.wait_for("^worker_exit .*cause=crash")
    assert ask("log-level").stdout.split()[3:] == ["preforkd", "error", "error"]
    assert ask("log-level", "preforkd", "debug").returncode == 0
    assert ask("upgrade").returncode == 0
    daemon.log.wait_for("^upgrade_done")
    assert not daemon.log.matches("^(listening|ready|worker_ready service=Leveled slot=0 gen=1 )")


# Workers to come.


def test_new_workers_have_it_and_those_of_an_import_of_their_own(serve: Serve) -> None:
    daemon = serve(LEVELED, *TCP, "--max-children", 1, "--set", "preload=false")
    daemon.ctl("log-level", "own", "debug")
    os.kill(daemon.workers()[0], signal.SIGKILL)
    daemon.log.wait_for("^worker_ready", 2)
    with Client(daemon) as client:
        assert client.ask("level own") == "DEBUG"
        daemon.ctl("log-level", "own", "default")
        eventually(client.has("own", "INFO"))


def test_a_worker_that_boots_meanwhile_has_it(serve: Serve, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    words = ("--max-children", 1, "--set", "on_worker_start=slowly")
    environment = {"GATE": str(tmp_path / "gate")}
    daemon = serve(LEVELED, *TCP, *words, ready=False, environment=environment)
    with open(tmp_path / "gate", "w"):  # it is in the hook
        assert daemon.ctl("log-level", "app", "debug").returncode == 0
    daemon.ready()
    with Client(daemon) as client:
        assert client.ask("level app") == "DEBUG"


def test_an_operators_choice_outlives_reloads_and_upgrades_unless_the_settings_change_it(
    serve: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "preforkd.toml"

    def write(levels: str) -> None:
        service = f'[services.app]\ntarget = "{LEVELED}"\nlisten = ["tcp://127.0.0.1:0"]\nprobation = 0'
        file.write_text(f"log_levels = {levels}\n{service}\nmax_children = 1\n")

    def effective(*loggers: str) -> list[str]:
        with Client(daemon) as client:
            return [client.ask(f"level {logger}") for logger in loggers]

    write('{ app = "warning", "app.mail" = "ERROR" }')
    daemon = serve("-c", file)
    daemon.ctl("log-level", "app", "debug")
    daemon.ctl("log-level", "app.db", "info")
    assert levels(daemon) == {
        "preforkd": ["-", "-"],
        "app": ["debug", "warning"],
        "app.db": ["info", "-"],
        "app.mail": ["error", "error"],
    }
    for command in ("reload", "upgrade"):
        done = daemon.ctl(command)
        assert done.returncode == 0, done.stderr
        assert effective("app", "app.db", "app.mail") == ["DEBUG", "INFO", "ERROR"]
        assert levels(daemon)["app"] == ["debug", "warning"]
    write('{ app = "error", root = "info" }')
    assert daemon.ctl("reload").returncode == 0
    eventually(lambda: effective("app", "app.db", "app.mail", "root") == ["ERROR", "INFO", "NOTSET", "INFO"])
    daemon.ctl("log-level", "app", "critical")
    daemon.ctl("log-level", "app", "default")
    assert levels(daemon)["app"] == ["error", "error"]


def test_a_reload_that_is_rolled_back_leaves_the_levels_as_they_are(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "preforkd.toml"
    good = f'[services.app]\ntarget = "{LEVELED}"\nlisten = ["tcp://127.0.0.1:0"]\nmax_children = 1\n'
    file.write_text(f'log_levels = {{ app = "warning" }}\n{good}')
    daemon = serve("-c", file)
    file.write_text(f'log_levels = {{ app = "debug" }}\n{good}on_mold = "nothing_of_the_kind"\n')
    assert daemon.ctl("reload").returncode == 1
    assert levels(daemon)["app"] == ["warning", "warning"]
    with Client(daemon) as client:
        assert client.ask("level app") == "WARNING"


WAITS_FOR_LOOK = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
print(flush=True)
signal.sigwait({signal.SIGURG})
"""


def test_a_worker_whose_pid_nobody_has_told_yet_looks_when_it_is_told() -> None:
    """The master may be slow to hear of a worker that has looked, and serves, by then."""
    with selectors.DefaultSelector() as selector:
        pool = Pool("app", selector, Scoreboard.private("test").add("app"), {1: Mute()}, Wanted(1, 1), Timeouts())
        pool.settle()
        (child,) = pool.children.values()
        with subprocess.Popen([sys.executable, "-c", WAITS_FOR_LOOK], stdout=subprocess.PIPE) as worker:
            assert worker.stdout is not None
            worker.stdout.readline()
            pool.have_all_look()
            pool.spawned(child.serial, worker.pid)
            try:
                assert worker.wait(DEADLINE) == 0
            finally:
                worker.kill()
        child.close()


class Mute:
    """A nursery that is asked for workers, and has not told yet which processes they are."""

    ready, may_tell, lanes, limits = True, True, 1, UNLIMITED
    urls: Sequence[str] = ()

    def endurance(self) -> Endurance:
        return ENDLESS

    def spawn(self, child: Child, end: socket.socket) -> None:
        """Nothing yet."""

    def lost(self, child: Child, cause: str, failure: str | None) -> None:
        """Nothing."""


# What may be said.


def test_the_operator_is_told_which_levels_there_are_and_nothing_changes(serve: Serve) -> None:
    daemon = serve(LEVELED, *TCP, "--max-children", 1)
    for words in ("app", "loud"), ("app", "notset"), ("a b", "debug"), ("app" * LEVELS_LENGTH, "debug"):
        refused = daemon.ctl("log-level", *words)
        assert refused.returncode == 1
        assert refused.stdout == ""
    assert "one of debug, info, warning, error, critical" in daemon.ctl("log-level", "app", "loud").stderr
    assert daemon.ctl("log-level", "app").stdout.split() == ["LOGGER", "LEVEL", "SETTINGS", "app", "-", "-"]
    assert levels(daemon) == {"preforkd": ["-", "-"]}


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ({"app": "loud"}, "of 'app': one of debug, info, warning, error, critical, not 'loud'"),
        ({"app": 10}, "of 'app': one of debug, info, warning, error, critical, not 10"),
        ({"": "debug"}, "of '': the name of a logger, such as app.mail or root, not ''"),
        ("app", "a table, or a list such as \"app.mail=debug,root=info\", not 'app'"),
        ({f"app.{number}": "debug" for number in range(200)}, "fewer loggers: their names and levels may have"),
    ],
)
def test_a_wrong_level_in_the_settings_is_a_fault_that_names_the_right_ones(raw: object, fault: str) -> None:
    with pytest.raises(Faults, match=f"^log_levels: {re.escape(fault)}"):
        check([Value("t", "a", "target", "a:b"), Value("log_levels", None, "log_levels", raw)], "x")


def test_levels_come_from_every_source() -> None:
    service = [Value("t", "a", "target", "a:b"), Value("l", "a", "listen", ["tcp://127.0.0.1:1"])]
    for given in (
        [Value("log_levels", None, "log_levels", {"app.mail": "DEBUG", "root": "info"})],
        from_environment({"PREFORKD_LOG_LEVELS": "app.mail=debug, root=info"}),
        from_pairs(["log_levels=app.mail=debug,root=info"]),
    ):
        assert check([*service, *given], "x").settings.log_levels == {"app.mail": "debug", "root": "info"}


def test_what_both_say_together_fits_where_it_is_published() -> None:
    longest = levels_in({f"logger.{number}": "critical" for number in range(60)})
    kept = Levels(longest)
    with suppress(ValueError):
        for number in range(1000):
            kept.choose(f"other.{number}", "critical")
    assert 20 < len(kept.chosen) < 1000
    assert len(str(kept.of_targets)) < LEVELS_LENGTH
