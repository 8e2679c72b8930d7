"""``preforkd deploy``: what is shipped, what becomes of it when it is fitted, and how files are written."""

import difflib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from supervisor.options import UnhosedConfigParser

from preforkd.addresses import parse
from preforkd.deploy import shipped
from preforkd.deploy.facts import Facts, Site, facts_of
from preforkd.deploy.programs import fit_programs
from preforkd.deploy.scrape import fit_scraping
from preforkd.deploy.sections import Sections
from preforkd.deploy.units import fit_units
from preforkd.runtime import directories
from preforkd.sources import Faults, Value, check
from tests.conftest import Serve
from tests.daemon import DEADLINE

ROOT = Path(__file__).parent.parent
MAIL = 'metrics = "tcp://127.0.0.1:9109"\n[services.mail]\ntarget = "app:Mail"\nlisten = ["tcp://0.0.0.0:2525"]\n'
INSTALLED = Site(
    directory="/",
    serve=("/opt/preforkd/bin/preforkd",),
    control=("/opt/preforkd/bin/preforkctl",),
    config="/etc/preforkd/mail.toml",
    options=("-c", "/etc/preforkd/mail.toml"),
    python=("/opt/preforkd", "/usr"),
)


def run(
    directory: Path, *arguments: object, command: str = "deploy", environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of ``preforkd deploy ARGUMENTS``."""
    words = [sys.executable, "-m", "preforkd", command, *map(str, arguments)]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(words, cwd=directory, env=env, capture_output=True, text=True, timeout=DEADLINE)
    return done.returncode, done.stdout, done.stderr


def facts(site: Site = INSTALLED, name: str = "mail", **settings: object) -> Facts:
    """Of a daemon with one service, ``mail``, that has these settings; those of the daemon have capital letters."""
    own = {"target": "app:Mail", "listen": ["tcp://0.0.0.0:2525"], **settings}
    values = [
        Value(key, None, key.lower(), raw) if key.isupper() else Value(key, "mail", key, raw)
        for key, raw in own.items()
    ]
    return facts_of(check(values, name), site)


def service(**settings: object) -> Sections:
    """The fitted unit of such a daemon."""
    fitted = fit_units(shipped.read("systemd"), facts(**settings))  # type: ignore[arg-type]
    return Sections(fitted.files["preforkd@mail.service"])


def changes(manager: str, before: str, after: str) -> list[str]:
    """The lines of a shipped file that are no longer there, and those that are new."""
    lines = difflib.ndiff(shipped.read(manager)[before].splitlines(), after.splitlines())
    return [line for line in lines if line[0] in "+-"]


# As shipped.


@pytest.mark.parametrize("manager", shipped.SHIPPED)
def test_without_settings_the_files_are_the_shipped_ones(tmp_path: Path, manager: str) -> None:
    assert run(tmp_path, manager, "--output", "new/files") == (0, "", "")
    paths = {Path(path).name: ROOT / path for path in shipped.SHIPPED[manager]}
    assert {path.name: path.read_bytes() for path in (tmp_path / "new/files").iterdir()} == {
        name: path.read_bytes() for name, path in paths.items()
    }
    assert run(tmp_path, manager) == (
        0,
        "\n".join(f"# {name}\n{path.read_text()}" for name, path in paths.items()),
        "",
    )


@pytest.mark.parametrize("directory", ["systemd", "deploy/supervisor", "deploy/prometheus"])
def test_every_file_that_is_there_is_shipped(directory: str) -> None:
    there = {f"{directory}/{path.name}" for path in (ROOT / directory).iterdir() if path.is_file()}
    assert there == {path for paths in shipped.SHIPPED.values() for path in paths if path.startswith(f"{directory}/")}


def test_a_wheel_has_them(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path, timeout=3 * DEADLINE)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=3 * DEADLINE)
    (tmp_path / "mail.toml").write_text(MAIL)
    outside = {"PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import preforkd; print(preforkd.__file__)"]
    found = subprocess.run(where, env={**os.environ, **outside}, cwd="/", capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site))
    for manager in shipped.SHIPPED:
        assert run(tmp_path, manager, environment=outside) == run(tmp_path, manager)
        status, fitted, _ = run(tmp_path, manager, "-c", "mail.toml", environment=outside)
        assert status == 0
        assert "mail" in fitted


# Fitted to systemd.


def test_a_daemon_as_the_shipped_unit_expects_it_changes_only_its_name() -> None:
    fitted = fit_units(shipped.read("systemd"), facts())
    assert changes("systemd", "preforkd@.service", fitted.files["preforkd@mail.service"]) == [
        "- ExecStartPre=-/opt/preforkd/bin/preforkd check -c /etc/preforkd/%i.toml",
        "+ ExecStartPre=-/opt/preforkd/bin/preforkd check -c /etc/preforkd/mail.toml",
        "- ExecStart=/opt/preforkd/bin/preforkd serve -c /etc/preforkd/%i.toml",
        "+ ExecStart=/opt/preforkd/bin/preforkd serve -c /etc/preforkd/mail.toml",
    ]
    assert [*fitted.files] == ["preforkd@mail.service", "preforkd.sysusers", "preforkd.tmpfiles"]
    assert fitted.notes == []


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({}, "TimeoutStopSec", "60s"),
        ({"graceful_timeout": 90, "eof_timeout": 10}, "TimeoutStopSec", "109s"),  # 100 + 1, 3 for the exporter, 5
        ({"graceful_timeout": 90, "eof_timeout": 10}, "WatchdogSec", "110s"),
        ({}, "WatchdogSec", "45s"),
        ({"boot_timeout": "2m"}, "TimeoutStartSec", "250s"),
        ({"TAKEOVER_TIMEOUT": 100}, "TimeoutStartSec", "160s"),
        ({"listen": ["tcp://0.0.0.0:25", "udp://[::]:53"]}, "CapabilityBoundingSet", "CAP_NET_BIND_SERVICE"),
        ({"listen": ["tcp://0.0.0.0:25"]}, "AmbientCapabilities", "CAP_NET_BIND_SERVICE"),
        ({"METRICS": "tcp://127.0.0.1:99"}, "AmbientCapabilities", "CAP_NET_BIND_SERVICE"),
        ({"listen": ["tcp://0.0.0.0:0", "tcp://0.0.0.0:1024"]}, "AmbientCapabilities", ""),
        ({"receive_buffer": "4M", "listen": ["udp://0.0.0.0:5000"]}, "AmbientCapabilities", "CAP_NET_ADMIN"),
        ({"receive_buffer": "64K", "listen": ["udp://0.0.0.0:5000"]}, "AmbientCapabilities", ""),
        ({"oom_score_adjust": -100}, "AmbientCapabilities", "CAP_SYS_RESOURCE"),
        ({"oom_score_adjust": 100}, "AmbientCapabilities", ""),
        (
            {"oom_score_adjust": -1, "listen": ["tcp://0.0.0.0:1"]},
            "AmbientCapabilities",
            "CAP_NET_BIND_SERVICE CAP_SYS_RESOURCE",
        ),
        ({"nice": -5}, "LimitNICE", "-5"),
        ({"nice": 5}, "LimitNICE", ""),
        ({"rlimits": {"nice": 30}}, "LimitNICE", "-10"),
        ({"rlimits": {"nofile": 1 << 20}}, "LimitNOFILE", "1048576"),
        ({"rlimits": {"nofile": 4096}}, "LimitNOFILE", ""),
        ({"rlimits": {"memlock": "unlimited"}}, "LimitMEMLOCK", "infinity"),
        ({"rlimits": {"as": "2G"}}, "LimitAS", ""),
        ({"kind": "thread", "threads": 800}, "LimitNOFILE", "1665"),
        ({"kind": "thread", "threads": 100, "max_children": 100}, "TasksMax", "102042"),
        ({}, "LimitNOFILE", ""),
        ({}, "TasksMax", ""),
        ({"block_on_close": False}, "KillMode", "process"),
        ({"block_on_close": False}, "ExitType", "main"),
        ({"listen": [f"tcp://127.0.0.1:{port}" for port in range(2000, 2050)]}, "FileDescriptorStoreMax", "101"),
        ({"listen": ["unix:/run/mail/x.sock"]}, "RuntimeDirectory", "mail"),
        ({"listen": ["unix:/var/run/mail/x.sock"]}, "RuntimeDirectory", "mail"),
        ({"listen": ["unix:/run/preforkd/mail/x.sock"]}, "RuntimeDirectory", "preforkd/%i"),
        ({"CONTROL": "/run/ours/x"}, "RuntimeDirectory", "ours"),
        ({"listen": ["unix:@mail"]}, "RuntimeDirectory", "preforkd/%i"),
        ({"listen": ["unix-dgram:/var/lib/mail/in/x"]}, "StateDirectory", "mail/in"),
        ({"listen": ["unix:/var/spool/postfix/private/x"]}, "ReadWritePaths", "-/var/spool/postfix/private"),
        ({"LOG_FILE": "/var/log/mail/x.log"}, "LogsDirectory", "mail"),
        ({"access_log": "/var/log/mail/x.log"}, "LogsDirectory", "mail"),
        ({"access_log": "-"}, "LogsDirectory", ""),
        ({"access_log": "x.log"}, "WorkingDirectory", "/"),
        ({"LOG_FILE": "/var/log/preforkd/mail/x.log"}, "LogsDirectory", "preforkd/mail"),
        ({"LOG_FILE": "/var/lib/preforkd/mail/x.log"}, "StateDirectory", "preforkd/%i"),
        ({"listen": ["unix:/tmp/x"]}, "PrivateTmp", "no"),
        ({"listen": ["unix:/run/m/x?group=www"]}, "SupplementaryGroups", "www"),
        ({"listen": ["unix:/run/m/x?group=www"]}, "SystemCallFilter", "@chown"),
        ({"listen": ["unix:/run/m/x?user=www"]}, "AmbientCapabilities", "CAP_CHOWN"),
        ({"listen": ["unix:/run/m/x?user=preforkd"]}, "AmbientCapabilities", ""),
        ({"listen": ["unix:/run/m/x?user=preforkd"]}, "PrivateUsers", "yes"),
        ({"listen": ["unix:/run/m/x?group=www"]}, "PrivateUsers", "no"),
        ({"listen": ["unix:/run/m/x"], "max_per_client": 3}, "PrivateUsers", "no"),
        ({"max_per_client": 3}, "PrivateUsers", "yes"),
        ({"listen": ["tcp://0.0.0.0:25"]}, "PrivateUsers", "no"),
        ({"target": "/home/me/app.py:Mail"}, "ProtectHome", "read-only"),
        ({"on_mold": "/root/hook.py:load"}, "ProtectHome", "read-only"),
        ({"target": "/srv/app.py:Mail"}, "ProtectHome", "yes"),
        ({"target": "/tmp/code/app.py:Mail"}, "BindReadOnlyPaths", "/tmp/code"),
        ({"target": "app.py:Mail"}, "WorkingDirectory", "/"),
        ({"target": "/srv/app.py:Mail"}, "WorkingDirectory", "%S/preforkd/%i"),
        ({"CONTROL": "/run/ours/x"}, "ExecReload", "/opt/preforkd/bin/preforkctl -s /run/ours/x reload"),
        ({"NAME": "post"}, "ExecStart", "/opt/preforkd/bin/preforkd serve -c /etc/preforkd/mail.toml"),
    ],
)
def test_a_setting_has_the_unit_say(settings: dict[str, object], key: str, value: str) -> None:
    fitted = fit_units(shipped.read("systemd"), facts(**settings))  # type: ignore[arg-type]
    text = next(iter(fitted.files.values()))
    assert Sections(text).value("Service", key) == value
    comments = [line for line in shipped.read("systemd")["preforkd@.service"].splitlines() if line.startswith("#")]
    assert set(comments) <= set(text.splitlines())


STUBBORN = """
import signal
from socketserver import StreamRequestHandler

class Stubborn(StreamRequestHandler):
    def handle(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
        self.wfile.write(b"hanging\\n")
        while True:
            signal.pause()
"""


def test_no_stop_takes_longer_than_it_is_given(tmp_path: Path, serve: Serve) -> None:
    """Each of the steps comes to its deadline, and then the last resort."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    timeouts = {"graceful_timeout": 0.2, "eof_timeout": 0.2}
    pairs = [f"--set={key}={value}" for key, value in timeouts.items()]
    metrics = ("--metrics", "tcp://127.0.0.1:0")
    daemon = serve("stubborn.py:Stubborn", "--listen", "tcp://127.0.0.1:0", *metrics, *pairs)
    with daemon.connect("Stubborn") as client:
        assert client.recv(99) == b"hanging\n"
        assert daemon.stop(deadline=facts(**timeouts).stop_time) == 0  # type: ignore[arg-type]
    assert daemon.log.matches("^kill .*signal=SIGKILL")


def test_descriptors_by_name_become_socket_units() -> None:
    site = Site(sockets={"web": parse("tcp://[::1]:80"), "log": parse("unix-dgram:/run/log.sock?mode=0620&group=www")})
    found = facts(site, listen=["fd:web", "fd:log"], request_queue_size=99, receive_buffer="64K")
    fitted = fit_units(shipped.read("systemd"), found)
    web, log = Sections(fitted.files["preforkd@mail-web.socket"]), Sections(fitted.files["preforkd@mail-log.socket"])
    assert [web.value("Socket", key) for key in ("ListenStream", "FileDescriptorName", "Service", "Backlog")] == [
        "[::1]:80",
        "web",
        "preforkd@mail.service",
        "99",
    ]
    assert {key: log.value("Socket", key) for key in ("ListenStream", "ListenDatagram", "FileDescriptorName")} == {
        "ListenStream": "",
        "ListenDatagram": "/run/log.sock",
        "FileDescriptorName": "log",
    }
    assert log.value("Socket", "Service") == "preforkd@mail.service"
    assert [log.value("Socket", f"Socket{key}") for key in ("Mode", "Group")] == ["0620", "www"]
    assert log.value("Socket", "ReceiveBuffer") == "65536"
    ours = Sections(fitted.files["preforkd@mail.service"])
    assert ours.value("Service", "Sockets") == "preforkd@mail-web.socket preforkd@mail-log.socket"
    assert ours.value("Service", "AmbientCapabilities") == ""
    assert fitted.notes == []


def test_descriptors_by_number_are_in_one_unit_in_their_order() -> None:
    site = Site(sockets={"3": parse("tcp://0.0.0.0:80"), "4": parse("tcp://0.0.0.0:443")})
    fitted = fit_units(shipped.read("systemd"), facts(site, listen=["fd:4", "fd:3"]))
    assert Sections(fitted.files["preforkd@mail.socket"]).values("Socket", "ListenStream") == [
        "0.0.0.0:80",
        "0.0.0.0:443",
    ]


def test_the_socket_that_has_the_daemons_name_is_the_shipped_one() -> None:
    site = Site(sockets={"mail": parse("tcp://0.0.0.0:80"), "mail-tls": parse("tcp://0.0.0.0:443")})
    files = fit_units(shipped.read("systemd"), facts(site, listen=["fd:mail", "fd:mail-tls", "fd:3"])).files
    assert changes("systemd", "preforkd@.socket", files["preforkd@mail.socket"]) == [
        "- ListenStream=80",
        "+ ListenStream=0.0.0.0:80",
    ]
    assert changes("systemd", "preforkd@.socket", files["preforkd@mail-tls.socket"]) == [
        "- ListenStream=80",
        "+ ListenStream=0.0.0.0:443",
        "+ Service=preforkd@mail.service",
    ]
    assert "preforkd@mail-fd.socket" in files


def test_an_address_that_is_not_known_is_asked_for() -> None:
    fitted = fit_units(shipped.read("systemd"), facts(listen=["fd:web"]))
    unit = fitted.files["preforkd@mail-web.socket"]
    assert "\n# The address of fd:web, which is not in the settings.\n#ListenStream=" in unit
    assert Sections(unit).value("Socket", "ListenStream") == ""
    assert fitted.notes == ["fd:web: its address is not in the settings: --socket web=tcp://0.0.0.0:80"]


def test_what_systemd_cannot_pass_is_a_fault() -> None:
    site = Site(sockets={"web": parse("tcp://localhost:80")})
    with pytest.raises(Faults) as faults:
        fit_units(shipped.read("systemd"), facts(site, listen=["fd:0", "fd:web"]))
    assert faults.value.lines == [
        "fd:0: systemd passes descriptors from 3 on; say fd:NAME",
        "--socket web: localhost: systemd wants an address, not a name",
    ]


def test_the_user_is_everywhere() -> None:
    files = fit_units(shipped.read("systemd"), facts(Site(user="mailer"))).files
    unit = Sections(files["preforkd@mail.service"])
    assert [unit.value("Service", key) for key in ("User", "Group")] == ["mailer", "mailer"]
    assert "\nu mailer - " in files["preforkd.sysusers"]
    assert "\nd /etc/preforkd 0750 root mailer -\n" in files["preforkd.tmpfiles"]
    assert "preforkd.sysusers" not in fit_units(shipped.read("systemd"), facts(Site(user="root"))).files


def test_what_is_odd_is_written_so_that_it_is_read_as_it_was() -> None:
    words = ("-c", '/a b/50%/"x" $HOME\\y.toml')
    site = Site(options=words, environment={"PREFORKD_MAX_CHILDREN": "8 9"})
    (name, text), *_ = fit_units(shipped.read("systemd"), facts(site, name="wörd/a@b")).files.items()
    assert name == r"preforkd@w\xc3\xb6rd\x2fa\x40b.service"
    unit = Sections(text)
    assert unit.value("Service", "ExecStart") == r'preforkd serve -c "/a b/50%%/\"x\" $$HOME\\y.toml"'
    assert unit.value("Service", "RuntimeDirectory") == "preforkd/wörd_a@b"
    assert unit.value("Service", "ExecReload") == "preforkctl wörd/a@b reload"
    assert unit.value("Service", "Environment") == '"PREFORKD_MAX_CHILDREN=8 9"'


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (
            {"listen": ["unix:/run/x"]},
            "/run: preforkd cannot make a socket there; say a directory of its own, /run/mail",
        ),
        ({"listen": ["unix:/srv/x"]}, "/srv: preforkd must be allowed to write there, for a socket"),
        (
            {"target": "/root/app.py:Mail"},
            "/root: preforkd must be allowed to read there, and /root is root's alone as a rule",
        ),
        (
            {"target": "app.py", "listen": []},
            "services.mail: what its script binds is not known here; for a port below 1024 say listen",
        ),
    ],
)
def test_what_no_unit_can_do_is_told(settings: dict[str, object], note: str) -> None:
    assert fit_units(shipped.read("systemd"), facts(**settings)).notes == [note]  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["/run/preforkd/mail", "/run/a:/run/preforkd/mail:/run/z"])
