"""``--dev``: whatever the project imports is watched, and the newest save is what serves."""

import os
import py_compile
import signal
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import Daemon, eventually
from tests.test_cli import run

TCP = ("--listen", "tcp://127.0.0.1:0")
ONE = ("--max-children", "1")

HANDLER = """
from socketserver import StreamRequestHandler
class Answer(StreamRequestHandler):
    def handle(self):
        self.wfile.write({answer})
"""


def save(path: Path, text: str) -> None:
    """As many editors do: beside it, and then in its place."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.rename(path)


def watching(daemon: Daemon, directory: Path) -> None:
    daemon.log.wait_for(rf"^dev_watching directories=.*{directory}[ \"]|^dev_watching directories={directory}$")


def reloads(daemon: Daemon, times: int) -> None:
    """Wait until so many reloads have been asked for by the watcher."""
    daemon.log.wait_for("^dev_changed ", times)
    daemon.log.wait_for("^reload", times)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The module of the target."""
    path = tmp_path / "app.py"
    path.write_text(HANDLER.format(answer="b'1'"))
    return path


@pytest.fixture
def daemon(serve: Serve, app: Path) -> Daemon:
    """One that is watching it."""
    daemon = serve("app:Answer", *TCP, *ONE, "--dev")
    watching(daemon, app.parent)
    return daemon


# What is noticed.


def test_a_save_makes_the_master_reload_once(daemon: Daemon, app: Path) -> None:
    app.with_name("notes.txt").write_text("not a source")
    app.with_name("app.py~").write_text("not a source")
    app.with_name(".#app.py").write_text("not a source")
    app.with_name("below").mkdir()
    app.with_name("below").joinpath("other.py").write_text("nothing has been imported from here")
    save(app, HANDLER.format(answer="b'2'"))
    reloads(daemon, 1)
    app.write_text(HANDLER.format(answer="b'3'"))  # in place
    reloads(daemon, 2)
    changed = daemon.log.matches(r"^dev_changed files=(\S+)")
    assert [match[1] for match in changed] == [str(app)] * 2
    app.unlink()
    reloads(daemon, 3)


