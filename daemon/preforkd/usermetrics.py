"""The master's part in metrics of the user's own: the directory of their files. It never reads one.

Workers write the files, the exporter merges them (``preforkd.merging``).
"""

import os
import stat
from contextlib import suppress

from preforkd import log
from preforkd_workers.scoreboard import Scoreboard
from preforkd_workers.valuefile import LIVE, name_of


def make_directory(control: str | None) -> str:
    """Have an empty directory for our user alone, and return its path; empty when it cannot be had.

    It is beside the control socket of this path, where the lock keeps others away; without one it is a temporary one.
    """
    try:
        if control is not None:
            return _emptied(f"{control}.metrics")
        import tempfile  # here and not above: hardly ever needed

        return tempfile.mkdtemp(prefix="preforkd-")
    except OSError as error:
        advice = "metrics of the target's own will not be on our page"
        log.event("no_user_metrics", reason=f"{error.filename}: {error.strerror}", advice=advice)
        return ""


def _emptied(path: str) -> str:
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise FileExistsError(0, "is there, and no directory of our user", path)
    os.chmod(path, 0o700)
    _empty(path)
    return path


def _empty(path: str) -> None:
    with os.scandir(path) as entries:
        for entry in entries:
            with suppress(OSError):  # what we cannot remove the exporter counts
                os.rmdir(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def remove_directory(path: str) -> None:
    """At the end of the daemon. A worker that still lives goes on with files that nobody sees any more."""
    with suppress(OSError):
        if path:
            _empty(path)
            os.rmdir(path)


def forget(board: Scoreboard, service: str, slot: int) -> None:
    """The process in this slot is dead: gauges that live with their process go (mark_process_dead of the library)."""
    if board.user_metrics:
        for kind in LIVE:
            with suppress(OSError):
                os.unlink(os.path.join(board.user_metrics, name_of(kind, service, slot)))
