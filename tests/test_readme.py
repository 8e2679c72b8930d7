"""What the pages print from the tables of the code is what those say, and the map has every module.

``python -m tests.test_readme`` writes the tables anew.
"""

import re
from pathlib import Path

import pytest

from preforkd import commands, exits, master, metrics, settings
from preforkd.supervisor import metrics as supervisormetrics

ROOT = Path(__file__).parent.parent
MAP = ROOT / "docs" / "design.md"

# By the page that has it, and the name in its comment.
TABLES = {
    ("docs/reference.md", "daemon settings"): settings.daemon_reference,
    ("docs/reference.md", "service settings"): settings.service_reference,
    ("docs/reference.md", "signals"): master.signals_reference,
    ("docs/reference.md", "metrics"): metrics.reference,
    ("docs/reference.md", "supervisor metrics"): supervisormetrics.reference,
    ("docs/reference.md", "exits"): exits.reference,
    ("docs/operating.md", "commands"): commands.reference,
}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n\n)((?:\|.*\n)*)")


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_the_table_is_the_one_in_the_code(page: str, name: str) -> None:
    found = _pattern(name).search((ROOT / page).read_text())
    assert found is not None
    assert found[2] == f"{TABLES[page, name]()}\n"


PACKAGES = (
    "daemon/preforkd",
    "daemon/preforkd/deploy",
    "daemon/preforkd/supervisor",
    "workers/preforkd_workers",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_names_every_module_once(package: str) -> None:
    table = MAP.read_text().partition(f"| `{package}/` |")[2].partition("\n\n")[0]
    modules = [path.name for path in (ROOT / package).glob("*.py") if not path.name.startswith("__")]
    assert sorted(re.findall(r"`(\w+\.py)`", table)) == sorted(modules)


if __name__ == "__main__":
    for (page, name), table in TABLES.items():
        text = (ROOT / page).read_text()
        (ROOT / page).write_text(_pattern(name).sub(lambda found, table=table: f"{found[1]}{table()}\n", text))  # type: ignore[misc]