def test_a_module_that_is_imported_while_serving_is_watched_too(serve: Serve, app: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "other.py"
    other.parent.mkdir()
    other.write_text("answer = b'1'")
    app.write_text(HANDLER.format(answer="__import__('elsewhere.other').other.answer"))
    daemon = serve("app:Answer", *TCP, *ONE, "--dev")
    watching(daemon, tmp_path)
    assert daemon.ask(b"") == b"1"
    watching(daemon, other.parent)
    save(other, "answer = b'2'")
    reloads(daemon, 1)


def test_a_file_named_by_its_path_and_the_settings_file_are_watched(serve: Serve, app: Path, tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    app = app.rename(tmp_path / "sources" / "app.py")
    settings = tmp_path / "preforkd.toml"
    text = '[services.a]\ntarget = "sources/app.py:Answer"\nlisten = ["tcp://127.0.0.1:0"]\nmax_children = 1\n'
    settings.write_text(text)
    daemon = serve("-c", "preforkd.toml", "--dev")
    watching(daemon, tmp_path)
    watching(daemon, app.parent)
    save(settings, f"# again\n{text}")
    reloads(daemon, 1)
    save(app, HANDLER.format(answer="b'2'"))
    reloads(daemon, 2)
    changed = daemon.log.matches(r"^dev_changed files=(\S+)")
    assert [match[1] for match in changed] == [str(settings), str(app)]


def test_a_save_between_the_import_and_the_watch_is_noticed(serve: Serve, app: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "other.py"
    other.parent.mkdir()
    other.write_text("answer = b'1'")
    app.write_text(HANDLER.format(answer="__import__('elsewhere.other').other.answer"))
    daemon = serve("app:Answer", *TCP, *ONE, "--dev")
    watching(daemon, tmp_path)
    (watcher,) = daemon.titled("watcher")
    os.kill(watcher, signal.SIGSTOP)
    assert daemon.ask(b"") == b"1"
    save(other, "answer = b'2'")
    os.kill(watcher, signal.SIGCONT)
    daemon.log.wait_for(f"^dev_changed files={other}")


def test_a_directory_that_is_made_anew_is_watched_again(serve: Serve, app: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("answer = b'1'")
    app.write_text("from package import answer\n" + HANDLER.format(answer="answer"))
    daemon = serve("app:Answer", *TCP, *ONE, "--dev")
    watching(daemon, package)
    for number in range(3):
        seen = len(daemon.log.matches(rf"^dev_watching .*{package}"))
        package.rename(tmp_path / f"old{number}")
        package.mkdir()
        daemon.log.wait_for(rf"^dev_watching .*{package}", seen + 1)
        before = len(daemon.log.matches("^dev_changed "))
        save(package / "__init__.py", f"answer = b'{number}'")
        daemon.log.wait_for(r"^dev_changed .*package/__init__.py", before + 1)


# What is compiled.


def test_of_two_saves_in_a_second_with_the_same_size_the_second_serves(serve: Serve, app: Path) -> None:
    """A worker that imports for itself shows what a new mold would."""
    now = 1_700_000_000
    os.utime(app, (now, now))
    compiled = Path(str(py_compile.compile(str(app), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)))
    before = compiled.read_bytes()
    daemon = serve("app:Answer", *TCP, *ONE, "--set", "preload=false", "--dev")
    assert daemon.ask(b"") == b"1"
    app.write_text(HANDLER.format(answer="b'2'"))
    os.utime(app, (now, now))
    os.kill(daemon.workers()[0], signal.SIGKILL)
    daemon.log.wait_for("^worker_ready ", 2)
    assert daemon.ask(b"") == b"2"
    assert compiled.read_bytes() == before


# The watcher itself.


def test_the_master_has_one_thread_and_does_without_the_library(daemon: Daemon) -> None:
    (watcher,) = daemon.titled("watcher")
    assert "watchfiles" in Path(f"/proc/{watcher}/maps").read_text()
    assert "watchfiles" not in Path(f"/proc/{daemon.pid}/maps").read_text()
    assert len(os.listdir(f"/proc/{daemon.pid}/task")) == 1
    descriptors = [os.readlink(f"/proc/{watcher}/fd/{number}") for number in os.listdir(f"/proc/{watcher}/fd")]
    assert not [name for name in descriptors if name.startswith(("socket:", "/memfd:"))]  # nothing of the master's


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_watcher_ends_with_the_master(daemon: Daemon, number: signal.Signals) -> None:
    assert len(daemon.titled("watcher")) == 1
    assert daemon.stop(number) == (-9 if number == signal.SIGKILL else 0)
    if number == signal.SIGKILL:
        eventually(lambda: not daemon.titled("watcher"), "the watcher has left")
    assert not daemon.titled("watcher")
    assert not daemon.log.matches("^(stranger_reaped|dev_ended) ")


def test_ctrl_c_reaches_the_whole_group_and_leaves_no_traceback(daemon: Daemon) -> None:
    os.killpg(daemon.pid, signal.SIGINT)
    assert daemon.wait() == 0
    assert "Traceback" not in daemon.log.text


def test_a_watcher_that_dies_is_told_and_nobody_else_minds(daemon: Daemon, app: Path) -> None:
    (watcher,) = daemon.titled("watcher")
    os.kill(watcher, signal.SIGKILL)
    daemon.log.wait_for(rf"^dev_ended pid={watcher} signal=SIGKILL advice=")
    assert daemon.ask(b"") == b"1"
    os.kill(daemon.titled("mold Answer")[0], signal.SIGKILL)  # another one imports, and nobody reads what it tells
    daemon.log.wait_for("^mold_ready ", 2)
    os.kill(daemon.workers()[0], signal.SIGKILL)
    daemon.log.wait_for("^worker_ready ", 2)
    assert daemon.ask(b"") == b"1"
    assert not daemon.log.matches("^stranger_reaped ")


def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['watchfiles'] = None\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    status, out, error = run(tmp_path, "serve", "app:Answer", *TCP, "--dev", environment={"PYTHONPATH": path})
    assert (status, out) == (1, "")
    assert error == "preforkd: --dev needs the library watchfiles: pip install 'preforkd[dev]'\n"


# With reload: from a save to an answer.


def answers(daemon: Daemon, answer: bytes) -> None:
    eventually(lambda: daemon.ask(b"") == answer, f"the answer is {answer!r}")


def test_a_save_serves_and_a_broken_one_shows_its_traceback_while_the_last_good_one_serves(
    daemon: Daemon, app: Path
) -> None:
    save(app, HANDLER.format(answer="b'2'"))
    daemon.log.wait_for(r"^reload_done gen=2\b")
    answers(daemon, b"2")
    save(app, "def broken(:\n")
    daemon.log.wait_for(r"^reload_rolled_back gen=3 .*phase=molds reason=")
    daemon.log.wait_for(r"\| SyntaxError: ")
    assert daemon.ask(b"") == b"2"
    save(app, "raise ValueError('half done')\n")
    daemon.log.wait_for(r"^reload_rolled_back .*phase=molds", 2)
    daemon.log.wait_for(r"\| ValueError: half done")
    assert daemon.ask(b"") == b"2"
    save(app, HANDLER.format(answer="b'5'"))
    daemon.log.wait_for("^reload_done ", 2)
    answers(daemon, b"5")


def test_of_many_saves_in_a_row_the_last_serves(daemon: Daemon, app: Path) -> None:
    for number in range(10, 30):
        save(app, HANDLER.format(answer=f"b'{number}'"))
    answers(daemon, b"29")


def test_after_an_upgrade_there_is_one_watcher_and_the_next_save_serves(daemon: Daemon, app: Path) -> None:
    before = daemon.titled("watcher")
    daemon.signal(signal.SIGUSR2)
    daemon.log.wait_for("^upgrade_done ")
    eventually(lambda: len(daemon.titled("watcher")) == 1 and daemon.titled("watcher") != before, "another watcher")
    daemon.log.wait_for(rf"^dev_watching directories={app.parent}", 2)
    save(app, HANDLER.format(answer="b'2'"))
    answers(daemon, b"2")
    assert len(daemon.log.matches("^dev_changed ")) == 1


def test_a_probation_that_is_asked_for_is_kept(serve: Serve, app: Path) -> None:
    daemon = serve("app:Answer", *TCP, *ONE, "--dev", "--set", "probation=300ms")
    watching(daemon, app.parent)
    save(app, HANDLER.format(answer="b'2'"))
    assert float(daemon.log.wait_for(r"^reload_done gen=2 seconds=(\S+)")[1]) >= 0.3
