"""Fixtures: daemons that are looked after."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon import Daemon

TARGETS = Path(__file__).parent / "targets.py"

Serve = Callable[..., Daemon]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="make the tests under load long")
    parser.addoption("--kind", help="have daemons with workers of this kind, where a test does not say: thread, gevent")


def pytest_configure(config: pytest.Config) -> None:
    if kind := config.getoption("--kind"):
        Daemon.kind = {"PREFORKD_KIND": kind, "PREFORKD_THREADS": "4", "PREFORKD_GREENLETS": "50"}


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether the tests under load are to be long."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start ``preforkd serve ARGUMENTS`` and wait until it is ready. ``:name`` is a target of ``targets.py``.

    At the end of the test it has left nobody and nothing behind.
    """
    with ExitStack() as daemons:

        def start(*arguments: object, ready: bool = True, **keywords: object) -> Daemon:
            words = [f"{TARGETS}{word}" if str(word).startswith(":") else word for word in arguments]
            daemon = daemons.enter_context(Daemon(["serve", *words], tmp_path, **keywords))  # type: ignore[arg-type]
            return daemon.ready() if ready else daemon

        yield start
