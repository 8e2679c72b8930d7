"""Telling whoever started us that we are ready: systemd's protocol (sd_notify(3)) and a newline (s6)."""

import os
import socket
from contextlib import suppress


def systemd(*states: str) -> None:
    """Send states such as ``READY=1`` to the service manager, if there is one. Never waits, never fails."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    manager_is_deaf = suppress(OSError)  # which is nothing that serving depends on
    with manager_is_deaf, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto("\n".join(states).encode(), socket.MSG_DONTWAIT, address)


def newline(descriptor: int) -> None:
    """Write a newline to ``descriptor`` and close it, as s6's notification-fd wants it."""
    try:
        os.write(descriptor, b"\n")
        os.close(descriptor)
    except OSError:  # whoever wanted to know has gone
        pass
