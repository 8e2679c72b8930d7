"""nice, cpu_affinity, oom_score_adjust, rlimits: what the settings may say, and what becomes of it in a worker."""

import os
import resource
from contextlib import ExitStack
from pathlib import Path

import pytest

from preforkd.settings import SERVICE, Service
from preforkd_workers.resources import RLIMITS, cpus_in
from tests.conftest import Serve
from tests.daemon import Daemon, unprivileged
from tests.site import Talk
from tests.test_deaths import MORTAL, TCP
from tests.test_settings import LISTENING, echo, faults_of

UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "preforkd.toml"


@pytest.mark.parametrize(
    ("toml", "found"),
    [
        ("{ nofile = 4096 }", {"nofile": (4096, 4096)}),
        ('{ nofile = "4096", as = "2G" }', {"nofile": (4096, 4096), "as": (2 << 30, 2 << 30)}),
        ('{ nofile = "1024:4096", core = "0:unlimited" }', {"nofile": (1024, 4096), "core": (0, UNLIMITED)}),
        ('["nofile=4096", "stack=8M:unlimited"]', {"nofile": (4096, 4096), "stack": (8 << 20, UNLIMITED)}),
        ('{ core = "unlimited" }', {"core": (UNLIMITED, UNLIMITED)}),
        ("{}", {}),
        ("[]", {}),
    ],
)
def test_rlimits_are_a_table_or_a_list(file: Path, toml: str, found: dict[str, tuple[int, int]]) -> None:
    assert echo(file, f"{LISTENING}rlimits = {toml}").rlimits == found


def test_rlimits_may_come_as_text(file: Path) -> None:
    found = {"nofile": (4096, 4096), "as": (2 << 30, 2 << 30)}
    assert echo(file, LISTENING, environment={"PREFORKD_RLIMITS": "nofile=4096,as=2G"}).rlimits == found
    assert echo(file, LISTENING, pairs=("rlimits=nofile=4096 as=2G",)).rlimits == found
    assert echo(file, LISTENING, pairs=("cpu_affinity=0,2-3",)).cpu_affinity == "0,2-3"


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("rlimits = 3", 'rlimits: a table, or a list such as "nofile=4096,as=2G", not 3'),
        ('rlimits = "nofile"', "rlimits: a table, or a list such as \"nofile=4096,as=2G\", not 'nofile'"),
        (
            "rlimits = { files = 3 }",
            f"rlimits: names of setrlimit(2), {', '.join(sorted(RLIMITS))}; not 'files'",
        ),
        *(
            (
                f"rlimits = {{ nofile = {value} }}",
                'rlimits: for nofile a whole number, text such as "2G" or "1024:4096", or "unlimited"; not ' + shown,
            )
            for value, shown in [
                ('"many"', "'many'"),
                ("-1", "-1"),
                ("1.5", "1.5"),
                ("true", "True"),
                ('"1.5"', "'1.5'"),
                ('"5:"', "''"),
                ("[1, 2]", "[1, 2]"),
            ]
        ),
        ('rlimits = { nofile = "1:2:3" }', "rlimits: for nofile one limit, or soft:hard; not '1:2:3'"),
        (
            'rlimits = { nofile = "5:4" }',
            "rlimits: for nofile a soft limit that is not above the hard one, not '5:4'",
        ),
        (
            'rlimits = { nofile = "unlimited:4" }',
            "rlimits: for nofile a soft limit that is not above the hard one, not 'unlimited:4'",
        ),
        *(
            (f"cpu_affinity = {value}", f'cpu_affinity: "spread", or a list of CPUs such as "0,2-3", not {shown}')
            for value, shown in [
                ('"all"', "'all'"),
                ('"3-1"', "'3-1'"),
                ('"-1"', "'-1'"),
                ('"1,,2"', "'1,,2'"),
                ('"99999999"', "'99999999'"),
                ("1", "1"),
            ]
        ),
        ("nice = 20", "nice: at most 19, not 20"),
        ("oom_score_adjust = -1001", "oom_score_adjust: at least -1000, not -1001"),
    ],
)
def test_a_fault_says_what_is_wanted(file: Path, setting: str, fault: str) -> None:
    assert faults_of(file, LISTENING + setting) == [f"services.echo.{fault}"]


