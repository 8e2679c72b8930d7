"""What we ship for Prometheus: promtool has no complaint, every alert is tested both ways, and no name has drifted."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from preforkd.commands import COMMANDS
from tests.clients.conftest import needs, run
from tests.expressions import faults, selectors
from tests.prometheus import RULES, SHIPPED

TESTS = sorted(SHIPPED.glob("tests/*.yml"))
SCRAPE = SHIPPED / "preforkd-scrape.yml"

promtool = needs("promtool", "prometheus")


def rules(kind: str) -> list[dict[str, Any]]:
    """All that we ship of a kind, ``record`` or ``alert``."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def scenes() -> Iterator[dict[str, Any]]:
    for path in TESTS:
        yield from yaml.safe_load(path.read_text())["tests"]


ALERTS = {(rule["alert"], rule["labels"]["severity"]): rule for rule in rules("alert")}
RECORDED = {rule["record"] for rule in rules("record")}


@promtool
def test_promtool_has_no_complaint() -> None:
    run("promtool", "check", "config", SCRAPE)
    assert "SUCCESS" in run("promtool", "check", "rules", "--lint-fatal", *RULES)
    run("promtool", "test", "rules", *TESTS)


@promtool
def test_the_jobs_fit_into_the_configuration_of_debian(tmp_path: Path) -> None:
    theirs = Path("/etc/prometheus/prometheus.yml").read_text()
    jobs = SCRAPE.read_text().partition("scrape_configs:\n")[2]
    (tmp_path / "prometheus.yml").write_text(theirs + jobs)
    run("promtool", "check", "config", tmp_path / "prometheus.yml")
    names = [job["job_name"] for job in yaml.safe_load(theirs + jobs)["scrape_configs"]]
    assert names[-2:] == ["preforkd", "preforkd-supervisor"]


@pytest.mark.parametrize(("name", "severity"), ALERTS)
def test_an_alert_is_tested_to_fire_and_not_to(name: str, severity: str) -> None:
    seen = set()
    for scene in scenes():
        for test in scene["promql_expr_test"]:
            wanted = re.fullmatch(r'ALERTS\{alertname="(\w+)",alertstate="firing"(,severity="\w+")?\}', test["expr"])
            if wanted is not None and wanted[1] == name and wanted[2] in (None, f',severity="{severity}"'):
                fired = any(f'severity="{severity}"' in sample["labels"] for sample in test["exp_samples"])
                seen |= {fired} if fired or not test["exp_samples"] else set()
    assert seen == {True, False}


@pytest.mark.parametrize(("name", "severity"), ALERTS)
def test_an_alert_says_what_is_wrong_and_what_to_do(name: str, severity: str) -> None:
    summary, description = (ALERTS[name, severity]["annotations"][key] for key in ("summary", "description"))
    assert severity in ("critical", "warning")
    assert "\n" not in summary
    assert "`" in description or name == "PreforkdNotScraped"
    for command in re.findall(r"`preforkctl (?:\{\{ \$labels\.daemon \}\} )?(\S+?)[ `]", description):
        assert command in COMMANDS
    labels = set(re.findall(r"\$labels\.(\w+)", summary + description))
    if not name.startswith("Supervisor"):
        assert labels <= {"daemon", "instance", "service", "listener"}


@pytest.mark.parametrize("rule", rules("record") + rules("alert"), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    complaints = [fault for fault in faults(rule["expr"]) if fault.removeprefix("there is no ") not in RECORDED]
    assert not complaints


def test_the_tests_feed_what_there_is_and_every_recording_rule_is_tested() -> None:
    fed = [series["series"] for scene in scenes() for series in scene["input_series"]]
    assert not [fault for series in fed for fault in faults(series)]
    asked = {name for scene in scenes() for test in scene["promql_expr_test"] for name, _ in selectors(test["expr"])}
    assert asked >= RECORDED
