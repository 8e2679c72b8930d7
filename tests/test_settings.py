"""Settings as values: where they come from, what they come to, and every fault with its exact words."""

from pathlib import Path

import pytest

from preforkd.settings import DAEMON, SERVICE, Service, reference
from preforkd.sources import Checked, Faults, Value, check, from_environment, from_file, from_pairs

ECHO = '[services.echo]\ntarget = "a:B"\n'
LISTENING = ECHO + 'listen = ["tcp://127.0.0.1:7"]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "preforkd.toml"


def checked(file: Path, toml: str, environment: dict[str, str] | None = None, pairs: tuple[str, ...] = ()) -> Checked:
    file.write_text(toml)
    values, faults = from_file(str(file))
    return check([*values, *from_environment(environment or {}), *from_pairs(pairs)], "preforkd", faults)


def faults_of(file: Path, toml: str, environment: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(Faults) as caught:
        checked(file, toml, environment)
    return caught.value.lines


def echo(file: Path, toml: str, environment: dict[str, str] | None = None, pairs: tuple[str, ...] = ()) -> Service:
    return checked(file, toml, environment, pairs).settings.services["echo"]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("max_children = 0", "max_children: at least 1, not 0"),
        ("max_children = 4097", "max_children: at most 4096, not 4097"),
        ("max_children = 1.5", "max_children: a whole number, not 1.5"),
        ("max_children = true", "max_children: a whole number, not true"),
        ('max_children = "4"', "max_children: a whole number, not '4'"),
        ("max_childern = 4", "max_childern: unknown setting 'max_childern'; did you mean max_children?"),
        ("max_spare = 2\nmin_spare = 3", "min_spare: at most max_spare, which is 2, not 3"),
        ("max_spare = 5", "max_spare: at most what max_children can have idle, 4, not 5"),
        ("max_spare = 2\nstart_children = 5", "start_children: at most max_children, which is 4, not 5"),
        ("start_children = 2", "start_children: 2 of a fixed number; max_spare makes the pool elastic"),
        ("min_spare = 2", "min_spare: 2 spare of a fixed number; max_spare makes the pool elastic"),
        ("sizzle = 4", "sizzle: unknown setting 'sizzle'"),
        ('kind = "coroutine"', "kind: one of gevent, process, thread, not 'coroutine'"),
        ("preload = 1", "preload: true or false, not 1"),
        ("handler = 3", "handler: a string, not 3"),
        ("graceful_timeout = -1", "graceful_timeout: at least 0, not -1"),
        ('graceful_timeout = "2d"', "graceful_timeout: at most 86400, not '2d'"),
        ("graceful_timeout = inf", "graceful_timeout: at most 86400, not inf"),
        ("graceful_timeout = nan", 'graceful_timeout: a number or text such as "30s" or "2m", not nan'),
        ('graceful_timeout = "30x"', 'graceful_timeout: a number or text such as "30s" or "2m", not \'30x\''),
        ('graceful_timeout = "1.2.3s"', 'graceful_timeout: a number or text such as "30s" or "2m", not \'1.2.3s\''),
        ('max_packet_size = "2M"', "max_packet_size: at most 1M, not '2M'"),
        ('max_packet_size = "9Q"', 'max_packet_size: a whole number or text such as "64K" or "512M", not \'9Q\''),
    ],
)
def test_a_wrong_setting_of_a_service_is_named_with_what_is_wanted(file: Path, setting: str, fault: str) -> None:
    assert faults_of(file, LISTENING + setting) == [f"services.echo.{fault}"]


