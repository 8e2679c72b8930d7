"""The two calls of prctl(2) that keep a family of processes together."""

import ctypes
import os

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_subreaper() -> None:
    """Have orphaned descendants reparented to this process instead of to init (PR_SET_CHILD_SUBREAPER(2const))."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_on_parent_death(number: int) -> None:
    """Have the kernel send this process signal ``number`` when its parent dies (PR_SET_PDEATHSIG(2const)).

    The parent may be dead already: compare getppid() afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
