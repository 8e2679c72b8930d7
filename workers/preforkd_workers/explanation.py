"""What went wrong in a target, in words: its own traceback, without the frames that are ours."""

import importlib
import os
import traceback


class TargetError(Exception):
    """The target cannot be served; the message says what, where and what to do."""


def explain(error: BaseException) -> str:
    """What went wrong in a target: our own faults in a sentence, the target's with its traceback, less our frames."""
    if isinstance(error, TargetError):
        return str(error)
    where = error.__traceback__
    while where is not None and _is_ours(where.tb_frame.f_code.co_filename):
        where = where.tb_next
    text = "".join(traceback.format_exception(type(error), error, where)).rstrip()
    return f"{text}\n(it must not exit here)" if isinstance(error, SystemExit) else text


def _is_ours(filename: str) -> bool:
    return (
        os.path.dirname(filename) == os.path.dirname(__file__)
        or filename.startswith(("<frozen importlib", "<frozen runpy"))
        or filename == importlib.__file__
    )