@pytest.mark.parametrize(
    ("toml", "faults"),
    [
        ("", ["services: none; want a table [services.NAME] for each"]),
        ("services = 3", ["services: want a table for each, [services.NAME]"]),
        ("[services]\necho = 1", ["services.echo: want a table with a target and a listen, not 1"]),
        ("[services.echo]", ["services.echo: want a table with a target and a listen, not {}"]),
        (ECHO, ["services.echo.listen: at least one address, such as tcp://127.0.0.1:9999"]),
        (ECHO + "listen = []", ["services.echo.listen: at least one address, such as tcp://127.0.0.1:9999"]),
        (ECHO + 'listen = "tcp://a:1"', ["services.echo.listen: a list of strings, not 'tcp://a:1'"]),
        (ECHO + 'listen = ["tcp://a:1", 2]', ["services.echo.listen: a list of strings, not ['tcp://a:1', 2]"]),
        (LISTENING.replace("a:B", ""), ["services.echo.target: text that is not empty, not ''"]),
        (LISTENING.replace('"a:B"', "3"), ["services.echo.target: a string, not 3"]),
        (LISTENING.replace("target", "#"), ["services.echo.target: required: what to serve, as module:name"]),
        (LISTENING.replace("echo", "metrics"), ["services.metrics: the name is the exporter's; choose another"]),
        (
            "max_children = 3\n" + LISTENING,
            ["max_children: is a setting of a service: [services.NAME] max_children = …"],
        ),
        ('metric = "x"\n' + LISTENING, ["metric: unknown setting 'metric'; did you mean metrics?"]),
        ('name = "a b"\n' + LISTENING, [r"name: text that matches ^[\w.@:-]*$, not 'a b'"]),
        ("ready_fd = -1\n" + LISTENING, ["ready_fd: at least 0, not -1"]),
        ('metrics = "tcp://127.0.0.1:7"\n' + LISTENING, ["metrics: tcp://127.0.0.1:7 is taken by echo already"]),
        (
            LISTENING + LISTENING.replace("echo", "other"),
            ["services.other.listen: tcp://127.0.0.1:7 is taken by echo already"],
        ),
        (
            ECHO + 'listen = ["unix:/run/x", "unix-dgram:/run/y/../x", "unix:@a", "unix:@a", "fd:3", "fd:3"]',
            [
                "services.echo.listen: unix-dgram:/run/y/../x is taken by echo already",
                "services.echo.listen: unix:@a is taken by echo already",
                "services.echo.listen: fd:3 is taken by echo already",
            ],
        ),
        (
            LISTENING + "threads = 8",
            ["services.echo.threads: is for another kind of worker; set kind = thread as well"],
        ),
        (
            LISTENING + 'kind = "thread"\nthreads = 1000\nmax_children = 200',
            ["services: 200000 lanes of all workers; want at most 131072, threads or greenlets"],
        ),
    ],
)
def test_what_is_wrong_as_a_whole_is_said_once(file: Path, toml: str, faults: list[str]) -> None:
    assert faults_of(file, toml) == faults