def test_of_several_runtime_directories_the_daemon_takes_its_own(given: str) -> None:
    """systemd sorts them."""
    assert directories("mail", {"RUNTIME_DIRECTORY": given}) == ["/run/preforkd/mail"]
    assert directories("other", {"RUNTIME_DIRECTORY": given}) == [given.partition(":")[0]]


# Fitted to supervisord.


def program(site: Site = INSTALLED, name: str = "mail", **settings: object) -> tuple[Sections, str, list[str]]:
    """The fitted file, the name of its section, and what was told."""
    fitted = fit_programs(shipped.read("supervisor"), facts(site, name, **settings))
    config = Sections(next(iter(fitted.files.values())))
    return config, config.names()[0], fitted.notes


def test_a_program_is_named_and_started_like_the_daemon() -> None:
    config, section, notes = program(name="my+mail 2")
    assert section == "program:my+mail_2"
    assert config.value(section, "command").endswith("/opt/preforkd/bin/preforkd serve -c /etc/preforkd/mail.toml")
    assert config.value(section, "environment") == 'RUNTIME_DIRECTORY="/run/preforkd/my_mail_2",HOME="/"'
    assert config.value(section, "user") == "preforkd"
    assert config.value(section, "directory") == "/"
    assert notes == ["/run/preforkd/my_mail_2 is preforkd's: install -d -o preforkd -m 0700 /run/preforkd/my_mail_2"]


