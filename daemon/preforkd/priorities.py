"""How much an event matters, declared once: its priority, which systemd's journal has as well (sd-daemon(3)).

Pure: nothing is written here.
"""

import re
from collections.abc import Mapping
from enum import IntEnum


class Priority(IntEnum):
    """As syslog(3) numbers them: the less, the worse. The names are those of ``logging``."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    INFO = 6
    DEBUG = 7


_BY_PRIORITY = {
    Priority.ERROR: (
        *("cannot_start", "boot_failed", "hook_failed", "request_given_up", "log_file_lost", "access_log_lost"),
        *("reload_refused", "reload_rolled_back", "upgrade_refused", "upgrade_without_reload", "upgrade_goes_back"),
        "text",  # a traceback, or a stack that nobody has asked for
    ),
    Priority.WARNING: (
        *("kill", "mold_exit", "mold_refused", "request_overdue", "turned_away", "log_dropped", "access_log_dropped"),
        *("reload_abandoned", "takeover_waits", "control_refused"),
        *("listener_unchanged", "not_served", "datagrams_left", "descriptor_unused", "scoreboard_replaced"),
        *("user_metric_skipped", "user_metrics_lost", "user_metrics_file_replaced", "user_metrics_file_skipped"),
    ),
    Priority.INFO: ("sample",),
    Priority.DEBUG: ("stranger_reaped",),
}
EVENTS: Mapping[str, Priority] = {event: priority for priority, events in _BY_PRIORITY.items() for event in events}

# The death of a worker, by its cause; any other is what happens every day.
_DEATHS = {
    **dict.fromkeys(("boot", "crash", "deadline", "oom"), Priority.ERROR),
    **dict.fromkeys(("eof", "orphaned"), Priority.WARNING),
}


def priority_of(event: str, fields: Mapping[str, object]) -> Priority:
    """Of an event with these fields. What is not named, but comes with an advice, is a warning."""
    if event == "worker_exit":
        return _DEATHS.get(str(fields.get("cause")), Priority.INFO)
    return EVENTS.get(event, Priority.WARNING if "advice" in fields else Priority.INFO)


def priority_of_text(lines: str) -> Priority:
    """Of a traceback or a stack. Nothing is wrong with one that somebody has asked for, nor with the rest of it."""
    is_stack = "(most recent call first)" in lines or _FRAME.match(lines) is not None
    return Priority.INFO if is_stack and "Fatal Python error" not in lines else EVENTS["text"]


# As faulthandler writes it, and traceback does not.
_FRAME = re.compile(r'  File ".*", line \d+ in ')
