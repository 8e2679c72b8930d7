"""Metrics of the user's own: on the daemon's page, whoever of the workers has counted, and whatever became of them."""

import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import Conversation, Daemon, eventually, kill

METERED = f"{Path(__file__).parent / 'metered.py'}:Metered"
TCP = ("--listen", "tcp://127.0.0.1:0")
METRICS = ("--metrics", "tcp://127.0.0.1:0", "--set", "probation=0")
SERVICE = "Metered"


class Client(Conversation):
    """A worker of one's own, for as long as the connection lasts."""

    def __init__(self, daemon: Daemon, service: str | None = None) -> None:
        super().__init__(daemon.connect(service))

    def say(self, *lines: str) -> int:
        """Have the worker do this; its pid."""
        for line in lines:
            self.socket.sendall(f"{line}\n".encode())
            pid = int(self.answers.readline())
        return pid


@contextmanager
def clients(daemon: Daemon, number: int) -> Iterator[list[Client]]:
    """As many workers, each with a client of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(Client(daemon)) for _ in range(number)]


def directory(daemon: Daemon) -> Path:
    return Path(f"{daemon.control}.metrics")


def own(daemon: Daemon, prefix: str = "app_") -> dict[str, float]:
    """What the page shows of the target's own."""
    return {name: value for name, value in daemon.metrics().items() if name.startswith(prefix)}


def file_sizes(daemon: Daemon) -> set[tuple[str, int]]:
    """Of those that are there; the gauges of a worker that has just died may go meanwhile."""
    found = set()
    for file in directory(daemon).glob("*.db"):
        with suppress(FileNotFoundError):
            found.add((file.name, file.stat().st_size))
    return found


def bad_files(daemon: Daemon) -> float:
    return daemon.metrics()["preforkd_metrics_bad_files"]


def test_counters_histograms_and_summaries_are_summed_over_workers(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 3)
    with clients(daemon, 3) as three:
        pids = {client.say("size 0.5", "size 5", "size 50", "cost 2") for client in three}
        assert len(pids) == 3
        page = own(daemon)
    assert page['app_lines_total{order="size"}'] == 9
    assert page['app_size_bucket{le="1.0"}'] == 3
    assert page['app_size_bucket{le="10.0"}'] == 6
    assert page['app_size_bucket{le="+Inf"}'] == page["app_size_count"] == 9
    assert page["app_size_sum"] == 3 * 55.5
    assert (page["app_cost_count"], page["app_cost_sum"]) == (3, 6)


@pytest.mark.parametrize("kind", ["thread", "gevent"])
def test_every_kind_of_worker_has_one_file_for_all_its_lanes(serve: Serve, kind: str) -> None:
    lanes = "--threads" if kind == "thread" else "--greenlets"
    daemon = serve(METERED, *TCP, *METRICS, "--kind", kind, lanes, 2, "--max-children", 2)
    with clients(daemon, 4) as four:
        assert len({client.say("size 5", "size 5") for client in four}) == 2
        page = own(daemon)
    assert page['app_lines_total{order="size"}'] == page["app_size_count"] == 8
    slots = {match[1] for name in os.listdir(directory(daemon)) if (match := re.search(r"-(\d+)\.db$", name))}
    assert slots == {"0", "1"}


def test_gauges_say_what_their_mode_says(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 2)
    with clients(daemon, 2) as both:
        for client, value in zip(both, (7, 3), strict=True):
            client.say(*(f"gauge {mode} {value}" for mode in ("all", "liveall", "sum", "livesum", "mostrecent")))
            client.say(*(f"gauge {mode} {value}" for mode in ("min", "livemin", "max", "livemax", "livemostrecent")))
        page = own(daemon)
        for live in ("", "live"):
            assert sorted(page[f'app_{live}all{{pid="Metered-{slot}"}}'] for slot in (0, 1)) == [3, 7]
            assert [page[f"app_{live}{mode}"] for mode in ("min", "max", "sum", "mostrecent")] == [3, 7, 10, 3]