def test_what_looks_like_a_comment_is_none_in_a_command_and_a_fault_elsewhere() -> None:
    config, section, _ = program(Site(options=("-c", "/a ;b #c/50%.toml")))
    parser = UnhosedConfigParser()
    parser.read_string(config.text)
    assert shlex.split(parser.get(section, "command") % {})[-3:] == ["serve", "-c", "/a ;b #c/50%.toml"]
    with pytest.raises(Faults, match="/a ;b: supervisord would take a part of it for a comment; choose another name"):
        program(Site(directory="/a ;b"))


def test_a_name_with_a_colon_is_a_fault() -> None:
    with pytest.raises(Faults, match="name: my:mail: a colon ends the path of its runtime directory; choose another"):
        facts(name="my:mail")


@pytest.mark.parametrize(
    ("settings", "at_least"), [({}, 44), ({"graceful_timeout": "5m"}, 314), ({"eof_timeout": 86400}, 86439)]
)
def test_supervisord_is_more_patient_than_the_daemon(settings: dict[str, object], at_least: int) -> None:
    config, section, _ = program(**settings)  # type: ignore[arg-type]
    assert at_least <= int(config.value(section, "stopwaitsecs")) <= at_least + 1


def test_a_descriptor_that_is_passed_makes_it_a_fcgi_program() -> None:
    site = Site(sockets={"0": parse("unix:/run/mail.sock?mode=0600&user=www&group=mail")})
    config, section, notes = program(site, listen=["fd:0"], METRICS="tcp://0.0.0.0:9109", CONTROL="/run/c")
    assert section == "fcgi-program:mail"
    assert config.value(section, "command").endswith(
        "preforkd serve --set name=mail-%(process_num)d --control /run/c-%(process_num)d "
        "--metrics tcp://0.0.0.0:910%(process_num)d"
    )
    found = {key: config.value(section, key) for key in ("socket", "socket_owner", "socket_mode", "numprocs")}
    assert found == {
        "socket": "unix:///run/mail.sock",
        "socket_owner": "www:mail",
        "socket_mode": "0600",
        "numprocs": "2",
    }
    assert notes[0] == "metrics: each daemon has its own, on port 9100, 9101 …"


