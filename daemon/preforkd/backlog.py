"""How much waits at a listener, asked from the kernel."""

import os
import socket
import struct

_SO_MEMINFO = 55  # asm-generic/socket.h; the fields are those of linux/sock_diag.h, SK_MEMINFO_…
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_UDIAG_SHOW_RQLEN = 0x10
_UNIX_DIAG_RQLEN = 4


def sample(listener: socket.socket) -> tuple[int, int, int]:
    """What waits at a listener, how much may wait, and how much was dropped since it was opened.

    A stream listener counts connections, a datagram one bytes (and drops in datagrams). Sources: tcp(7) TCP_INFO, whose
    unacked and sacked mean this on a listening socket; SO_MEMINFO of socket(7); sock_diag(7) for Unix sockets.
    Raises OSError when the kernel does not tell.
    """
    if listener.family == socket.AF_UNIX:
        return _unix(listener)
    if listener.type == socket.SOCK_STREAM:
        waiting, limit = struct.unpack_from("=II", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 24)
        return waiting, limit, 0
    memory = struct.unpack("=9I", listener.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))
    return memory[0], memory[1], memory[8]


def _unix(listener: socket.socket) -> tuple[int, int, int]:
    inode = os.fstat(listener.fileno()).st_ino
    any_cookie = 0xFFFFFFFF
    request = struct.pack(
        "=IHHIIBBHIIIII",
        *(40, _SOCK_DIAG_BY_FAMILY, 1, 0, 0),  # nlmsghdr: length, type, NLM_F_REQUEST, sequence, port
        *(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, _UDIAG_SHOW_RQLEN, any_cookie, any_cookie),  # unix_diag_req
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        diag.send(request)
        answer = diag.recv(4096, socket.MSG_DONTWAIT)
    at = 32  # after nlmsghdr and unix_diag_msg
    while at + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _UNIX_DIAG_RQLEN:
            waiting, limit = struct.unpack_from("=II", answer, at + 4)
            return (waiting, limit, 0) if listener.type == socket.SOCK_STREAM else (waiting, 0, 0)
        at += max((length + 3) & ~3, 4)
    raise OSError("the kernel has no unix_diag")
