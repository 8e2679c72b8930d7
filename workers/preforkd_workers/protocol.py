"""What master, mold and worker say to each other: text, a word and then the rest.

Between master and mold: packets on a SOCK_SEQPACKET pair (unix(7)); the master's are orders, with the worker's end of a
lifeline each; and answers to a script that binds. From worker to master: lines on its lifeline. A packet or a
line that begins with none of the words is part of a stack or a traceback.

Whatever a mold and the process in the middle touch between two forks, every worker has a copy of: so this is plain.
"""

import array
import signal
import socket
import sys
from typing import NamedTuple

WORD = "preforkd:"  # so begins every word; what does not is part of a stack

# A worker's words on its lifeline.
READY = "preforkd:ready"  # and its pid
FAILED = "preforkd:failed"  # the traceback follows
NOTICE = "preforkd:notice"  # and an event with its fields, in JSON
LEAVING = "preforkd:leaving"  # somebody has told it to drain
ABANDONED = "preforkd:abandoned"  # it leaves although lanes hold requests, which are past their hard deadline
WORN = "preforkd:worn"  # it has ended as many requests as it is to, or more
TRIED = "preforkd:tried"  # on probation, it has ended some more requests
SHUTDOWN = "preforkd:shutdown"  # serve_forever() is to end, a handler says

# A mold's words on its channel, beside READY with the kind of the target, FAILED with the reason, and NOTICE.
SPAWNED = "preforkd:spawned"  # serial and pid of a worker
REFUSED = "preforkd:refused"  # serial of a worker that could not be forked, and the reason

# Those of a mold that runs a script, before it is READY. It waits for the answer to BIND.
BIND = "preforkd:bind"  # and where, in JSON
BOUND = "preforkd:bound"  # the answer: the URL of the listener, whose descriptor comes with it
UNBOUND = "preforkd:unbound"  # or why not: an errno, and words
SERVES = "preforkd:serves"  # and in JSON the URLs of the servers that the script serves, in the order of their making

# The signals that a worker answers.
DRAIN, END_OF_FILE, STACKS = signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1
STACK_OF_THE_DEAF = signal.SIGRTMIN  # from one who runs no Python, and so has not answered STACKS
LOOK = signal.SIGURG  # at idle connections, levels and log files; ignored (signal(7)) by who does not hear of it yet

# The longest packet; a longer traceback loses its middle.
PACKET = 1 << 16


class Order(NamedTuple):
    """What a mold is asked for: a worker. In a packet, the numbers with blanks between."""

    serial: int
    slot: int
    rows_at: int  # where its rows of the scoreboard begin
    trial_ms: int  # how long it is on probation; 0: not at all
    max_requests: int  # after which it is worn; 0: never
    is_fresh: int  # whether a fresh process takes each request


def send(channel: socket.socket, text: str, descriptor: int | None = None) -> None:
    """Send one packet, with a descriptor for the other side to own a copy of.

    Raises BlockingIOError when the channel is full and in non-blocking mode, BrokenPipeError when nobody is there.
    """
    packet = text.encode(errors="backslashreplace")
    rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    channel.sendmsg([packet], rights)


def receive(channel: socket.socket, flags: int = 0) -> tuple[str | None, int | None]:
    """Receive one packet and the descriptor that came with it; ``(None, None)`` at end-of-file.

    Raises BlockingIOError when there is none and the channel, or a flag of recvmsg(2), says not to wait.
    """
    try:
        packet, ancillary, _, _ = channel.recvmsg(PACKET, _SPACE, socket.MSG_CMSG_CLOEXEC | flags)
    except ConnectionResetError:  # the other side died with packets unread
        return None, None
    rights = [int.from_bytes(data, sys.byteorder) for _, _, data in ancillary]
    return (packet.decode() if packet else None), (rights[0] if rights else None)


_SPACE = socket.CMSG_SPACE(4)


def shorten(text: str, limit: int = PACKET // 4) -> str:
    """A text that fits into a packet: of a long one the beginning and the end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n  [{len(text) - limit} characters left out]\n{text[-limit // 2 :]}"