def test_a_list_of_cpus_has_ranges() -> None:
    assert cpus_in("0,2-4, 7") == {0, 2, 3, 4, 7}


def test_by_default_nothing_is_limited() -> None:
    service = Service(target="a:b")
    assert (service.nice, service.cpu_affinity, service.oom_score_adjust, service.rlimits) == (0, "", 0, {})
    assert {"nice", "cpu_affinity", "oom_score_adjust", "rlimits"} <= set(SERVICE)


# In a worker.


def test_a_worker_lives_within_its_limits_and_the_daemon_does_not(serve: Serve) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    seconds, most = resource.getrlimit(resource.RLIMIT_CPU)
    adjust = int(Path("/proc/self/oom_score_adj").read_text())
    daemon = serve(
        MORTAL, "--listen", TCP, "--max-children", 1,
        "--set", "nice=3", "--set", f"cpu_affinity={cpus[-1]}", "--set", "oom_score_adjust=100",
        "--set", "rlimits=nofile=100:200,core=0",
    )  # fmt: skip
    with Talk(daemon) as talk:
        assert talk.ask("limits") == f"{os.nice(0) + 3} {cpus[-1]} {min(1000, adjust + 100)}"
        assert talk.ask("rlimit nofile") == "100 200"
        assert talk.ask("rlimit core") == "0 0"
        assert talk.ask("rlimit cpu") == f"{seconds} {most}"
    assert os.sched_getaffinity(daemon.pid) == set(cpus)
    assert os.getpriority(os.PRIO_PROCESS, daemon.pid) == os.nice(0)
    assert resource.prlimit(daemon.pid, resource.RLIMIT_CORE) == (soft, hard)


def test_workers_are_spread_over_the_cpus_by_slot(serve: Serve) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 3, "--set", "cpu_affinity=spread")
    for slot in range(3):
        (pid,) = daemon.titled(f"worker Mortal#{slot}")
        assert os.sched_getaffinity(pid) == {cpus[slot % len(cpus)]}


def test_the_hooks_and_an_import_in_the_worker_see_the_limits_already(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os\nfrom socketserver import StreamRequestHandler as Handler\nat_import = os.nice(0)\n"
        "def start(server, slot):\n    print('nice', at_import, os.nice(0), flush=True)\n"
    )
    serve(
        "app.py:Handler", "--listen", TCP, "--max-children", 1,
        "--set", "nice=2", "--set", "preload=false", "--set", "on_worker_start=start",
    ).out.wait_for(f"^nice {os.nice(0) + 2} {os.nice(0) + 2}$")  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("nice=-5", "nice = -5: Operation not permitted; needs CAP_SYS_NICE, or a higher RLIMIT_NICE"),
        (
            "oom_score_adjust=-500",
            "oom_score_adjust = -500: Permission denied; less than was inherited needs CAP_SYS_RESOURCE",
        ),
        (
            "rlimits=nofile=100:99999999",
            "rlimits = nofile=100:99999999: not allowed to raise maximum limit; "
            "more than was inherited needs CAP_SYS_RESOURCE",
        ),
        (
            "cpu_affinity=60000",
            "cpu_affinity = 60000: Invalid argument; name CPUs that the machine, or the cpuset, has",
        ),
    ],
)
def test_what_the_system_refuses_is_a_failure_to_boot_that_says_so(serve: Serve, setting: str, said: str) -> None:
    daemon = serve(MORTAL, "--listen", TCP, "--max-children", 1, "--set", setting, ready=False, prefix=unprivileged())
    assert daemon.wait() == 70
    assert f"Mortal| {said}" in daemon.log.lines


def test_a_reload_with_a_limit_that_is_refused_is_rolled_back(serve: Serve, file: Path) -> None:
    start = f'[services.app]\ntarget = "{MORTAL}"\nlisten = ["{TCP}"]\n'
    file.write_text(start)
    daemon: Daemon = serve("-c", file)
    with ExitStack() as stack:
        talk = stack.enter_context(Talk(daemon))
        file.write_text(f'{start}cpu_affinity = "60000"\n')
        done = daemon.ctl("reload")
        assert done.returncode
        assert "cpu_affinity = 60000: Invalid argument" in done.stderr
        assert int(talk.ask("pid")) == talk.pid
