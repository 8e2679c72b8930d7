"""What workers and the master say, and what becomes of it when nobody listens: no worker waits, and no line mixes."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, eventually
from tests.unheard import TALK, Fifo, Unheard

ENOUGH = 40_000  # lines of 60 bytes, which is more than a pipe holds
LINE = "x" * 50


def test_what_is_printed_is_not_lost_with_the_worker(serve: Serve) -> None:
    daemon = serve(TALK, "--listen", "tcp://127.0.0.1:0", "--max-children", 1, environment={"PYTHONUNBUFFERED": ""})
    assert daemon.ask(b"kill 1 last words\n") == b""
    daemon.out.wait_for("^last words 0$")


@pytest.mark.parametrize("kind", ["process", "thread", "gevent"])
def test_a_log_that_nobody_reads_stops_nobody(kind: str, tmp_path: Path) -> None:
    """Neither the workers, nor the master at a reload and a stop; what did not fit is counted, and told of."""
    with (
        Fifo(tmp_path / "fifo") as fifo,
        Unheard(tmp_path, f">{fifo.path} 2>&1", "--kind", kind, "--max-children", 1) as daemon,
    ):
        daemon.ready()
        for how in ("print", "stderr", "buffer", "library"):
            assert daemon.say(how, ENOUGH // 2, LINE) == b"said\n"
        assert daemon.dropped()["Talk"] > ENOUGH // 2
        assert daemon.ctl("reload").returncode == 0
        for _ in range(20):
            daemon.signal(signal.SIGUSR1)
        eventually(lambda: daemon.dropped()[""], "the master has dropped something, too")
        assert daemon.say("print", 1, LINE) == b"said\n"
        fifo.read()
        assert daemon.say("print", 1, "room again") == b"said\n"
        eventually(lambda: "log_dropped service=Talk" in fifo.read(), "it is told")
        assert daemon.stop() == 0


def test_losses_of_a_worker_that_left_while_nobody_read_are_told(tmp_path: Path) -> None:
    """The event that tells of them did not fit either; nobody says anything else that would bring it along."""
    with Fifo(tmp_path / "fifo") as fifo, Unheard(tmp_path, f">{fifo.path} 2>&1", "--max-children", 1) as daemon:
        daemon.ready()
        assert daemon.say("print", ENOUGH, LINE) == b"said\n"
        dropped = int(daemon.dropped()["Talk"])
        assert daemon.ctl("roll").returncode == 0
        fifo.read()
        eventually(lambda: f"log_dropped service=Talk lines={dropped} " in fifo.read(), "it is told")


def test_every_line_is_written_or_counted(tmp_path: Path) -> None:
    with Fifo(tmp_path / "fifo") as fifo, Unheard(tmp_path, f"2>{fifo.path}", "--max-children", 1) as daemon:
        daemon.ready()
        said = fifo.read()
        assert daemon.say("stderr", ENOUGH, LINE) == b"said\n"
        said += fifo.read()
        written = len(re.findall(rf"^{LINE} \d+$", said, re.MULTILINE))
        dropped = int(daemon.dropped()["Talk"])
        assert written + dropped == ENOUGH
        assert dropped > 0
        assert daemon.say("stderr", 1, "room") == b"said\n"
        eventually(lambda: f"lines={dropped}" in fifo.read(), "the event says how many")
        assert daemon.stop() == 0


def test_what_was_dropped_is_told_by_a_worker_that_leaves(tmp_path: Path) -> None:
    with Fifo(tmp_path / "fifo") as fifo, Unheard(tmp_path, f">{fifo.path}", "--max-children", 1) as daemon:
        daemon.ready()
        assert daemon.say("print", ENOUGH, LINE) == b"said\n"
        dropped = int(daemon.dropped()["Talk"])
        assert daemon.ctl("reload").returncode == 0
        daemon.log.wait_for(f"^log_dropped service=Talk slot=0 gen=1 .*lines={dropped}")


def test_a_log_that_stands_still_from_the_start_does_not_stop_the_boot(tmp_path: Path) -> None:
    with Fifo(tmp_path / "fifo") as fifo:
        filler = os.open(fifo.path, os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while os.write(filler, b"x" * 4096):
                pass
        os.close(filler)
        noisy = tmp_path / "noisy.py"
        noisy.write_text(
            "import sys\nfrom tests.talkative import Talk\n"
            f"for number in range({ENOUGH}):\n    print('{LINE}')\n    print('{LINE}', file=sys.stderr)\n"
        )
        root = str(Path(__file__).parents[1])
        keywords = {"environment": {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{root}"}}
        with Unheard(tmp_path, f">{fifo.path} 2>&1", target=f"{noisy}:Talk", **keywords) as daemon:
            daemon.ready()
            assert daemon.say("print", 1, "room") == b"said\n"
            assert daemon.dropped()[""] > ENOUGH  # those of the import
            assert daemon.stop() == 0


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", ">&- 2>&-", "2>&- >/dev/null", ">/dev/null 2>&1"])
def test_a_log_that_leads_nowhere_is_no_reason_not_to_serve(redirection: str, tmp_path: Path) -> None:
    with Unheard(tmp_path, redirection) as daemon:
        daemon.ready()
        for how in ("print", "stderr", "library" if "full" not in redirection else "print", "log"):
            assert daemon.say(how, 10, LINE) == b"said\n"
        assert daemon.ctl("reload").returncode == 0
        assert daemon.stop() == 0


def test_a_reader_that_has_left_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    """As after ``2>&1 | head -1``."""
    with Fifo(tmp_path / "fifo") as fifo, Unheard(tmp_path, f">{fifo.path} 2>&1") as daemon:
        daemon.ready()
        fifo.leave()
        for how in ("print", "stderr", "log"):
            assert daemon.say(how, 10, LINE) == b"said\n"
        assert daemon.ctl("reload").returncode == 0  # whose molds find a pipe that cannot be opened
        assert daemon.say("print", 10, LINE) == b"said\n"
        assert daemon.dropped()["Talk"] > 0
        assert daemon.stop() == 0


def test_lines_of_master_and_workers_do_not_mix(tmp_path: Path) -> None:
    """Under load, through one pipe: prints, long lines, the target's log, and the master's own events."""
    with Fifo(tmp_path / "fifo") as fifo, Unheard(tmp_path, f">{fifo.path} 2>&1") as daemon:
        said: list[str] = []
        is_over = threading.Event()

        def hear() -> None:
            while not is_over.wait(0.001):
                said.append(fifo.read())
            said.append(fifo.read())

        hearing = threading.Thread(target=hear)
        hearing.start()
        daemon.ready()
        talks = [
            threading.Thread(target=daemon.say, args=(how, 1500, f"{how}-line"))
            for how in ("print", "stderr", "log", "buffer", "print", "long")
        ]
        for talk in talks:
            talk.start()
        for _ in range(10):
            assert daemon.ctl("stacks").returncode == 0
            daemon.signal(signal.SIGUSR1)
        for talk in talks:
            talk.join()
        dropped = sum(daemon.dropped().values())
        assert daemon.stop() == 0
        is_over.set()
        hearing.join()
    known = Counter(
        (
            re.match(
                r"(print-line|stderr-line|log-line|buffer-line) \d+$|long-line \d+ x{20000}$|[a-z_]+( \w+=|$)|\S+\| ",
                line,
            )
            or "?"
        )[0]
        for line in "".join(said).splitlines()
    )
    assert known["?"] == 0, known
    assert sum(count for what, count in known.items() if "-line" in what) + dropped >= 9000


def test_a_line_without_an_end_is_written_when_its_worker_leaves(serve: Serve) -> None:
    daemon = serve(TALK, "--listen", "tcp://127.0.0.1:0", "--max-children", 1)
    assert daemon.ask(b"part 2 half\n") == b"said\n"
    assert daemon.stop() == 0
    daemon.out.wait_for("^half 0,half 1,$")


def test_the_streams_are_as_a_program_expects_them(serve: Serve) -> None:
    daemon = serve(TALK, "--listen", "tcp://127.0.0.1:0", environment={"LC_ALL": "C.UTF-8"})
    assert daemon.ask(b"about 1\n") == b"said\n"
    daemon.out.wait_for("^1 False utf-8", 2)
    assert (
        daemon.out.lines[-4:]
        == [
            "1 False utf-8 surrogateescape <stdout> w True True True False",
            "2 False utf-8 backslashreplace <stderr> w True True True False",
        ]
        * 2
    )


def test_a_child_that_a_handler_forks_loses_nothing_that_it_has_flushed(serve: Serve) -> None:
    daemon = serve(TALK, "--listen", "tcp://127.0.0.1:0", "--max-children", 1)
    assert daemon.ask(b"part 1 half\nchild 2 whole\nprint 1 end\n") == b"said\n" * 3
    daemon.out.wait_for("^whole 0whole 1half 0,end 0$")


def test_programs_that_a_handler_starts_write_to_the_log_as_well(serve: Serve) -> None:
    daemon = serve(TALK, "--listen", "tcp://127.0.0.1:0")
    assert daemon.ask(b"program 1 hello\n") == b"said\n"
    daemon.out.wait_for("^hello 0$")


def test_on_a_terminal_everything_is_as_ever(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    with Unheard(tmp_path, f">{name} 2>&1", environment={"PYTHONUNBUFFERED": ""}) as daemon:
        daemon.ready()
        assert daemon.say("about", 1) == b"said\n"
        os.close(theirs)
        said = ""
        while "2 True" not in said.rpartition("1 True")[2]:
            said += os.read(ours, 1 << 16).decode()
        assert re.search(r"1 True utf-8 \w+ <stdout> w True True True True\r\n", said)
        assert "at=" not in said
        assert daemon.stop() == 0
    os.close(ours)


def test_a_terminal_that_is_stopped_does_not_stop_the_master(tmp_path: Path) -> None:
    """As by Ctrl-S."""
    ours, theirs = pty.openpty()
    with Unheard(tmp_path, f">{os.ttyname(theirs)} 2>&1") as daemon:
        daemon.ready()
        termios.tcflow(theirs, termios.TCOOFF)
        for _ in range(50):
            daemon.signal(signal.SIGUSR1)
            assert daemon.ctl("ping").returncode == 0
        assert daemon.ctl("reload").returncode == 0
        eventually(lambda: daemon.dropped()[""], "there is no room any more")
        assert daemon.stop() == 0
    os.close(theirs)
    os.close(ours)


def test_a_copy_of_a_worker_does_not_count_in_its_row() -> None:
    """A word has one writer."""
    program = """
