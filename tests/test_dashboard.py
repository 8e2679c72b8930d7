"""The dashboard for Grafana: made from the tables, whole, and no panel empty when daemon and supervisord have work."""

import json
import math
import re
import runpy
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import needs
from tests.conftest import TARGETS, Serve
from tests.daemon import DEADLINE, Daemon, eventually
from tests.expressions import DECLARED, declared, faults, parts, selectors
from tests.prometheus import Prometheus, scraping, scraping_supervisor
from tests.supervisor.conftest import Supervise, supervise
from tests.supervisor.daemon import listening, preforkd_serve
from tests.test_rules import rules

__all__ = ["supervise"]  # a fixture

GRAFANA = Path(__file__).parent.parent / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "preforkd.json").read_text())


def panels() -> Iterator[dict[str, Any]]:
    """All but the headings of rows; those of folded rows are within them."""
    for each in DASHBOARD["panels"]:
        yield from each.get("panels", ()) if each["type"] == "row" else [each]


def expressions() -> Iterator[tuple[dict[str, Any], str]]:
    for panel in panels():
        for target in panel["targets"]:
            yield panel, target["expr"]


def as_grafana(expression: str, chosen: dict[str, list[str]], window: str = "30s") -> str:
    """The expression with its variables replaced, each by all of its values, as Grafana's data source does it."""
    for name, values in chosen.items():
        escaped = [re.sub(r"[$^*{}\[\]'+?.()|]", lambda found: rf"\\{found[0]}", value) for value in values]
        expression = expression.replace(f"${name}", escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})")
    expression = expression.replace("$__rate_interval", window)
    assert "$" not in expression
    return expression


ANY = {name: ["any"] for name in ("job", "instance", "service", "supervisor")}


def test_the_dashboard_is_what_the_program_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GRAFANA)
    assert (GRAFANA / "preforkd.json").read_text() == runpy.run_path(str(GRAFANA / "dashboard.py"))["text"]()


@pytest.mark.parametrize("panel", [*panels()], ids=lambda panel: f"{panel['id']} {panel['title']}")
def test_a_panel_says_what_it_shows_and_asks_for_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        expression = as_grafana(target["expr"], ANY)
        assert not [*faults(expression)]
        for name, _ in selectors(expression):
            assert f"`{name}`: " in panel["description"]
            assert getattr(declared(name), "help", "") in panel["description"]


def test_every_metric_is_in_a_panel() -> None:
    shown = {name for _, expression in expressions() for name, _ in selectors(as_grafana(expression, ANY))}
    assert [name for name in DECLARED if name not in shown and f"{name}_bucket" not in shown] == []


def test_the_panels_of_a_row_fill_it_and_none_lies_on_another() -> None:
    places = [each["gridPos"] for each in (*DASHBOARD["panels"], *panels()) if each["type"] != "row"]
    cells = {
        (x, y)
        for place in {tuple(sorted(place.items())) for place in places}
        for at in [dict(place)]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    }
    area = sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in panels())
    assert len(cells) == area
    lines = {y for _, y in cells}
    assert len(cells) == 24 * len(lines)
    numbers = [each["id"] for each in DASHBOARD["panels"]] + [each["id"] for each in panels()]
    assert sorted(set(numbers)) == [*range(1, len({*numbers}) + 1)]


def values_of(prometheus: Prometheus, variable: dict[str, Any], chosen: dict[str, list[str]]) -> list[str]:
    """What Grafana would offer for a variable."""
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
    assert found is not None
    values: list[str] = prometheus.get(f"label/{found[2]}/values", **{"match[]": as_grafana(found[1], chosen)})
    wanted = re.compile(variable.get("regex", "").strip("/"))
    return [value for value in values if wanted.search(value)]


def is_shown(prometheus: Prometheus, target: dict[str, Any], chosen: dict[str, list[str]]) -> bool:
    """Whether there is anything to draw: one number at least."""
    expression, now = as_grafana(target["expr"], chosen), time.time()
    if target["instant"]:
        series = prometheus.get("query", query=expression, time=now)["result"]
        values = [each["value"] for each in series]
    else:
        series = prometheus.get("query_range", query=expression, start=now - 30, end=now, step=1)["result"]
        values = [value for each in series for value in each["values"]]
    return any(math.isfinite(float(number)) for _, number in values)


def work(daemon: Daemon) -> None:
    """A little of everything."""
    for order in (b"say hello\n", b"sleep 0.01\n", b"raise\n"):
        daemon.ask(order, "web")
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        for length in (10, 1000):
            client.sendto(bytes(length), daemon.address("log"))


SETTINGS = f"""
metrics = "tcp://127.0.0.1:0"

[services.web]
target = "{TARGETS}:Obey"
listen = ["tcp://127.0.0.1:0"]
max_children = 2

[services.log]
target = "{TARGETS}:UpperDatagram"
listen = ["udp://127.0.0.1:0"]
max_packet_size = 100
"""


@needs("prometheus", "prometheus")
def test_no_panel_is_empty_and_no_rule_asks_in_vain_when_there_is_work(
    serve: Serve, supervise: Supervise, tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text(SETTINGS)
    daemon = serve("-c", "site.toml")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        metrics = "{}:{}".format(*free.getsockname())
    program = {"command": preforkd_serve(":Obey", "--listen", "tcp://127.0.0.1:0"), "redirect_stderr": "true"}
    supervise({**listening(metrics, tmp_path), "program:mail": program})
    jobs = scraping(daemon) + scraping_supervisor(metrics).partition("scrape_configs:\n")[2]
    with Prometheus(tmp_path / "prometheus", jobs) as prometheus:
        prometheus.wait_until_scraped()
        chosen: dict[str, list[str]] = {}

        def empty() -> list[str]:
            work(daemon)
            for variable in DASHBOARD["templating"]["list"][1:]:
                chosen[variable["name"]] = values_of(prometheus, variable, chosen)
            if not all(chosen.values()):
                return [f"${name}" for name, values in chosen.items() if not values]
            targets = [(panel, target) for panel in panels() for target in panel["targets"]]
            return [
                f"{panel['title']}: {target['legendFormat']}"
                for panel, target in targets
                if not is_shown(prometheus, target, chosen)
            ]

        eventually(lambda: not empty(), "all panels have something to show", 3 * DEADLINE)
        assert sorted(chosen["service"]) == ["log", "web"]
        for mark in DASHBOARD["annotations"]["list"]:
            prometheus.query(as_grafana(mark["expr"], chosen))
        asked = {part.prettify() for rule in rules("record") + rules("alert") for part in parts(rule["expr"])}
        assert [each for each in sorted(asked) if not prometheus.query(each)] == []
