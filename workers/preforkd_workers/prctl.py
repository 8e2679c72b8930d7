"""The two calls of prctl(2) that keep a family of processes together."""

import ctypes
import errno

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Without ctypes' copy of errno, and with the types known: every worker makes this call, and keeps what it touches.
_call = ctypes.CDLL(None).prctl
_call.argtypes = (ctypes.c_int, *4 * (ctypes.c_ulong,))


def _prctl(option: int, argument: int) -> None:
    if _call(option, argument, 0, 0, 0):
        raise OSError(errno.EINVAL, f"prctl({option}, {argument}) was refused")  # the only error of these two


def become_subreaper() -> None:
    """Have orphaned descendants reparented to this process instead of to init (PR_SET_CHILD_SUBREAPER(2const))."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_on_parent_death(number: int) -> None:
    """Have the kernel send this process signal ``number`` when its parent dies (PR_SET_PDEATHSIG(2const)).

    The parent may be dead already: compare getppid() afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
