"""Sockets that systemd has opened, by the socket unit as it is shipped."""

from functools import partial
from pathlib import Path

from tests.daemon import eventually
from tests.systemd.installed import Instance, drop_in, target
from tests.systemd.unit import Clients, ask_datagram, ask_stream, systemctl

BY_NAME = """
[services.web]
target = "{upper}"
listen = ["fd:web"]
probation = 0
[services.tls]
target = "{pid}"
listen = ["fd:web-tls"]
probation = 0
"""


def by_name() -> str:
    return BY_NAME.format(upper=target("Upper"), pid=target("Obey"))


def test_low_ports_are_served_without_any_capability_and_outlive_every_stop() -> None:
    with Instance(by_name(), start=False) as unit:
        drop_in("preforkd@web-tls.socket", "Socket", ListenStream="\n443", Service=unit.name)
        systemctl("daemon-reload")
        sockets = ("preforkd@web.socket", "preforkd@web-tls.socket")
        systemctl("start", *sockets)
        assert unit.show("ActiveState") == "inactive"
        assert ask_stream(("127.0.0.1", 80)) == b"QUESTION\n"  # the first client starts it
        assert ask_stream(("127.0.0.1", 443)) == b"what?\n"
        status = Path(f"/proc/{unit.pid}/status").read_text()
        assert all(f"Cap{each}:\t{0:016x}\n" in status for each in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
        with Clients(partial(ask_stream, ("127.0.0.1", 80)), b"QUESTION\n") as clients:
            for command in ("reload", "restart", "stop"):
                clients.until_answered(50)
                systemctl(command, unit.name)
            clients.until_answered(50)
            outcomes = clients.stop()
        assert outcomes == {"answered": outcomes["answered"]}
        assert systemctl("is-active", *sockets) == "active\nactive"


def test_a_service_that_names_its_sockets_starts_them() -> None:
    with Instance(by_name(), start=False, Sockets="preforkd@web.socket preforkd@web-tls.socket") as unit:
        drop_in("preforkd@web-tls.socket", "Socket", ListenStream="\n443", Service=unit.name)
        systemctl("daemon-reload")
        unit.start()
        assert ask_stream(("127.0.0.1", 443)) == b"what?\n"


def test_sockets_of_one_unit_share_its_name_and_may_be_datagrams() -> None:
    settings = f'[services.web]\ntarget = "{target("UpperDatagram")}"\nlisten = ["fd:web"]\n'
    with Instance(settings, start=False) as unit:
        drop_in("preforkd@web.socket", "Socket", ListenStream="", ListenDatagram="127.0.0.1:514\n127.0.0.1:515")
        systemctl("daemon-reload")
        systemctl("start", "preforkd@web.socket")
        for port in (514, 515):
            assert ask_datagram(("127.0.0.1", port)) == b"QUESTION\n"
        # What ExecStartPre= looks at is not the socket: it cannot be passed that.
        unit.log.wait_for("^service=web listen=fd:web$")
        assert not unit.log.matches("cannot serve")
        eventually(lambda: unit.show("NFileDescriptorStore") == "1", "the scoreboard")
