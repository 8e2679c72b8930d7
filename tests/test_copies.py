"""What threading does after a fork is done in a process of ours only where there had been other threads."""

import subprocess
import sys

from tests.daemon import DEADLINE

PROGRAM = """
import os
from preforkd_workers import copies
import threading

KEPT, RENEWED = 10, 11

def of_a_fork(fork):
    lock = threading._active_limbo_lock
    if (pid := fork()) == 0:
        try:
            assert threading.enumerate() == [threading.main_thread()] == [threading.current_thread()]
            answers = []
            thread = threading.Thread(target=lambda: answers.append(threading.active_count()))
            thread.start()
            thread.join()
            assert answers == [2] and threading.active_count() == 1
            os._exit(KEPT if threading._active_limbo_lock is lock else RENEWED)
        finally:
            os._exit(1)
    return {KEPT: "kept", RENEWED: "renewed"}[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]

print("alone:", of_a_fork(copies.fork), of_a_fork(os.fork))
over = threading.Event()
other = threading.Thread(target=over.wait, daemon=True)  # holds up nobody who fails
other.start()
print("with another:", of_a_fork(copies.fork), of_a_fork(os.fork))
over.set()
other.join()
print("alone again:", of_a_fork(copies.fork), of_a_fork(os.fork))
"""


def test_threads_are_as_they_should_be_in_every_child_and_are_not_touched_where_there_were_none() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM]  # of forks beside threads, from 3.12
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert result.stdout.splitlines() == [
        "alone: kept renewed",
        "with another: renewed renewed",
        "alone again: kept renewed",
    ], result.stderr
