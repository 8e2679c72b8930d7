"""Every kind of address with a real socket behind it, what is removed and what is left alone, and every refusal."""

import fcntl
import os
import pwd
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.daemon import DEADLINE, Daemon, eventually, unprivileged

HAS_IPV6 = Path("/proc/net/if_inet6").exists()
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this kernel has no IPv6")


Place = str | tuple[str, int]


def upper(address: Place, family: int = socket.AF_UNIX) -> None:
    """The daemon answers there, over a stream."""
    with socket.socket(family) as client:
        client.settimeout(DEADLINE)
        client.connect(address)
        client.sendall(b"a\n")
        assert client.recv(9) == b"A\n"


def upper_datagram(address: Place, family: int, own: Place) -> None:
    """The daemon answers there, over datagrams."""
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE)
        client.bind(own)
        client.sendto(b"a", address)
        assert client.recv(9) == b"A"


def refusal(daemon: Daemon) -> str:
    """The one line with which it has ended."""
    assert daemon.wait() == 1
    (line,) = [line for line in daemon.log.lines if not line.startswith("no_control ")]
    event, reason, *_ = line.split('"')
    assert event == "cannot_start reason="
    return reason


def test_tcp(serve: Serve) -> None:
    daemon = serve(":Upper", "--listen", "tcp://127.0.0.1:0")
    assert daemon.url() == f"tcp://127.0.0.1:{daemon.address()[1]}"
    upper(daemon.address(), socket.AF_INET)


def test_a_host_may_be_a_name(serve: Serve) -> None:
    upper(serve(":Upper", "--listen", "tcp://localhost:0").address(), socket.AF_INET)


@needs_ipv6
def test_tcp_on_all_addresses_of_ipv6_takes_ipv4_as_well(serve: Serve) -> None:
    daemon = serve(":Upper", "--listen", "tcp://[::]:0")
    port = daemon.address()[1]
    assert daemon.url() == f"tcp://[::]:{port}"
    upper(("::1", port), socket.AF_INET6)
    upper(("127.0.0.1", port), socket.AF_INET)


@needs_ipv6
def test_tcp_with_v6only_leaves_ipv4_alone(serve: Serve) -> None:
    port = serve(":Upper", "--listen", "tcp://[::]:0?v6only=1").address()[1]
    upper(("::1", port), socket.AF_INET6)
    with pytest.raises(ConnectionRefusedError):
        upper(("127.0.0.1", port), socket.AF_INET)


def test_udp(serve: Serve) -> None:
    daemon = serve(":UpperDatagram", "--listen", "udp://127.0.0.1:0")
    assert daemon.url().startswith("udp://127.0.0.1:")
    upper_datagram(daemon.address(), socket.AF_INET, ("127.0.0.1", 0))


@needs_ipv6
def test_udp_over_ipv6(serve: Serve) -> None:
    daemon = serve(":UpperDatagram", "--listen", "udp://[::1]:0")
    upper_datagram(daemon.address(), socket.AF_INET6, ("::1", 0))


def test_unix_with_mode_and_owner_and_its_file_is_removed_at_stop(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    owner = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    group = 12345 if os.geteuid() == 0 else os.getegid()
    daemon = serve(":Upper", "--listen", f"unix:{path}?mode=0640&user={owner}&group={group}")
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_uid, found.st_gid) == (pwd.getpwnam(owner).pw_uid, group)
    assert daemon.url() == f"unix:{path}"
    upper(str(path))
    assert daemon.stop() == 0
    assert not path.exists()


