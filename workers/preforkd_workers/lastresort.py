"""What a target logs by the standard library's ``logging`` where no handler of its own is there for it, in our format.

That is what ``logging.lastResort`` writes: it gets a formatter, in JSON or with the journal's priorities. A target that
has configured logging is left alone, whenever it does so: ``basicConfig`` finds the root logger without handlers, as
ever. Never imports logging for a target that does not, and nothing here is done where the log is text.
"""

import sys
from functools import cached_property
from typing import Any

from preforkd_workers.awaited import Awaited
from preforkd_workers.spec import Log

# The journal's priorities (sd-daemon(3)), by the least level of logging that has them.
_PRIORITIES = {50: 2, 40: 3, 30: 4, 20: 6}
_DEBUG = 7


def expect(log: Log, service: str) -> None:
    """To be called before the target is imported. Takes part in the import of logging, if there will be one."""
    if log.format == "text":
        return

    def equip(logging: Any) -> None:
        if logging.lastResort is not None:
            logging.lastResort.setFormatter(Late(log, service, logging))

    if "logging" in sys.modules:
        equip(sys.modules["logging"])
    else:
        Awaited("logging", equip).expect()


def prepare() -> None:
    """To be called when the target is imported: what its loggers will need is the mold's, and so shared."""
    logging: Any = sys.modules.get("logging")
    formatter = logging and logging.lastResort and logging.lastResort.formatter
    if isinstance(formatter, Late) and len(logging.root.manager.loggerDict) > formatter.loggers_before:
        formatter.prepare()


class Late:
    """A formatter that is made when there is something to format: a target that logs nothing pays nothing."""

    def __init__(self, log: Log, service: str, logging: Any) -> None:
        self.log, self.service, self.logging = log, service, logging
        self.loggers_before = len(logging.root.manager.loggerDict)

    @cached_property
    def _made(self) -> Any:
        if self.log.format == "json":
            return _json_formatter(self.service)
        return _journal_formatter(self.logging)

    def prepare(self) -> None:
        """Make it now."""
        _ = self._made

    def format(self, record: Any) -> str:
        text: str = self._made.format(record)
        return text


def _json_formatter(service: str) -> object:
    from datetime import UTC, datetime  # both here and not above: most molds do without

    from pythonjsonlogger.json import JsonFormatter

    class Formatter(JsonFormatter):
        """The same beginning as the daemon's own events have; then the logger, the message, and what was given more."""

        def add_fields(self, log_data: Any, record: Any, message_dict: Any) -> None:
            at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
            log_data["at"] = at.replace("+00:00", "Z")
            log_data |= {"level": record.levelname.lower(), "event": "log", "service": service, "pid": record.process}
            log_data["logger"] = record.name
            super().add_fields(log_data, record, message_dict)

    return Formatter()


def _journal_formatter(logging: Any) -> object:
    class Formatter(logging.Formatter):  # type: ignore[misc]
        """Each line with its priority, those of a traceback as well."""

        def format(self, record: Any) -> str:
            priority = next((each for level, each in _PRIORITIES.items() if record.levelno >= level), _DEBUG)
            return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())

    return Formatter()