def test_live_gauges_go_with_their_worker_and_others_stay(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 2)
    with clients(daemon, 2) as both:
        doomed = both[0].say("gauge livesum 7", "gauge sum 7", "gauge livemax 7", "gauge liveall 7")
        both[1].say("gauge livesum 3", "gauge sum 3", "gauge livemax 3", "gauge liveall 3")
        assert own(daemon)["app_livesum"] == 10
        kill(doomed)
        daemon.log.wait_for(r"^worker_ready service=Metered", 3)
        page = own(daemon)
    assert (page["app_livesum"], page["app_livemax"], page["app_sum"]) == (3, 3, 10)
    assert sorted(page[name] for name in page if name.startswith("app_liveall")) == [0, 3]


def test_what_is_counted_at_import_is_shown(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 2)
    page = own(daemon)
    assert page["app_imports_total"] == 1
    versions = [value for name, value in page.items() if name.startswith("app_version{")]
    assert versions == [1, 1]  # of each worker: they have it from the mold
    assert daemon.ctl("reload").returncode == 0
    assert own(daemon)["app_imports_total"] == 2


def test_a_worker_that_imports_for_itself_counts_as_well(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 2, "--set", "preload=false")
    with clients(daemon, 2) as both:
        for client in both:
            client.say("size 1")
        page = own(daemon)
    assert page['app_lines_total{order="size"}'] == 2
    assert page["app_imports_total"] == 2


def test_a_script_counts_as_well(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        BEFORE
        + "from socketserver import TCPServer\n"
        + "with TCPServer(('127.0.0.1', 0), Handler) as server:\n"
        + "    OLD.inc(10)\n"
        + "    server.serve_forever()\n"
    )
    daemon = serve(*METRICS, "--max-children", 2, "app.py")
    for _ in range(3):
        assert daemon.ask(b"", "app") == b"before"
    page = own(daemon)
    assert page["app_hits_total"] == page["app_size_count"] == 3
    assert page["app_old_total"] == 13


def test_counters_go_on_through_deaths_shrinking_reload_and_upgrade(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 3)
    counted = 0

    def count(workers: int) -> None:
        nonlocal counted
        with clients(daemon, workers) as some:
            counted += len({client.say("size 5") for client in some})
            assert own(daemon)['app_lines_total{order="size"}'] == counted
        assert own(daemon)["app_size_count"] == counted

    count(3)
    for pid in daemon.workers():
        kill(pid)
    daemon.log.wait_for(r"^worker_ready service=Metered", 6)
    count(3)
    assert daemon.ctl("scale", SERVICE, 1).returncode == 0
    count(1)
    assert daemon.ctl("reload").returncode == 0
    count(1)
    assert daemon.ctl("upgrade").returncode == 0
    count(1)
    assert daemon.ctl("scale", SERVICE, 3).returncode == 0
    count(3)
    assert counted == 12
    assert all(re.fullmatch(r".+_Metered-([0-3]|mold)\.db", name) for name in os.listdir(directory(daemon)))


BEFORE = """\
from socketserver import StreamRequestHandler
from prometheus_client import Counter, Gauge, Histogram
HITS = Counter("app_hits", "Hits.")
SIZE = Histogram("app_size", "Sizes.", buckets=(1, 10))
LEVEL = Gauge("app_level", "Level.", multiprocess_mode="sum")
OLD = Counter("app_old", "Old.")
class Handler(StreamRequestHandler):
    def handle(self):
        HITS.inc(); SIZE.observe(5); LEVEL.set(2); OLD.inc()
        self.wfile.write(b"before")
"""
AFTER = """\
from socketserver import StreamRequestHandler
from prometheus_client import Counter, Gauge, Histogram
HITS = Counter("app_hits", "Hits, by who.", ["who"])
SIZE = Histogram("app_size", "Sizes.", buckets=(3, 10))
LEVEL = Gauge("app_level", "Another text.", multiprocess_mode="sum")
NEW = Counter("app_new", "New.")
OLD = Gauge("app_old", "A gauge by now.")
class Handler(StreamRequestHandler):
    def handle(self):
        HITS.labels("me").inc(); SIZE.observe(2); LEVEL.set(2); NEW.inc(); OLD.set(1)
        self.wfile.write(b"after")
"""