def test_two_daemons_cannot_have_one_listener() -> None:
    config, section, _ = program(listen=["fd:0", "tcp://127.0.0.1:2525"])
    assert config.value(section, "numprocs") == "1"


def test_what_supervisord_cannot_pass_is_a_fault() -> None:
    with pytest.raises(Faults) as faults:
        program(listen=["fd:web", "fd:0"])
    assert faults.value.lines == [
        "fd:web: supervisord passes its socket as fd:0",
        "fd:0: supervisord passes one socket, as fd:0",
    ]


def test_what_supervisord_gives_nobody_is_told() -> None:
    wanted = {"listen": ["tcp://0.0.0.0:25"], "nice": -1, "kind": "thread", "threads": 1000}
    _, _, notes = program(**wanted)  # type: ignore[arg-type]
    assert notes[1:] == [
        "port 25: not for preforkd; say --user root, or for a port fd:0 in listen",
        "nice = -1: not for preforkd; say --user root",
        "minfds=2065 belongs into [supervisord], for the limit on open descriptors",
    ]
    _, _, notes = program(Site(user="root"), listen=["tcp://0.0.0.0:25"], nice=-1)
    assert notes == []


# Fitted to Prometheus.


@pytest.mark.parametrize(
    ("metrics", "target"),
    [
        ("tcp://127.0.0.1:9109", "127.0.0.1:9109"),
        ("tcp://0.0.0.0:9109", "localhost:9109"),
        ("tcp://[::]:9109", "localhost:9109"),
        ("tcp://[2001:db8::1]:9109", "[2001:db8::1]:9109"),
        ("tcp://mail.example:9109", "mail.example:9109"),
        ("fd:metrics", "192.0.2.1:9109"),
    ],
)
def test_prometheus_asks_where_the_metrics_are(metrics: str, target: str) -> None:
    site = Site(sockets={"metrics": parse("tcp://192.0.2.1:9109")})
    files = fit_scraping(shipped.read("prometheus"), facts(site, METRICS=metrics)).files
    assert [line.strip() for line in changes("prometheus", "preforkd-scrape.yml", files["preforkd-scrape.yml"])] == [
        *(['-       - targets: ["127.0.0.1:9109"]', f'+       - targets: ["{target}"]'] * (target != "127.0.0.1:9109")),
        "-           daemon: preforkd",
        "+           daemon: mail",
    ]
    assert {name: text for name, text in files.items() if name != "preforkd-scrape.yml"} == {
        name: text for name, text in shipped.read("prometheus").items() if name != "preforkd-scrape.yml"
    }