import os
from preforkd_workers import streams
from preforkd_workers.spec import Log
streams.take_over(Log())
counted = []
streams.losses.count = counted.append
if os.fork() == 0:
    assert streams.losses.count is None
    os._exit(0)
assert os.wait()[1] == 0
assert streams.losses.count is not None
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=DEADLINE, stdout=subprocess.DEVNULL)


def test_a_pipe_of_another_users_is_made_not_to_block(tmp_path: Path) -> None:
    """supervisord makes it as root, and then starts us as somebody else."""
    program = """
import os
from preforkd_workers.sink import unblocked
os.setgid(61234)
os.setuid(61234)
assert unblocked(1) == 1
assert not os.get_blocking(1)
"""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def test_the_library_leaves_the_streams_of_its_program_alone(tmp_path: Path) -> None:
    program = """
import os, sys, threading
from socketserver import BaseRequestHandler
from preforkd import PreForkingTCPServer
before = sys.stdout, sys.stderr
class Handler(BaseRequestHandler):
    def handle(self):
        assert (sys.stdout, sys.stderr) == before and os.get_blocking(1)
        self.request.sendall(b"same")
import socket
with PreForkingTCPServer(("127.0.0.1", 0), Handler) as server:
    server.max_children = 1
    def ask():
        with socket.create_connection(server.server_address) as client:
            print(client.makefile("rb").read().decode(), flush=True)
        server.shutdown()
    thread = threading.Thread(target=ask)
    thread.start()
    server.serve_forever()
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "same\n", done.stderr
