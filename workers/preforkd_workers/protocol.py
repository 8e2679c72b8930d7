"""What master, mold and worker say to each other.

Between master and mold: packets on a SOCK_SEQPACKET pair (unix(7)), JSON objects, descriptors beside them.
From worker to master: lines of text on its lifeline. A line that begins with none of the words below is a line of a
stack or a traceback.
"""

import json
import socket
from typing import Any

# A worker's words on its lifeline.
READY = "preforkd:ready"  # and its pid
FAILED = "preforkd:failed"  # the traceback follows
NOTICE = "preforkd:notice"  # and an event for the log
SHUTDOWN = "preforkd:shutdown"  # serve_forever() is to end, a handler says

# The longest packet; a longer traceback loses its middle.
PACKET = 1 << 16

Message = dict[str, Any]


def send(channel: socket.socket, message: Message, descriptors: list[int] | None = None) -> None:
    """Send one message, with descriptors for the other side to own copies of.

    Raises BlockingIOError when the channel is full and in non-blocking mode, BrokenPipeError when nobody is there.
    """
    packet = json.dumps(message).encode()
    if descriptors:
        socket.send_fds(channel, [packet], descriptors)
    else:
        channel.send(packet)


def receive(channel: socket.socket) -> tuple[Message | None, list[int]]:
    """Receive one message and its descriptors; ``(None, [])`` at end-of-file.

    Raises BlockingIOError when there is none and the channel is in non-blocking mode.
    """
    try:
        packet, descriptors, _, _ = socket.recv_fds(channel, PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # the other side died with messages unread
        return None, []
    return (json.loads(packet), descriptors) if packet else (None, [])


def shorten(text: str, limit: int = PACKET // 4) -> str:
    """A text that fits into a packet: of a long one the beginning and the end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n  [{len(text) - limit} characters left out]\n{text[-limit // 2 :]}"
