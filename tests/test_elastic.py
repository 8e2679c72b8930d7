"""Elastic pools, for real: they grow under load, shrink without it, and keep to the limits that an operator moves.

The rules by which they do are tested as values, in ``test_sizing.py``.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.daemon import Conversation, Daemon, eventually, kill
from tests.site import Site, Talk

ELASTIC = 'max_children = 10\nmax_spare = 2\nprobation = "0s"'
METRICS = 'metrics = "tcp://127.0.0.1:0"'


@pytest.fixture
def site(tmp_path: Path, serve: Serve) -> Site:
    return Site(tmp_path, serve)


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """What is open until the test closes it."""
    with ExitStack() as stack:
        yield stack


def hold(site: Site, stack: ExitStack, number: int) -> list[Conversation]:
    """Open connections and keep them; some may wait in the backlog."""
    return [stack.enter_context(Conversation(site.daemon.connect())) for _ in range(number)]


def service(daemon: Daemon) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(daemon.ctl("status", "--json").stdout)["services"][0]
    return report


def sizes(daemon: Daemon) -> tuple[int, int]:
    """Workers wanted, and at most."""
    found = service(daemon)
    return found["size"], found["limits"]["max_children"]


def done(site: Site, *words: object) -> str:
    process = site.daemon.ctl(*words)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr + site.daemon.log.text
    return process.stdout


def test_connections_that_are_held_make_it_grow_and_when_they_are_gone_it_shrinks_to_max_spare(
    site: Site, held: ExitStack
) -> None:
    site.start(ELASTIC, METRICS)
    log = site.daemon.log
    assert sizes(site.daemon) == (1, 10)
    with ExitStack() as burst:
        talks = [burst.enter_context(Talk(site.daemon)) for _ in range(6)]  # each is answered before the next comes
        assert len({talk.pid for talk in talks}) == 6
        log.wait_for("^grown .* workers=(7|8|9|10) ")
        metrics = site.daemon.metrics()
        assert metrics['preforkd_workers_max{service="app"}'] == 10
        assert metrics['preforkd_workers_wanted{service="app"}'] == sizes(site.daemon)[0] >= 7
        assert log.wait_for("^grown ").string.startswith(
            "grown service=app reason=few_idle workers=2 before=1 busy=1 idle=0 patience=1s "
        )
    log.wait_for("^shrunk service=app reason=many_idle workers=2 before=3 busy=0 idle=3 ")
    eventually(lambda: len(site.daemon.workers()) == 2)
    assert sizes(site.daemon) == (2, 10)
    assert site.ask("still here") == "still here"
    assert not log.matches("cause=(?!drained)")
    assert " 2/10 " in site.daemon.ctl("status").stdout


def test_who_holds_a_connection_is_not_retired_while_another_is_idle(site: Site, held: ExitStack) -> None:
    site.start(f"{ELASTIC}\nstart_children = 6")
    with ExitStack() as rest:
        talks = [rest.enter_context(Talk(site.daemon)) for _ in range(6)]
        slots = {each["pid"]: each["slot"] for each in service(site.daemon)["workers"]}
        talks.sort(key=lambda talk: slots[talk.pid])
        rest.pop_all()
        for talk in talks[:-2]:  # all but those in the highest slots
            talk.close()
    held.callback(talks[-1].close)
    held.callback(talks[-2].close)
    site.daemon.log.wait_for("^shrunk .* workers=4 before=5 busy=2 ")
    eventually(lambda: len(site.daemon.log.matches("^worker_exit ")) >= 2)
    assert {each["pid"] for each in service(site.daemon)["workers"]} >= {talk.pid for talk in talks[-2:]}
    assert [talk.ask("still here") for talk in talks[-2:]] == ["still here"] * 2


def test_a_pool_that_is_not_elastic_says_and_does_nothing_of_the_kind(site: Site, held: ExitStack) -> None:
    site.start('max_children = 2\nprobation = "0s"')
    hold(site, held, 4)
    assert sizes(site.daemon) == (2, 2)
    assert not site.daemon.log.matches("^(grown|shrunk|held_back)")


def test_scale_and_signals_move_the_limit_and_no_tick_undoes_it(site: Site, held: ExitStack) -> None:
    site.start(f"{ELASTIC}\nstart_children = 8")
    hold(site, held, 9)
    assert done(site, "scale", "app", 3).startswith("scale: done workers=app:3 draining=")
    site.daemon.log.wait_for("^held_back service=app reason=limit workers=3 before=3 busy=3 idle=0 ")
    assert sizes(site.daemon) == (3, 3)
    site.daemon.signal(signal.SIGTTIN)
    site.daemon.log.wait_for("^resized service=app workers=4 before=3")
    site.daemon.log.wait_for("^grown service=app reason=few_idle workers=4 before=3 ")
    site.daemon.signal(signal.SIGTTOU)
    site.daemon.log.wait_for("^resized service=app workers=3 before=4")
    site.daemon.log.wait_for("^held_back service=app reason=limit workers=3 ", 2)
    assert sizes(site.daemon) == (3, 3)
    assert done(site, "scale", "app", 20).startswith("scale: done workers=app:")
    site.daemon.log.wait_for("^grown .* workers=4 before=3 ", 2)
    assert sizes(site.daemon)[1] == 20


def test_a_reload_and_an_upgrade_keep_the_limit_and_the_size(site: Site, held: ExitStack) -> None:
    site.start(ELASTIC)
    done(site, "scale", "app", 5)
    hold(site, held, 20)  # for those who serve now and those who serve afterwards
    site.daemon.log.wait_for("^held_back service=app reason=limit workers=5 ")
    for renew in ("reload", "upgrade"):
        done(site, renew)
        assert sizes(site.daemon) == (5, 5)
    site.settings(ELASTIC.replace("max_spare = 2", "max_spare = 3\nmin_spare = 2"))
    done(site, "reload")
    assert service(site.daemon)["limits"] == {"max_children": 5, "min_spare": 2, "max_spare": 3}
    site.settings(ELASTIC.replace("10", "12"))
    done(site, "reload")
    assert sizes(site.daemon)[1] == 12, "what the settings have said since"


def test_drained_it_has_nobody_and_refilled_as_many_as_before_also_after_an_upgrade(
    site: Site, held: ExitStack
) -> None:
    site.start(f"{ELASTIC}\nstart_children = 4", METRICS)
    hold(site, held, 4)
    site.daemon.log.wait_for("^grown .* workers=5 ")
    done(site, "drain", "--no-wait")
    held.close()
    eventually(lambda: not site.daemon.workers())
    assert site.daemon.metrics()['preforkd_workers_wanted{service="app"}'] == 0
    done(site, "upgrade")
    assert sizes(site.daemon)[0] == 0
    size = int(done(site, "refill").split("workers=app:")[1].split()[0])
    assert size >= 5
    site.daemon.log.wait_for("^shrunk .* workers=2 ")


def test_a_fixed_pool_becomes_elastic_by_a_reload_and_fixed_again(site: Site) -> None:
    site.start('max_children = 5\nprobation = "0s"')
    site.settings('max_children = 5\nmax_spare = 2\nprobation = "0s"')
    done(site, "reload")
    site.daemon.log.wait_for("^shrunk .* workers=2 before=3 ")
    eventually(lambda: len(site.daemon.workers()) == 2)
    site.settings('max_children = 5\nprobation = "0s"')
    done(site, "reload")
    eventually(lambda: len(site.daemon.workers()) == 5)


# What an operator says of the size, of any pool.


def test_the_size_to_refill_is_that_of_settings_loaded_since_the_drain_also_after_an_upgrade(site: Site) -> None:
    site.start('max_children = 2\nprobation = "0s"')
    done(site, "drain")
    site.settings('max_children = 3\nprobation = "0s"')
    done(site, "reload")
    done(site, "upgrade")
    assert "workers=app:3" in done(site, "refill")


@pytest.mark.parametrize("moved", ["scale", "TTIN"])
def test_what_is_said_during_a_reload_holds_when_that_is_rolled_back(site: Site, moved: str) -> None:
    site.start('max_children = 2\nprobation = "0s"')
    site.settings('max_children = 4\nprobation = "60s"')
    site.hup()
    site.daemon.log.wait_for("^worker_ready .* gen=2 ")
    if moved == "scale":
        done(site, "scale", "app", 3, "--no-wait")
    else:
        site.daemon.signal(signal.SIGTTIN)
    site.daemon.log.wait_for("^resized service=app workers=3 before=2")
    mold = int(site.daemon.log.wait_for(r"^mold_ready .* gen=2 pid=(\d+)")[1])
    kill(mold)
    site.ended("rolled_back")
    eventually(lambda: len(site.daemon.workers()) == 3)
    assert sizes(site.daemon) == (3, 3)


def test_what_is_said_during_a_reload_holds_when_that_is_done(site: Site) -> None:
    site.start('max_children = 2\nprobation = "0s"')
    site.settings('max_children = 4\nprobation = "60s"\nprobation_requests = 3')
    site.hup()
    tried = int(site.daemon.log.wait_for(r"^worker_ready .* gen=2 pid=(\d+)")[1])
    done(site, "scale", "app", 3, "--no-wait")
    site.daemon.log.wait_for("^resized service=app workers=3 before=2")
    answers: list[str] = []
    while answers.count(str(tried)) < 3:
        answers.append(site.ask("pid"))
    site.ended("done")
    assert sizes(site.daemon) == (3, 3)


# Nobody is refused or lost.


def test_no_request_is_lost_while_it_grows_and_shrinks(site: Site) -> None:
    site.start('max_children = 16\nmax_spare = 1\nprobation = "0s"')
    asked, faults, is_over = [0] * 6, [], threading.Event()

    def ask(number: int) -> None:
        while not is_over.is_set():
            word = f"{number}-{asked[number]}"
            try:
                answer = site.ask(word)
            except OSError as error:
                answer = str(error)
            asked[number] += 1
            if answer != word:
                faults.append((word, answer))

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(2):
            shrunk = len(site.daemon.log.matches("^shrunk "))
            with ExitStack() as burst:
                for _ in range(8):
                    burst.enter_context(Talk(site.daemon))
            site.daemon.log.wait_for("^shrunk ", shrunk + 4, deadline=60.0)
    finally:
        is_over.set()
        for asker in askers:
            asker.join()
    assert not faults
    assert min(asked) > 20
    assert len(site.daemon.log.matches("^grown ")) > 3
    assert not site.daemon.log.matches("cause=(?!drained)")


def test_lanes_are_counted_where_a_worker_has_several(site: Site, held: ExitStack) -> None:
    site.start('kind = "thread"\nthreads = 4\nmax_children = 5\nmin_spare = 2\nmax_spare = 6\nprobation = "0s"')
    assert sizes(site.daemon) == (1, 5)
    with ExitStack() as burst:
        for _ in range(3):  # of four lanes; the fourth alone is too few
            burst.enter_context(Talk(site.daemon))
        site.daemon.log.wait_for("^grown .* workers=2 before=1 busy=3 idle=1 ")
        for _ in range(6):
            burst.enter_context(Talk(site.daemon))
        site.daemon.log.wait_for("^grown .* before=2 ")
        assert len(site.daemon.log.matches("^shrunk ")) == 0
    site.daemon.log.wait_for("^shrunk .* workers=2 before=3 busy=0 idle=12 ")
    eventually(lambda: len(site.daemon.workers()) == 2)
