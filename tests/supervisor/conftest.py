"""Fixtures: supervisords that are looked after."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.supervisor.daemon import Sections, Supervisor, shipped

Supervise = Callable[..., Supervisor]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    """Start a supervisord with these sections. At the end of the test it has left nobody and nothing behind."""
    with ExitStack() as supervisors:

        def start(sections: Sections, **keywords: object) -> Supervisor:
            return supervisors.enter_context(Supervisor(tmp_path, sections, **keywords))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Supervise]:
    """Start a supervisord with a program that we ship, ``x``, its settings, and options that are to differ."""
    with ExitStack() as supervisors:

        def start(
            settings: str, file: str = "preforkd.conf", options: dict[str, object] | None = None, **keywords: object
        ) -> Supervisor:
            options = options or {}
            supervisor = Supervisor(tmp_path, {}, **keywords)  # type: ignore[arg-type]
            (supervisor.runtime / "x.toml").write_text(settings)
            if "user" in options:
                options = {**options, "directory": supervisor.runtime}  # that of the test is closed to others
                supervisor.make_way_for(str(options["user"]))
            for section, given in shipped(file, supervisor.places).items():
                supervisor.change({section: {**given, **options}})
            return supervisors.enter_context(supervisor)

        yield start
