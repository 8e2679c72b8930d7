"""Writes ``preforkd.json``, the dashboard, from the panels of ``panels.py`` and the tables of metrics.

``python deploy/grafana/dashboard.py`` in the root of the sources, with grafana-foundation-sdk. What Grafana shows of a
panel when its (i) is pointed at is what the tables say of the metrics in it.
"""

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from panels import BAD, COLOURS, FAIR, GOOD, GREY, ROWS, Figure, Heatmap, Panel, Row

from preforkd import metrics
from preforkd.metrics import Declared
from preforkd.supervisor import metrics as supervisormetrics

FILE = Path(__file__).parent / "preforkd.json"

TABLE = {**metrics.METRICS, **supervisormetrics.METRICS}
UP = Declared("gauge", (), "Whether Prometheus could scrape it.")

SOURCE = model.DataSourceRef(type_val="prometheus", uid="$datasource")

# The exporter is a service as well, which is busy whenever it is asked; it is not offered.
_BUT_THE_EXPORTER = "/^(?!metrics$)/"

_METRIC = re.compile(r"\b(preforkd_\w+|supervisor_\w+|up)\b(?:\{(.*?)\})?")

Builder = timeseries.Panel | stat.Panel | heatmap.Panel


def declared(series: str) -> Declared:
    """What the tables say of the metric that has such series. Raises KeyError when there is none."""
    return UP if series == "up" else TABLE[re.sub(r"_bucket$", "", series)]


def scoped(expression: str) -> str:
    """The expression, of those daemons and services only that are chosen on top of the dashboard."""

    def scope(found: re.Match[str]) -> str:
        if found[1].startswith("supervisor_"):
            wanted = ['instance=~"$supervisor"']
        else:
            wanted = ['job=~"$job"', 'instance=~"$instance"']
            wanted += ['service=~"$service"'] if "service" in declared(found[1]).labels else []
        return f"{found[1]}{{{','.join([*wanted, *([found[2]] if found[2] else [])])}}}"

    return _METRIC.sub(scope, expression)


def description(panel: Panel) -> str:
    """What is in it, in the words of the tables."""
    names = dict.fromkeys(found[1] for expression in panel.queries.values() for found in _METRIC.finditer(expression))
    helps = [f"`{name}`: {declared(name).help}" for name in names]
    return "\n\n".join([panel.about, *helps] if panel.about else helps)


def build() -> dashboard.Dashboard:
    page = (
        dashboard.Dashboard("preforkd")
        .uid("preforkd")
        .description("Daemons served by preforkd: what they do, what waits for them, and what they cost.")
        .tags(["preforkd"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .editable()
    )
    for variable in variables():
        page.with_variable(variable)
    for mark in marks():
        page.annotation(mark)
    numbers = count(1)
    for row in ROWS:
        add(page, row, numbers)
    return page


def add(page: dashboard.Dashboard, row: Row, numbers: Iterator[int]) -> None:
    """A row with its panels: beside it, or, where it is folded, in it."""
    heading = dashboard.Row(row.title).id(next(numbers)).collapsed(row.is_folded)
    panels = [built(panel).id(next(numbers)) for panel in row.panels]
    if row.is_folded:
        for panel in panels:
            heading.with_panel(panel)
    page.with_row(heading)
    for panel in [] if row.is_folded else panels:
        page.with_panel(panel)


def variables() -> Iterator[dashboard.DatasourceVariable | dashboard.QueryVariable]:
    yield dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    yield chosen("job", "Job", "label_values(preforkd_build_info, job)")
    yield chosen("instance", "Daemon", 'label_values(preforkd_build_info{job=~"$job"}, instance)')
    of_daemons = 'preforkd_generation{job=~"$job",instance=~"$instance"}'
    yield chosen("service", "Service", f"label_values({of_daemons}, service)").regex(_BUT_THE_EXPORTER)
    yield chosen("supervisor", "supervisord", "label_values(supervisor_up, instance)")


def chosen(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Any number of the values that Prometheus knows; at first all."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )


def marks() -> Iterator[dashboard.AnnotationQuery]:
    """What all panels are marked with."""
    for name, colour, series in (
        ("Starts", GREY, "preforkd_start_time_seconds"),
        ("Reloads", GOOD, "preforkd_last_reload_success_timestamp_seconds"),
    ):
        expression = scoped(f"changes({series}[1m]) > 0")
        yield dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour).expr(expression)


def built(panel: Panel) -> Builder:
    match panel:
        case Figure():
            made: Builder = figure(panel)
        case Heatmap():
            made = densities(panel)
        case _:
            made = lines(panel)
    made.title(panel.title).description(description(panel)).datasource(SOURCE).unit(panel.unit).span(panel.width)
    for letter, (legend, expression) in zip("ABCDEFGH", panel.queries.items(), strict=False):
        query = prometheus.Dataquery().expr(scoped(expression)).ref_id(letter).legend_format(legend or "__auto")
        query.datasource(SOURCE)
        made.with_target(query.instant() if isinstance(panel, Figure) else query.range())
        if isinstance(panel, Heatmap):
            query.format(PromQueryFormat.HEATMAP)
    return made


def figure(panel: Figure) -> stat.Panel:
    made = (
        stat.Panel()
        .height(4)
        .graph_mode(kinds.BigValueGraphMode.NONE)
        .color_mode(kinds.BigValueColorMode.VALUE if panel.limits or panel.words else kinds.BigValueColorMode.NONE)
        .text_mode(kinds.BigValueTextMode.NAME if panel.is_name else kinds.BigValueTextMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(steps(panel.limits))
        .no_value("-")
    )
    if panel.words:
        words = {f"{value:g}": model.ValueMappingResult(text=word, color=c) for value, (word, c) in panel.words.items()}
        made.mappings([model.ValueMap(options=words)])
    return made


def lines(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .height(8)
        .min(0)
        .line_width(1)
        .fill_opacity(30 if panel.is_stacked else 0)
        .show_points(kinds.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(kinds.LegendDisplayMode.LIST)
            .placement(kinds.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
        .thresholds(steps(panel.limits))
    )
    if panel.limits:
        dashed = kinds.GraphTresholdsStyleMode.DASHED
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(dashed))
    if panel.most is not None:
        made.max(panel.most)
    if panel.is_stacked:
        made.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    if panel.is_in_steps:
        made.line_interpolation(kinds.LineInterpolation.STEP_AFTER)
    for legend in panel.queries:
        for name, colour in COLOURS.get(legend, {}).items():
            made.override_by_name(name, [model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})])
    return made


def densities(_: Heatmap) -> heatmap.Panel:
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    return (
        heatmap.Panel().height(8).calculate(False).color(colours).y_axis(heatmap.YAxisConfig().unit("s")).hide_legend()
    )


def steps(limits: tuple[float, ...]) -> dashboard.ThresholdsConfig:
    """Good below the first limit; between two fair; bad from the last on."""
    colours = [GOOD, FAIR, BAD] if len(limits) == 2 else [GOOD, BAD]
    pairs = zip((None, *limits), colours, strict=False)
    found = [model.Threshold(value=limit, color=colour) for limit, colour in pairs]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(found)


def text() -> str:
    """The dashboard as Grafana reads it."""
    return json.dumps(build().build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
