"""``preforkctl roll``: every worker is replaced by a fresh one of the same code, within the budget."""

import json
import re
import resource
import threading
from pathlib import Path

from tests.conftest import Serve
from tests.daemon import DEADLINE, eventually
from tests.test_control import Client as ControlClient
from tests.test_ctl import TCP, TWO, done, refused, running
from tests.test_hardship import limited
from tests.test_recycle import fewest_ready
from tests.test_stop import Client


def test_all_are_fresh_afterwards_and_never_too_few_were_ready(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP, "--max-children", 3)
    before = set(daemon.workers())
    assert done(daemon, "roll").startswith("roll: done workers=Pid:3 draining=")
    after = {int(daemon.ask(b"")) for _ in range(20)}
    assert after.isdisjoint(before)
    eventually(lambda: len(daemon.workers()) == 3)
    assert before.isdisjoint(daemon.workers())
    assert fewest_ready(daemon) == 3
    daemon.log.wait_for("^worker_exit .* cause=drained status=0", 3)
    assert daemon.log.matches(r"^command do=roll wait=True uid=\d+ client=\d+")
    assert not daemon.log.matches("gen=2|^mold_ready .* gen=2")


def test_requests_are_lost_by_nobody(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP, "--max-children", 3)
    answers, enough = [], threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answers.append(daemon.ask(b""))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        for _ in range(3):
            done(daemon, "roll", "Pid")
    finally:
        enough.set()
        for client in clients:
            client.join()
    assert all(answers)
    assert len(set(answers)) > 3
    assert not daemon.log.matches("lost=")


def test_who_holds_a_long_conversation_leaves_when_it_has_ended(serve: Serve) -> None:
    daemon = serve(":Obey", *TCP, *TWO)
    with Client(daemon) as client:
        said = done(daemon, "roll")
        assert re.fullmatch("roll: done workers=Obey:2 draining=[12]\n", said)  # the other one may be on its way out
        assert client.ask(b"say a") == b"a\n"
        assert client.pid in daemon.workers()
    daemon.log.wait_for(rf"^worker_exit .* pid={client.pid} cause=drained status=0 requests=1")


def test_one_service_of_several(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(
        "".join(
            f'[services.{name}]\ntarget = "preforkd_workers.samples:Upper"\n'
            'listen = ["tcp://127.0.0.1:0"]\nmax_children = 2\n'
            for name in ("left", "right")
        )
    )
    daemon = serve("-c", tmp_path / "two.toml")
    left, right = set(daemon.workers("left")), set(daemon.workers("right"))
    assert done(daemon, "roll", "left").startswith("roll: done workers=left:2 draining=")
    assert left.isdisjoint(daemon.workers("left") or left)
    assert set(daemon.workers("right")) == right
    done(daemon, "roll")
    eventually(lambda: right.isdisjoint(daemon.workers("right")))
    assert refused(daemon, "roll", "up") == "preforkctl: no service 'up'; there are left, right\n"


def test_it_says_why_it_does_not_come_to_an_end_and_goes_on(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP, *TWO, "--set", "boot_timeout=1s")
    before = set(daemon.workers())
    with ControlClient(daemon.control) as client:
        assert client.ask("ping")["ok"]
        with limited(daemon.pid, resource.RLIMIT_NOFILE, 3):
            reason = client.ask("roll")["error"]
        expected = "after 1 s 2 workers are still to be replaced (Too many open files); it goes on trying"
        assert reason == expected
        eventually(lambda: before.isdisjoint(daemon.workers()))


def test_every_worker_has_its_own_time_to_boot(serve: Serve, tmp_path: Path) -> None:
    """Three at a time would fit into the time-out, one after the other do not."""
    (tmp_path / "slow.py").write_text(
        "import time\nfrom preforkd_workers.samples import Upper\ntime.sleep(3)  # what an import may take\n"
    )
    daemon = serve("slow.py:Upper", *TCP, "--max-children", 3, "--set", "preload=false", "--set", "boot_timeout=8s")
    assert done(daemon, "roll").startswith("roll: done workers=Upper:3 draining=")


def test_a_reload_meanwhile_replaces_them_and_who_is_on_probation_stays(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP, "--max-children", 3, "--set", "probation=2")
    with running(daemon, "reload") as (process, _):
        on_trial = int(daemon.log.wait_for(r"^worker_ready .* gen=2 pid=(\d+)")[1])
        assert done(daemon, "roll").startswith("roll: done workers=Pid:3 ")
        daemon.log.wait_for("^worker_exit .* gen=1 .* cause=drained", 3)
        assert process.wait(DEADLINE) == 0
    done(daemon, "scale", 4)
    assert on_trial in daemon.workers()
    assert not daemon.log.matches("^worker_exit .* gen=2 ")


def test_not_while_there_is_nobody_to_replace(serve: Serve) -> None:
    daemon = serve(":Pid", *TCP, *TWO)
    done(daemon, "drain")
    assert refused(daemon, "roll") == "preforkctl: the workers are drained; refill first\n"
    done(daemon, "refill")
    assert json.loads(done(daemon, "roll", "--json"))["workers"] == {"Pid": 2}
    assert daemon.ask(b"").strip().isdigit()
