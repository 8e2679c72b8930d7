"""Sockets that systemd has opened, found by their name."""

from tests.daemon import eventually
from tests.systemd.unit import Unit, ask_stream, serve, systemctl

ONE, OTHER = ("127.0.0.1", 9000), ("127.0.0.1", 9001)
SOCKET = {"ListenStream": "127.0.0.1:9000", "FileDescriptorName": "web"}


def test_the_first_client_starts_the_daemon_and_its_socket_is_found_by_name() -> None:
    with Unit(":Upper", "--listen", "fd:web", start=False) as unit:
        unit.write("socket", Socket=SOCKET)
        systemctl("daemon-reload")
        systemctl("start", f"{unit.name}.socket")
        assert ask_stream(ONE) == b"QUESTION\n"
        kept = "the scoreboard, and not the socket, which is the socket unit's to keep"
        eventually(lambda: unit.show("NFileDescriptorStore") == "1", kept)
        systemctl("restart", unit.name)
        assert ask_stream(ONE) == b"QUESTION\n"
        assert not unit.log.matches("^descriptor_unused")


def test_a_name_may_be_that_of_several_sockets_and_stands_beside_a_number_and_an_address() -> None:
    more = ("--listen", "tcp://127.0.0.1:9002")
    with Unit(":Upper", "--listen", "fd:web", *more, start=False) as unit:
        unit.write("socket", Socket={**SOCKET, "ListenStream": "127.0.0.1:9000\nListenStream=127.0.0.1:9001"})
        systemctl("daemon-reload")
        systemctl("start", f"{unit.name}.socket")
        for address in (ONE, OTHER, ("127.0.0.1", 9002)):
            assert ask_stream(address) == b"QUESTION\n"
        unit.change(ExecStart=serve(":Upper", "--listen", "fd:3", *more))
        systemctl("restart", unit.name)
        assert ask_stream(ONE) == b"QUESTION\n"
        assert ask_stream(("127.0.0.1", 9002)) == b"QUESTION\n"


def test_a_name_that_was_not_passed_is_said() -> None:
    with Unit(":Upper", "--listen", "fd:web", Restart="no", start=False) as unit:
        systemctl("start", "--no-block", unit.name)
        unit.log.wait_for('^cannot_start reason="fd:web: no descriptor of this name was passed; ')