@pytest.mark.parametrize(
    ("metrics", "fault"),
    [
        ("", "metrics: none are served; set it, such as metrics = "),
        ("unix:/run/metrics", "metrics: unix:/run/metrics: Prometheus cannot ask there; set an address and a port, "),
        ("tcp://127.0.0.1:0", "metrics: tcp://127.0.0.1:0: Prometheus cannot ask there; set an address and a port, "),
        ("fd:metrics", "metrics: fd:metrics: Prometheus cannot ask there; set an address and a port, "),
    ],
)
def test_prometheus_needs_an_address(tmp_path: Path, metrics: str, fault: str) -> None:
    (tmp_path / "mail.toml").write_text(MAIL.replace("tcp://127.0.0.1:9109", metrics))
    status, out, error = run(tmp_path, "prometheus", "-c", "mail.toml", "--output", "there")
    assert (status, out) == (78, "")
    assert error.startswith(f"preforkd: {fault}")
    assert not (tmp_path / "there").exists()


# The command.


@pytest.mark.parametrize("manager", shipped.SHIPPED)
def test_wrong_settings_are_refused_as_check_refuses_them(tmp_path: Path, manager: str) -> None:
    (tmp_path / "mail.toml").write_text(MAIL + "max_children = 0\nkind = 'x'\nlissten = []\n")
    arguments = ("-c", "mail.toml", "--set", "z=1")
    refused = run(tmp_path, *arguments, command="check")
    assert refused[0] == 78
    assert run(tmp_path, manager, *arguments) == refused
    assert run(tmp_path, manager, "-c", "no.toml") == run(tmp_path, "-c", "no.toml", command="check")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("launchd",),
        ("systemd", "--listen"),
        ("systemd", "-c", "x.toml", "a:b"),
        ("systemd", "--max-children", "3"),
        ("systemd", "--user", "me"),
        ("supervisor", "--socket", "web=tcp://0.0.0.0:80"),
        ("prometheus", "--dev"),
    ],
)
def test_wrong_usage_is_status_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, out, error = run(tmp_path, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith(("usage: preforkd", "preforkd: --"))


def test_sockets_are_addresses(tmp_path: Path) -> None:
    (tmp_path / "mail.toml").write_text(MAIL)
    sockets = ("--socket", "web", "--socket", "a=b", "--socket", "b=fd:c")
    assert run(tmp_path, "systemd", "-c", "mail.toml", *sockets) == (
        78,
        "",
        "preforkd: --socket web: want NAME=URL\n"
        "preforkd: --socket a=b: b: want one of tcp, udp, unix, unix-dgram, fd\n"
        "preforkd: --socket b=fd:c: want an address\n",
    )


def test_a_socket_that_nobody_listens_on_is_a_fault(tmp_path: Path) -> None:
    words = ("a:b", "--listen", "fd:web", "--socket", "wbe=tcp://0.0.0.0:80")
    assert run(tmp_path, "systemd", *words) == (
        78,
        "",
        "preforkd: --socket wbe=tcp://0.0.0.0:80: no listen is fd:wbe\n",
    )


@pytest.mark.parametrize("user", ["a b", "a;b", "x\ncommand=/bin/false", "%n", "-x", ""])
@pytest.mark.parametrize("manager", ["systemd", "supervisor"])
def test_a_user_is_one_word_of_a_file(manager: str, user: str, tmp_path: Path) -> None:
    status, out, error = run(tmp_path, manager, "a:b", "--listen", "tcp://127.0.0.1:8000", f"--user={user}")
    assert (status, out) == (78, "")
    assert error == f"preforkd: --user: the name of a user, not {user!r}\n"


def test_a_daemon_of_the_command_line_is_started_with_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("raise SystemExit('nobody runs this')")
    words = ("--metrics", "tcp://127.0.0.1:9109", "--set", "nice=3", "--max-children", "2", "server.py", "8000", "-v")
    status, out, _ = run(tmp_path, "systemd", *words, environment={"PREFORKD_PRELOAD": "true"})
    assert status == 0
    unit = Sections(out)
    assert unit.value("Service", "ExecStart").endswith(
        "serve --max-children 2 --metrics tcp://127.0.0.1:9109 --set nice=3 server.py 8000 -v"
    )
    assert unit.value("Service", "WorkingDirectory") == str(tmp_path)
    assert unit.value("Service", "Environment") == "PREFORKD_PRELOAD=true"
    (tmp_path / "app.py").write_text("")
    status, out, _ = run(tmp_path, "systemd", "app:Handler", "--listen", "tcp://127.0.0.1:80")
    assert Sections(out).value("Service", "WorkingDirectory") == str(tmp_path)


def test_a_daemon_does_not_load_what_only_deploy_needs() -> None:
    code = "import sys; from preforkd import cli, serve; cli.main(['settings']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("\n| ")[2].split())
    assert "preforkd.cli" in loaded
    assert not [name for name in loaded if name.startswith(("preforkd.deploy", "preforkd.supervisor"))]


# Writing.


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "mail.toml"
    path.write_text(MAIL)
    return path


def without_notes(error: str) -> list[str]:
    """Lines of standard error, but for what depends on where this Python is."""
    return [line for line in error.splitlines() if not line.startswith("preforkd: note: ")]


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() if path.is_file() else "" for path in directory.iterdir()}


