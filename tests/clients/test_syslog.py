"""A ``unix-dgram:`` service as /dev/log: written to by logging.handlers.SysLogHandler and by logger(1)."""

import logging
import threading
from contextlib import closing
from logging.handlers import SysLogHandler
from pathlib import Path

from tests.clients.conftest import METRICS, SERVERS, needs, outcomes, run
from tests.conftest import Serve

THREADS = 4
MESSAGES = 500


def test_every_message_of_syslog_handlers_arrives_once(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(f"{SERVERS}:Syslog", "--listen", "unix-dgram:log", *METRICS)

    def write(thread: int) -> None:
        with closing(SysLogHandler(str(tmp_path / "log"), SysLogHandler.LOG_DAEMON)) as handler:
            for number in range(MESSAGES):
                handler.emit(logging.LogRecord("mail", logging.WARNING, "", 0, "%d of %d", (number, thread), None))

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes(daemon, "Syslog", THREADS * MESSAGES) == {"ok": THREADS * MESSAGES}
    wanted = [f"<28>{number} of {thread}" for thread in range(THREADS) for number in range(MESSAGES)]
    assert sorted((tmp_path / "messages").read_text().splitlines()) == sorted(wanted)  # daemon.warning: 3 * 8 + 4


@needs("logger", "bsdutils")
def test_logger_sends_a_line_and_a_file(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(f"{SERVERS}:Syslog", "--listen", "unix-dgram:log", *METRICS)
    to = ("logger", "--socket", tmp_path / "log", "--socket-errors=on", "--tag", "test", "--priority", "mail.notice")
    run(*to, "one message")
    (tmp_path / "lines").write_text("".join(f"line {number}\n" for number in range(100)))
    run(*to, "--file", tmp_path / "lines")
    assert outcomes(daemon, "Syslog", 101) == {"ok": 101}
    lines = (tmp_path / "messages").read_text().splitlines()
    assert all(line.startswith("<21>") for line in lines)  # mail.notice: 2 * 8 + 5
    wanted = ["one message", *(f"line {number}" for number in range(100))]
    assert sorted(line.partition(" test: ")[2] for line in lines) == sorted(wanted)
