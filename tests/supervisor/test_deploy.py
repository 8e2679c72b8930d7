"""Programs as ``preforkd deploy supervisor`` fits them to settings, started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import TARGETS
from tests.daemon import DEADLINE
from tests.supervisor.conftest import Supervise
from tests.supervisor.daemon import unused_port, unused_ten

SETTINGS = '[services.mail]\ntarget = "targets.py:Upper"\nmax_children = 1\ngraceful_timeout = "2m"\n'


def fitted(directory: Path, listen: str, *arguments: str) -> dict[str, dict[str, object]]:
    """What a supervisord is to be told, so that it has the program that is fitted to a daemon in an odd place."""
    home = directory / "50% off;#1 'x'"
    home.mkdir()
    (home / "mail.toml").write_text(f'{SETTINGS}listen = ["{listen}"]\n')
    (home / "targets.py").write_bytes(TARGETS.read_bytes())
    command = [
        sys.executable,
        "-m",
        "preforkd",
        "deploy",
        "supervisor",
        "-c",
        "mail.toml",
        "--user",
        "root",
        *arguments,
    ]
    environment = {**os.environ, "PREFORKD_MAX_CHILDREN": "2"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace("/run/preforkd", f"{directory}/run").replace("/var/log", str(directory))
    (directory / "run").mkdir()
    for name in ("mail", "mail-0", "mail-1"):
        (directory / "run" / name).mkdir(0o700)
    (directory / "mail.conf").write_text(text)
    return {"include": {"files": str(directory / "mail.conf")}}


def ask(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address, DEADLINE) as client, client.makefile("rb") as answers:
        client.sendall(b"question\n")
        return answers.readline()


def test_a_fitted_program_runs_and_stops(tmp_path: Path, supervise: Supervise) -> None:
    supervisor = supervise(fitted(tmp_path, "tcp://127.0.0.1:0"))
    assert ask(supervisor.address("mail")) == b"QUESTION\n"
    assert supervisor.log("mail").wait_for(r"^ready .*\bworkers=(\d)")[1] == "2"
    supervisor.log("mail").wait_for(rf"^control path={tmp_path}/run/mail/control.sock")
    assert supervisor.ctl("stop", "mail").returncode == 0
    assert supervisor.info("mail")["exitstatus"] == 0


def test_two_daemons_of_a_fitted_program_share_a_socket(tmp_path: Path, supervise: Supervise) -> None:
    port = unused_port()
    metrics = unused_ten()
    arguments = ("--socket", f"0=tcp://127.0.0.1:{port}", "--metrics", f"tcp://127.0.0.1:{metrics}0")
    supervisor = supervise(fitted(tmp_path, "fd:0", *arguments))
    for number in (0, 1):
        program = f"mail:mail_{number}"
        log = supervisor.log(program)
        log.wait_for("^ready ")
        log.wait_for(rf"^control path={tmp_path}/run/mail-{number}/control.sock")
        log.wait_for(rf"^listening service=metrics url=tcp://127.0.0.1:{metrics}{number}\b")
    assert ask(("127.0.0.1", port)) == b"QUESTION\n"
    assert supervisor.ctl("stop", "mail:mail_0").returncode == 0
    assert ask(("127.0.0.1", port)) == b"QUESTION\n"