def test_nothing_is_written_where_one_file_exists(tmp_path: Path, settings: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "preforkd@mail.service").symlink_to("nowhere")
    (there / "preforkd.tmpfiles").write_text("mine")
    before = sorted(os.listdir(there))
    status, out, error = run(tmp_path, "systemd", "-c", settings, "--output", "there")
    assert (status, out) == (1, "")
    assert without_notes(error) == [
        "preforkd: there/preforkd@mail.service: is there already; --force overwrites it. Nothing was written",
        "preforkd: there/preforkd.tmpfiles: is there already; --force overwrites it. Nothing was written",
    ]
    assert sorted(os.listdir(there)) == before
    assert (there / "preforkd.tmpfiles").read_text() == "mine"
    assert run(tmp_path, "systemd", "-c", settings, "--output", "there", "--force")[0] == 0
    assert sorted(os.listdir(there)) == ["preforkd.sysusers", "preforkd.tmpfiles", "preforkd@mail.service"]
    assert not (there / "preforkd@mail.service").is_symlink()
    assert (there / "preforkd@mail.service").stat().st_mode & 0o777 == 0o644


def test_what_all_daemons_share_is_no_obstacle_for_the_second(tmp_path: Path, settings: Path) -> None:
    settings.with_name("dns.toml").write_text(MAIL)
    for name in ("mail", "dns"):
        assert run(tmp_path, "systemd", "-c", f"{name}.toml", "--output", "there")[0] == 0
    assert len(contents(tmp_path / "there")) == 4
    assert run(tmp_path, "systemd", "-c", "dns.toml", "--output", "there")[0] == 1
    assert run(tmp_path, "systemd", "-c", "web.toml", "--output", "there", "--user", "other")[0] == 78
    settings.with_name("web.toml").write_text(MAIL)
    status, _, error = run(tmp_path, "systemd", "-c", "web.toml", "--output", "there", "--user", "other")
    assert status == 1
    assert error.count("is there already") == 2