def test_every_fault_is_said_and_not_only_the_first(file: Path) -> None:
    toml = 'metrics = "x"\n' + LISTENING + "max_children = 0\nkinds = 1\n[services.b]\ntarget = 1"
    assert faults_of(file, toml, {"PREFORKD_NAME": " ", "PREFORKD_SERVICES__C__PRELOAD": "1"}) == [
        "services.echo.max_children: at least 1, not 0",
        "services.echo.kinds: unknown setting 'kinds'; did you mean kind?",
        "services.b.target: a string, not 1",
        r"PREFORKD_NAME: text that matches ^[\w.@:-]*$, not ' '",
        "PREFORKD_SERVICES__C__PRELOAD: unknown service 'c'",
        "services.b.listen: at least one address, such as tcp://127.0.0.1:9999",
        "metrics: x: want one of tcp, udp, unix, unix-dgram, fd",
    ]


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "want one of tcp, udp, unix, unix-dgram, fd"),
        ("nonsense", "want one of tcp, udp, unix, unix-dgram, fd"),
        ("http://127.0.0.1:1", "want one of tcp, udp, unix, unix-dgram, fd"),
        ("tpc://127.0.0.1:1", "did you mean tcp:?"),
        ("tcp://127.0.0.1", "want tcp://127.0.0.1:9999"),
        ("tcp://:1", "want tcp://127.0.0.1:9999"),
        ("udp://127.0.0.1", "want udp://127.0.0.1:9999"),
        ("tcp://127.0.0.1:1/path", "want tcp://127.0.0.1:9999"),
        ("tcp://127.0.0.1:65536", "Port out of range 0-65535"),
        ("tcp://127.0.0.1:x", "Port could not be cast to integer value as 'x'"),
        ("tcp://[::1:1", "Invalid IPv6 URL"),
        ("tcp://[::]:1?v6only=2", "v6only is 0 or 1"),
        ("tcp://[::]:1?v6onli=1", "unknown option 'v6onli'; did you mean v6only?"),
        ("tcp://239.1.2.3:1?interface=lo", "unknown option 'interface'"),
        ("udp://239.1.2.3:1?interfaces=lo", "unknown option 'interfaces'; did you mean interface?"),
        ("udp://239.1.2.3:1?interface=", "interface is a name or an address, such as eth0"),
        ("udp://127.0.0.1:1?interface=lo", "interface is for a multicast group, such as udp://239.1.2.3:5000"),
        ("udp://239.1.2.3:1?interface=fe80::1", "interface is an address of IPv6, but the group is of IPv4"),
        ("udp://[ff02::1]:1", "a group of this scope needs an interface, such as ?interface=eth0"),
        ("unix:", "want unix:/run/x.sock"),
        ("unix://run/x", "want unix:/run/x.sock"),
        ("unix:/run/\\u0000x", "want unix:/run/x.sock"),
        ("unix:/x?mode=9", "mode is octal, such as 0660"),
        ("unix:/x?mode=", "mode is octal, such as 0660"),
        ("unix:/x?mode=77777", "mode is octal, such as 0660"),
        ("unix:/x?mod=0660", "unknown option 'mod'; did you mean mode?"),
        ("unix-dgram:", "want unix-dgram:/run/x.sock"),
        (f"unix:/{107 * 'x'}", "the path is longer than 107 bytes (unix(7))"),
        ("fd:", "want fd:3 or fd:NAME"),
        ("fd:a:b", "want fd:3 or fd:NAME"),
        ("fd:3?mode=0600", "unknown option 'mode'"),
    ],
)
def test_a_wrong_address_is_named_with_what_is_wanted(file: Path, url: str, fault: str) -> None:
    said = url.replace("\\u0000", "\0")
    assert faults_of(file, f'{ECHO}listen = ["{url}"]') == [f"services.echo.listen: {said}: {fault}"]


def test_the_longest_path_and_any_number_of_ports_to_be_chosen_are_no_fault(file: Path) -> None:
    urls = [f"unix:/{106 * 'x'}", "tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "udp://127.0.0.1:7", "tcp://127.0.0.1:7"]
    assert [a.url for a in checked(file, f"{ECHO}listen = {urls}").addresses["echo"]] == urls


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [("30", 30.0), ("0.5", 0.5), ('"30s"', 30.0), ('"2m"', 120.0), ('"1.5h"', 5400.0), ('"1d"', 86400.0),
     ('"250ms"', 0.25), ('"3 s"', 3.0), ("0", 0.0)],
)  # fmt: skip
def test_a_duration_is_a_number_of_seconds_or_has_a_unit(file: Path, raw: str, seconds: float) -> None:
    assert echo(file, f"{LISTENING}graceful_timeout = {raw}").graceful_timeout == seconds
    assert echo(file, LISTENING, {"PREFORKD_EOF_TIMEOUT": raw.strip('"')}).eof_timeout == seconds


@pytest.mark.parametrize(
    ("raw", "size"), [("1000", 1000), ('"64K"', 1 << 16), ('"1M"', 1 << 20), ('"1.5K"', 1536), ('"0.5M"', 1 << 19)]
)
def test_a_size_is_a_number_of_bytes_or_has_a_unit(file: Path, raw: str, size: int) -> None:
    assert echo(file, f"{LISTENING}max_packet_size = {raw}").max_packet_size == size


def test_the_units_reach_from_kibibytes_to_tebibytes() -> None:
    sizes = [SERVICE["max_rss"].convert(text, is_text=False) for text in ("512M", "2G", "1T")]
    assert sizes == [512 << 20, 2 << 30, 1 << 40]
    with pytest.raises(ValueError, match="7B"):
        SERVICE["max_rss"].convert("7B", is_text=False)


def test_defaults_yield_to_the_file_the_environment_and_the_command_line_in_this_order(file: Path) -> None:
    environment, pairs = {"PREFORKD_MAX_CHILDREN": "6"}, ("max_children=7",)
    in_file = LISTENING + "max_children = 5"
    assert echo(file, LISTENING).max_children == 4
    assert echo(file, in_file).max_children == 5
    assert echo(file, in_file, environment).max_children == 6
    assert echo(file, in_file, environment, pairs).max_children == 7
    assert echo(file, in_file, {}, pairs).max_children == 7