def test_a_relative_unix_path_is_in_the_working_directory_and_open_to_all(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(":Upper", "--listen", "unix:x.sock")
    assert stat.S_IMODE((tmp_path / "x.sock").stat().st_mode) == 0o666
    upper(str(tmp_path / "x.sock"))
    assert daemon.stop() == 0
    assert not (tmp_path / "x.sock").exists()


def test_unix_datagrams(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(":UpperDatagram", "--listen", f"unix-dgram:{tmp_path}/x?mode=0600")
    assert daemon.url() == f"unix-dgram:{tmp_path}/x"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    upper_datagram(f"{tmp_path}/x", socket.AF_UNIX, f"{tmp_path}/own")
    assert daemon.stop() == 0
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("scheme", ["unix", "unix-dgram"])
def test_abstract_names_leave_no_file(serve: Serve, tmp_path: Path, scheme: str) -> None:
    name = f"preforkd-test-{os.getpid()}"
    daemon = serve(":Upper" if scheme == "unix" else ":UpperDatagram", "--listen", f"{scheme}:@{name}")
    assert daemon.url() == f"{scheme}:@{name}"
    if scheme == "unix":
        upper(f"\0{name}")
    else:
        upper_datagram(f"\0{name}", socket.AF_UNIX, f"\0{name}-client")
    assert list(tmp_path.iterdir()) == []


def test_an_inherited_stream_socket_is_served_and_outlives_the_daemon(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        daemon = serve(":Upper", "--listen", f"fd:{given.fileno()}", pass_fds=[given.fileno()])
        host, port = given.getsockname()
        assert daemon.url() == f"tcp://{host}:{port}"
        upper((host, port), socket.AF_INET)
        assert daemon.stop() == 0
        with socket.create_connection((host, port), DEADLINE):  # nobody was refused: the backlog is still there
            given.accept()[0].close()


def test_an_inherited_datagram_socket_is_served_and_left_in_blocking_mode(serve: Serve) -> None:
    """O_NONBLOCK is a matter of the open file description, and so of whoever has handed the socket over."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as given:
        given.bind(("127.0.0.1", 0))
        daemon = serve(":UpperDatagram", "--listen", f"fd:{given.fileno()}", pass_fds=[given.fileno()])
        upper_datagram(given.getsockname(), socket.AF_INET, ("127.0.0.1", 0))
        assert daemon.stop() == 0
        assert not fcntl.fcntl(given, fcntl.F_GETFL) & os.O_NONBLOCK


def test_an_inherited_unix_socket_keeps_its_file(serve: Serve, tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as given:
        given.bind(f"{tmp_path}/x")
        given.listen()
        daemon = serve(":Upper", "--listen", f"fd:{given.fileno()}", pass_fds=[given.fileno()])
        assert daemon.url() == f"unix:{tmp_path}/x"
        upper(f"{tmp_path}/x")
        assert daemon.stop() == 0
        assert (tmp_path / "x").is_socket()


def test_every_bound_address_is_printed_once(serve: Serve, tmp_path: Path) -> None:
    urls = ["tcp://127.0.0.1:0", "tcp://127.0.0.1:0", f"unix:{tmp_path}/x"]
    daemon = serve(":Upper", *(f"--listen={url}" for url in urls), "--metrics", "tcp://127.0.0.1:0")
    said = [match[1] for match in daemon.log.matches(r"^listening service=(\S+) url=\S+")]
    assert said == ["Upper", "Upper", "Upper", "metrics"]
    assert len({daemon.url(None, index) for index in range(4)}) == 4
    for index in range(2):
        upper(daemon.address("Upper", index), socket.AF_INET)
    upper(f"{tmp_path}/x")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_stale_socket_file_is_replaced(serve: Serve, tmp_path: Path, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(f"{tmp_path}/x")
    before = (tmp_path / "x").stat().st_ctime_ns
    serve(":Upper", "--listen", f"unix:{tmp_path}/x")
    assert (tmp_path / "x").stat().st_ctime_ns != before
    upper(f"{tmp_path}/x")


@pytest.mark.parametrize("scheme", ["unix", "unix-dgram"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_live_socket_file_is_an_error_and_left_alone(
    serve: Serve, tmp_path: Path, kind: socket.SocketKind, scheme: str
) -> None:
    with socket.socket(socket.AF_UNIX, kind) as alive:
        alive.bind(f"{tmp_path}/x")
        if kind == socket.SOCK_STREAM:
            alive.listen()
        said = refusal(serve(":Upper", "--listen", f"{scheme}:{tmp_path}/x", ready=False))
        wanted = f"services.Upper.listen: {scheme}:{tmp_path}/x: address in use: another process listens there"
        assert said == wanted
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(f"{tmp_path}/x")


def test_a_second_daemon_on_the_same_unix_socket_does_no_harm_to_the_first(serve: Serve, tmp_path: Path) -> None:
    serve(":Upper", "--listen", f"unix:{tmp_path}/x")
    assert "another process listens there" in refusal(serve(":Upper", "--listen", f"unix:{tmp_path}/x", ready=False))
    upper(f"{tmp_path}/x")


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: p.mkdir(), lambda p: os.mkfifo(p)])
def test_what_is_no_socket_is_never_touched(serve: Serve, tmp_path: Path, make: object) -> None:
    path = tmp_path / "x"
    make(path)  # type: ignore[operator]
    before = path.lstat()
    said = refusal(serve(":Upper", "--listen", f"unix:{path}", ready=False))
    assert said.endswith(f"unix:{path}: a file that is no socket is there; remove it or choose another path")
    assert path.lstat() == before


def test_somebody_elses_file_at_our_path_is_not_removed_at_stop(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(":Upper", "--listen", f"unix:{tmp_path}/x")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{tmp_path}/other")
        os.rename(f"{tmp_path}/other", f"{tmp_path}/x")
        inode = (tmp_path / "x").stat().st_ino
        assert daemon.stop() == 0
        assert (tmp_path / "x").stat().st_ino == inode


def test_a_file_that_is_gone_already_is_no_news_at_stop(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(":Upper", "--listen", f"unix:{tmp_path}/x")
    (tmp_path / "x").unlink()
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.text


@pytest.mark.parametrize("option", ["user=no-such-user", "group=no-such-group"])
def test_an_owner_that_does_not_exist_is_an_error_and_leaves_no_file(serve: Serve, tmp_path: Path, option: str) -> None:
    said = refusal(serve(":Upper", "--listen", f"unix:{tmp_path}/x?{option}", ready=False))
    kind, name = option.split("=")
    assert said.endswith(f": there is no {kind} '{name}'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scheme", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)])
def test_a_port_that_is_taken_is_an_error(serve: Serve, scheme: str, kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as taker:
        taker.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taker.listen()
        url = f"{scheme}://127.0.0.1:{taker.getsockname()[1]}"
        said = refusal(serve(":Upper", "--listen", url, ready=False))
    assert said == f"services.Upper.listen: {url}: address in use: stop whoever listens there, or choose another port"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("tcp://203.0.113.1:0", "this machine has no such address"),
        ("fd:99", "no such descriptor is open; have whoever starts this pass it"),
        ("fd:0", "is no socket; have whoever starts this pass a listening one"),
        ("unix:/no/such/x", "no such directory: /no/such"),
    ],
)
def test_what_cannot_be_bound_is_named_with_what_to_do(serve: Serve, url: str, words: str) -> None:
    assert refusal(serve(":Upper", "--listen", url, ready=False)) == f"services.Upper.listen: {url}: {words}"


def test_every_refusal_is_said_and_what_was_bound_is_let_go(serve: Serve, tmp_path: Path) -> None:
    urls = [f"unix:{tmp_path}/x", "fd:99", "fd:98"]
    daemon = serve(":Upper", *(f"--listen={url}" for url in urls), "--metrics", "fd:97", ready=False)
    assert daemon.wait() == 1
    assert [line.partition("fd:")[2][:2] for line in daemon.log.lines] == ["99", "98", "97"]
    assert list(tmp_path.iterdir()) == []


def test_a_low_port_without_the_right_to_it_is_an_error(serve: Serve) -> None:
    port = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) - 1
    if port < 1:
        pytest.skip("here every port is free to all (net.ipv4.ip_unprivileged_port_start)")
    url = f"tcp://127.0.0.1:{port}"
    target = "preforkd_workers.samples:Upper"
    said = refusal(serve(target, "--listen", url, prefix=unprivileged(), ready=False))
    advice = "a port below 1024 needs root, CAP_NET_BIND_SERVICE, or a socket passed as fd:N"
    assert said == f"services.Upper.listen: {url}: permission denied: {advice}"


def test_a_port_is_free_again_at_once_although_connections_linger(serve: Serve) -> None:
    daemon = serve(":Pid", "--listen", "tcp://127.0.0.1:0")
    url = daemon.url()
    assert daemon.ask(b"")  # the server closes first: its side goes into TIME_WAIT
    assert daemon.stop() == 0
    assert serve(":Pid", "--listen", url).ask(b"")


def test_no_listener_stays_open_when_the_daemon_has_left(serve: Serve) -> None:
    daemon = serve(":Upper", "--listen", "tcp://127.0.0.1:0")
    address = daemon.address()
    assert daemon.stop() == 0
    eventually(lambda: not daemon.family())
    with pytest.raises(ConnectionRefusedError):
        upper(address, socket.AF_INET)
