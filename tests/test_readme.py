"""What README prints from the tables is what the tables say. ``python -m tests.test_readme`` writes it anew."""

import re
from pathlib import Path

import pytest

from preforkd import commands, exits, master, metrics, settings

README = Path(__file__).parent.parent / "README.md"

TABLES = {
    "settings": settings.reference,
    "signals": master.signals_reference,
    "metrics": metrics.reference,
    "commands": commands.reference,
    "exits": exits.reference,
}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n\n)((?:\|.*\n)*)")


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_the_one_in_the_code(name: str) -> None:
    found = _pattern(name).search(README.read_text())
    assert found is not None
    assert found[2] == f"{TABLES[name]()}\n"


if __name__ == "__main__":
    text = README.read_text()
    for name, table in TABLES.items():
        text = _pattern(name).sub(lambda found, table=table: f"{found[1]}{table()}\n", text)  # type: ignore[misc]
    README.write_text(text)
