"""What the shipped unit says, next to what the daemon says."""

import configparser
from pathlib import Path

from preforkd.exits import Exit
from preforkd.notify import FEED_EVERY
from preforkd.settings import Service, Settings

UNIT = Path(__file__).parents[1] / "systemd" / "preforkd@.service"


def shipped(key: str) -> str:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    return unit["Service"][key]


def seconds(key: str) -> float:
    assert shipped(key).endswith("s")
    return float(shipped(key)[:-1])


def test_systemd_is_more_patient_than_the_daemon() -> None:
    settings, service = Settings(), Service(target="x")
    stop = service.graceful_timeout + service.eof_timeout
    assert seconds("TimeoutStopSec") > stop
    assert seconds("TimeoutStartSec") > max(service.boot_timeout * 2, settings.takeover_timeout + service.boot_timeout)
    assert seconds("WatchdogSec") >= service.graceful_timeout + FEED_EVERY + 5, "a dead master's workers finish"
    assert int(shipped("FileDescriptorStoreMax")) >= 2


def test_wrong_settings_are_not_tried_again() -> None:
    assert shipped("RestartPreventExitStatus") == f"{Exit.SETTINGS.value}"
