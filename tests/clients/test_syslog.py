"""A ``unix-dgram:`` service as /dev/log, written to by logging.handlers.SysLogHandler; by logger(1) in the examples."""

import logging
import threading
from contextlib import closing
from logging.handlers import SysLogHandler
from pathlib import Path

from tests.clients.conftest import METRICS, SERVERS, outcomes
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