def test_new_code_with_other_metrics_goes_on_in_the_same_files(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(BEFORE)
    daemon = serve("app.py:Handler", *TCP, *METRICS, "--max-children", 1)
    assert daemon.ask(b"") == b"before"
    (tmp_path / "app.py").write_text(AFTER)
    for times in (1, 2):  # once into a slot beside the old one, and once more into the first
        assert daemon.ctl("reload").returncode == 0
        daemon.log.wait_for("^worker_exit service=Handler ", times)
        assert daemon.ask(b"") == b"after"
    page = own(daemon)
    assert page["app_hits_total"] == 1
    assert page['app_hits_total{who="me"}'] == page["app_new_total"] == 2
    assert [page[f'app_size_bucket{{le="{bound}"}}'] for bound in ("1.0", "3.0", "10.0", "+Inf")] == [0, 2, 3, 3]
    assert page["app_level"] == 4  # of two slots, and not of two texts
    assert page["app_old_total"] == 1
    daemon.log.wait_for("^user_metric_skipped name=app_old ")
    assert bad_files(daemon) == 0


def test_five_hundred_deaths_under_scrape_cost_no_count_and_no_file(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 4)
    deaths, alive, files = 500, set[int](), set[tuple[str, int]]()
    acknowledged, is_over, scrapes = 0, threading.Event(), list[tuple[float, float]]()

    def scrape() -> None:
        while not is_over.is_set():
            least, began = acknowledged, time.perf_counter()
            page = daemon.metrics()
            seconds = time.perf_counter() - began
            counted = page.get('app_lines_total{order="size"}', 0.0)
            assert page["preforkd_metrics_bad_files"] == 0
            assert least <= counted <= acknowledged + 1
            scrapes.append((counted, seconds))
            files.update(file_sizes(daemon))

    failures: list[BaseException] = []
    scraper = threading.Thread(target=lambda: _run(scrape, failures))
    scraper.start()
    try:
        while deaths:
            answer = daemon.ask(b"size 5\n")
            assert answer, daemon.log.text[-2000:]
            acknowledged += 1
            pid = int(answer)
            if pid in alive:  # who dies in its first request is made again only after a pause
                kill(pid)
                deaths -= 1
            alive ^= {pid}
    finally:
        is_over.set()
        scraper.join()
    assert not failures
    counts = [counted for counted, _ in scrapes]
    assert counts == sorted(counts)
    page = own(daemon)
    assert page['app_lines_total{order="size"}'] == page["app_size_count"] == acknowledged
    assert all(re.fullmatch(r"[a-z_]+_Metered-([0-3]|mold)\.db", name) for name, _ in files)
    assert len({name for name, _ in files}) == len(files)  # none has grown: a scrape has as much to read as ever
    tenth = max(1, len(scrapes) // 10)
    before, after = (1000 * sum(seconds for _, seconds in some) / tenth for some in (scrapes[:tenth], scrapes[-tenth:]))
    print(f"{len(scrapes)} scrapes, {before:.1f} ms before, {after:.1f} ms after")  # noqa: T201 - with pytest -s


def _run(work: object, failures: list[BaseException]) -> None:
    try:
        work()  # type: ignore[operator]
    except BaseException as failure:
        failures.append(failure)


def test_damaged_files_are_left_out_and_counted(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1)
    with Client(daemon) as client:
        client.say("size 5")
    good = own(daemon)
    place = directory(daemon)
    sound = (place / "counter_Metered-0.db").read_bytes()
    damaged = {
        "empty": b"",
        "short": sound[:3],
        "cut": sound[:40],
        "zeros": bytes(4096),
        "garbage": os.urandom(4096),
        "huge": b"\xf8\xff\xff\x7f" + sound[4:],
        "negative": sound[:8] + b"\xf8\xff\xff\xff" + sound[12:],
        "key": sound[:12] + b"\xff" + sound[13:],
    }
    for slot, data in enumerate(damaged.values(), 90):
        (place / f"counter_Metered-{slot}.db").write_bytes(data)
    (place / "counter_1234.db").write_bytes(sound)  # no slot's
    (place / "gauge_all_Metered-98.db").mkdir()
    (place / "histogram_Metered-99.db").symlink_to("histogram_Metered-99.db")  # not to be read, by root neither
    os.mkfifo(place / "summary_Metered-97.db")
    assert bad_files(daemon) == len(damaged) + 4
    assert own(daemon) == good
    assert daemon.metrics()['preforkd_workers{service="Metered",state="idle"}'] == 1
    daemon.log.wait_for("^user_metrics_file_skipped ", len(damaged) + 4)
    assert daemon.stop() == 0
    assert len(daemon.log.matches("^user_metrics_file_skipped ")) == len(damaged) + 4  # and not at every scrape


def test_a_damaged_file_is_replaced_by_the_next_worker_in_the_slot(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1)
    with Client(daemon) as client:
        pid = client.say("size 5")
    # Written anew, and not truncated in place: under a mapping that lives, that would be a SIGBUS.
    (directory(daemon) / "new").write_bytes(b"")
    os.rename(directory(daemon) / "new", directory(daemon) / "counter_Metered-0.db")
    assert bad_files(daemon) == 1
    kill(pid)
    daemon.log.wait_for(r"^worker_ready service=Metered", 2)
    daemon.log.wait_for("^user_metrics_file_replaced .*file=counter_Metered-0.db")
    with Client(daemon) as client:
        client.say("size 5")
    assert bad_files(daemon) == 0
    assert own(daemon)['app_lines_total{order="size"}'] == 1
    assert own(daemon)["app_size_count"] == 2


COLLIDING = """\
from socketserver import BaseRequestHandler
from prometheus_client import Counter, Gauge
Counter("preforkd_reloads", "Mine.", ["result"]).labels("done").inc(1000)
Gauge("preforkd_mine", "Mine.").set(1)
Gauge("app_fine", "Fine.", multiprocess_mode="max").set(1)
class Handler(BaseRequestHandler):
    pass
"""


def test_a_name_of_the_daemons_stays_the_daemons(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(COLLIDING)
    daemon = serve("app.py:Handler", *TCP, *METRICS)
    for _ in range(3):
        page = daemon.metrics()
    assert page['preforkd_reloads_total{result="done"}'] == 0
    assert page["app_fine"] == 1
    assert not [name for name in page if name.startswith("preforkd_mine")]
    for name in ("preforkd_reloads", "preforkd_mine"):
        daemon.log.wait_for(f"^user_metric_skipped name={name} ")
    assert daemon.stop() == 0
    assert len(daemon.log.matches("^user_metric_skipped ")) == 2  # once, and not at every scrape


def test_services_share_the_page(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(
        f"""
        metrics = "tcp://127.0.0.1:0"
        [services."my_app-1/x"]
        target = "{METERED}"
        listen = ["tcp://127.0.0.1:0"]
        max_children = 1
        [services.other]
        target = "{METERED}"
        listen = ["tcp://127.0.0.1:0"]
        max_children = 1
        """
    )
    daemon = serve("-c", "two.toml")
    for service, value in (("my_app-1/x", 1), ("other", 2)):
        with Client(daemon, service) as client:
            client.say(f"gauge all {value}", "size 1")
    page = own(daemon)
    assert page['app_lines_total{order="size"}'] == 2
    assert page['app_all{pid="my_app-1/x-0"}'] == 1
    assert page['app_all{pid="other-0"}'] == 2


def test_threads_and_series_without_number_are_counted(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1)
    with Client(daemon) as client:
        client.say("threads", "series 1000", "late", "late", "series 1000")
    page = own(daemon)
    assert page['app_lines_total{order="thread"}'] == 4000
    assert page["app_late_total"] == 2
    assert sum(value for name, value in page.items() if name.startswith('app_lines_total{order="order ')) == 2000
    daemon.log.wait_for(r"^worker_ready service=Metered")
    kill(daemon.workers()[0])
    daemon.log.wait_for(r"^worker_ready service=Metered", 2)
    assert own(daemon) == page


def test_what_a_child_of_the_handlers_counts_stays_with_the_child(serve: Serve) -> None:
    """As it does under socketserver: and it does not overwrite what its parent counts."""
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1)
    with Client(daemon) as client:
        client.say("cost 1", "fork", "cost 1", "fork", "cost 1")
    page = own(daemon)
    assert page['app_lines_total{order="fork"}'] == 2
    assert (page["app_cost_count"], page["app_cost_sum"]) == (3, 3)
    assert not [name for name in page if name.startswith("app_childs")]


def test_a_target_without_prometheus_client_does_not_import_it(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os, sys\n"
        "from socketserver import BaseRequestHandler\n"
        "class Handler(BaseRequestHandler):\n"
        "    def handle(self):\n"
        "        self.request.sendall(repr((sorted(sys.modules), sorted(os.environ))).encode())\n"
    )
    daemon = serve("app.py:Handler", *TCP, *METRICS)
    modules = daemon.ask(b"").decode()
    assert "preforkd_workers.usermetrics" in modules
    assert "prometheus_client" not in modules
    assert "preforkd_workers.slotvalues" not in modules
    assert "PROMETHEUS" not in modules
    assert os.listdir(directory(daemon)) == []


def test_without_a_page_prometheus_client_is_left_as_it_is(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import prometheus_client\n"
        "from socketserver import BaseRequestHandler\n"
        "class Handler(BaseRequestHandler):\n"
        "    def handle(self):\n"
        "        self.request.sendall(prometheus_client.values.ValueClass.__module__.encode())\n"
    )
    daemon = serve("app.py:Handler", *TCP)
    assert daemon.ask(b"") == b"prometheus_client.values"
    assert os.listdir(directory(daemon)) == []


def test_a_page_that_comes_with_a_reload_shows_them(serve: Serve, tmp_path: Path) -> None:
    settings = tmp_path / "app.toml"
    service = (
        f'[services.Metered]\ntarget = "{METERED}"\nlisten = ["tcp://127.0.0.1:0"]\nmax_children = 1\nprobation = 0\n'
    )
    settings.write_text(service)
    daemon = serve("-c", settings)
    settings.write_text(f'metrics = "tcp://127.0.0.1:0"\n{service}')
    assert daemon.ctl("reload").returncode == 0
    with Client(daemon, SERVICE) as client:
        client.say("size 5")
    assert own(daemon)["app_size_count"] == 1


def test_who_keeps_them_elsewhere_goes_on_doing_so(serve: Serve, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variable = {"PROMETHEUS_MULTIPROC_DIR": str(elsewhere)}
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1, environment=variable)
    with Client(daemon) as client:
        pid = client.say("size 5")
    assert f"counter_{pid}.db" in os.listdir(elsewhere)
    assert os.listdir(directory(daemon)) == []
    assert daemon.log.matches("^user_metrics_elsewhere .*variable=PROMETHEUS_MULTIPROC_DIR")


def test_the_directory_is_private_begins_empty_and_goes_with_the_daemon(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1)
    place = directory(daemon)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    with Client(daemon) as client:
        client.say("size 5")
    assert "counter_Metered-0.db" in os.listdir(place)
    runtime = daemon.runtime
    kill(daemon.pid)  # and so nobody tidies up
    daemon.wait()
    eventually(lambda: not daemon.family(), "everybody has left")
    assert place.exists()
    second = serve(METERED, *TCP, *METRICS, "--max-children", 1, runtime=runtime)
    assert directory(second) == place
    assert "app_size_count" not in own(second) or own(second)["app_size_count"] == 0
    assert second.stop() == 0
    assert not place.exists()


def test_a_daemon_without_a_control_socket_has_a_place_as_well(serve: Serve, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    nowhere = {"XDG_RUNTIME_DIR": "", "RUNTIME_DIRECTORY": "/proc/nowhere", "TMPDIR": str(temporary)}
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1, environment=nowhere)
    assert daemon.log.matches("^no_control ")
    with Client(daemon) as client:
        client.say("size 5")
    assert own(daemon)["app_size_count"] == 1
    assert len(os.listdir(temporary)) == 1
    assert daemon.stop() == 0
    assert os.listdir(temporary) == []


def test_a_place_that_is_not_ours_is_not_touched(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("")
    (tmp_path / "c.sock.metrics").symlink_to("mine")
    daemon = serve(METERED, *TCP, *METRICS, "--control", tmp_path / "c.sock")
    assert daemon.log.matches("^no_user_metrics ")
    assert daemon.ask(b"size 5\n")
    assert "app_size_count" not in daemon.metrics()
    assert daemon.stop() == 0
    assert os.listdir(tmp_path / "mine") == ["precious"]


def test_a_directory_that_has_gone_costs_no_request(serve: Serve) -> None:
    daemon = serve(METERED, *TCP, *METRICS, "--max-children", 1)
    with Client(daemon) as client:
        pid = client.say("size 5")
    for file in directory(daemon).iterdir():
        file.unlink()
    directory(daemon).rmdir()
    kill(pid)
    daemon.log.wait_for(r"^worker_ready service=Metered", 2)
    daemon.log.wait_for("^user_metrics_lost ")
    with Client(daemon) as client:
        client.say("size 5", "series 1000")
    assert own(daemon) == {}
    assert bad_files(daemon) == 0