def test_a_key_without_a_service_is_for_all_of_them_and_one_with_a_service_for_that_one(file: Path) -> None:
    toml = LISTENING + LISTENING.replace("echo", "B-2").replace(":7", ":8")
    environment = {
        "PREFORKD_PRELOAD": "false",
        "PREFORKD_METRICS": "tcp://127.0.0.1:9",
        "PREFORKD_SERVICES__B_2__MAX_CHILDREN": "9",
        "PREFORKD_SERVICES__ECHO__LISTEN": "tcp://127.0.0.1:1, udp://127.0.0.1:1",
        "PATH": "/bin",
    }
    settings = checked(file, toml, environment, ("services.B-2.eof_timeout=1m", "name=n")).settings
    assert (settings.name, settings.metrics) == ("n", "tcp://127.0.0.1:9")
    one, two = settings.services["echo"], settings.services["B-2"]
    assert [one.preload, two.preload] == [False, False]
    assert [one.max_children, two.max_children] == [4, 9]
    assert [one.eof_timeout, two.eof_timeout] == [5, 60]
    assert one.listen == ["tcp://127.0.0.1:1", "udp://127.0.0.1:1"]


@pytest.mark.parametrize(
    ("variable", "raw", "fault"),
    [
        ("PREFORKD_MAX_CHILDREN", "0", "at least 1, not '0'"),
        ("PREFORKD_PRELOAD", "maybe", "true or false, not 'maybe'"),
        ("PREFORKD_MAX_CHILDERN", "1", "unknown setting 'max_childern'; did you mean max_children?"),
        ("PREFORKD_METRIC", "1", "unknown setting 'metric'; did you mean metrics?"),
        ("PREFORKD_SERVICES__ECO__PRELOAD", "1", "unknown service 'eco'; did you mean echo?"),
        ("PREFORKD_SERVICES__ECHO__PRELOADS", "1", "unknown setting 'preloads'; did you mean preload?"),
        ("PREFORKD_SERVICES__ECHO", "1", "unknown setting 'services.echo'"),
        ("PREFORKD_LISTEN", "tcp:", "tcp:: want tcp://127.0.0.1:9999"),
    ],
)
def test_a_fault_in_the_environment_names_the_variable(file: Path, variable: str, raw: str, fault: str) -> None:
    assert faults_of(file, LISTENING, {variable: raw}) == [f"{variable}: {fault}"]


def test_a_pair_without_an_equals_sign_is_a_fault() -> None:
    with pytest.raises(Faults) as caught:
        from_pairs(["preload", "a=b", "c"])
    assert caught.value.lines == ["--set preload: want KEY=VALUE", "--set c: want KEY=VALUE"]


def test_a_value_may_hold_equals_signs_and_the_last_of_two_pairs_wins(file: Path) -> None:
    assert from_pairs(["handler=a=b"]) == [Value("--set handler", None, "handler", "a=b", is_text=True)]
    assert echo(file, LISTENING, {}, ("max_children=2", "max_children=3")).max_children == 3


def test_a_file_that_cannot_be_read_is_a_fault_that_names_it(file: Path) -> None:
    for content, words in ((b"x =", "Invalid value"), (b"\xff", "can't decode")):
        file.write_bytes(content)
        with pytest.raises(Faults, match=words) as caught:
            from_file(str(file))
        assert caught.value.lines[0].startswith(f"{file}: ")
    file.unlink()
    with pytest.raises(Faults) as caught:
        from_file(str(file))
    assert caught.value.lines == [f"{file}: No such file or directory"]


def test_every_setting_is_in_the_reference_with_its_help_default_and_bounds() -> None:
    rows = [row for row in reference().splitlines() if row.startswith("| `")]
    keys = [f"`{key}`" for key in [*DAEMON, *SERVICE]]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == keys
    assert all(setting.help for setting in [*DAEMON.values(), *SERVICE.values()])
    size = "| `max_children` | 4 workers | 1 … 4096 | workers; with `max_spare`, at most |"
    assert size in rows
    assert any("`max_packet_size` | 0 bytes | 0 … 1M |" in row for row in rows)