@pytest.mark.parametrize("force", [False, True])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, settings: Path, *, force: bool
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    if force:
        (there / "preforkd-scrape.yml").write_text("mine")
        (there / "preforkd-alerts.yml").mkdir()
    before = contents(there)
    words = [sys.executable, "-m", "preforkd", "deploy", "prometheus", "-c", settings, "--output", there]
    # A file may have 4 KiB: enough for the first.
    limited = ["prlimit", "--fsize=4096", *map(str, words)] if not force else [*map(str, words), "--force"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1
    (fault,) = done.stderr.splitlines()
    assert fault.startswith(f"preforkd: {there}")
    assert fault.endswith(". Nothing was written")
    assert contents(there) == before


# The real programs.


def fitted_to(directory: Path, manager: str, *arguments: object) -> Path:
    """The directory of the fitted files."""
    assert run(directory, manager, *arguments, "--output", "fitted")[0] == 0
    return directory / "fitted"


def test_systemd_has_nothing_to_say_against_the_units(tmp_path: Path, settings: Path) -> None:
    settings.write_text(
        MAIL.replace('"]', '", "fd:web", "fd:log", "unix:/run/mail/x?group=root", "unix:/srv/x", "udp://[::1]:53"]')
        + 'nice = -5\noom_score_adjust = -5\nreceive_buffer = "4M"\ngraceful_timeout = 99\n'
        + 'kind = "thread"\nthreads = 1000\n'
        + "rlimits = { memlock = 100000000, rtprio = 5 }\n"
    )
    sockets = ("--socket", "web=tcp://0.0.0.0:80", "--socket", "log=udp://[::]:514")
    units = fitted_to(tmp_path, "systemd", "-c", settings, "--user", "root", *sockets)
    names = sorted(path for path in units.iterdir() if path.suffix in (".service", ".socket"))
    assert len(names) == 3
    verify = ["systemd-analyze", "verify", "--man=no", *map(str, names)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")


def test_prometheus_has_nothing_to_say_against_the_config(tmp_path: Path, settings: Path) -> None:
    files = fitted_to(tmp_path, "prometheus", "-c", settings)
    for kind, names in ("config", ["scrape"]), ("rules", ["rules", "alerts"]):
        words = ["promtool", "check", kind, *(str(files / f"preforkd-{name}.yml") for name in names)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, "")
