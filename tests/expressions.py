"""What an expression of PromQL asks for, read by a parser of it, and whether we have such a thing."""

from collections.abc import Iterator, Mapping

import promql_parser

from preforkd import metrics
from preforkd.metrics import Declared
from preforkd.supervisor import metrics as supervisormetrics

DECLARED: Mapping[str, Declared] = {**metrics.METRICS, **supervisormetrics.METRICS}

# What Prometheus adds: series of its own for each target, and labels.
OF_PROMETHEUS = {"up", "scrape_duration_seconds", "ALERTS"}
OF_TARGETS = {"job", "instance", "daemon"}


def parts(expression: str) -> list[promql_parser.VectorSelector]:
    """What it selects, name by name. Raises ValueError when it is no PromQL."""
    found: list[promql_parser.VectorSelector] = []

    def visit(part: promql_parser.Expr) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            found.append(part)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """The metrics that are asked for, each with the labels that it is asked for by."""
    return [(part.name or "", {matcher.name for matcher in part.matchers.matchers}) for part in parts(expression)]


def declared(series: str) -> Declared | None:
    """The metric that has series of this name: of a histogram there are three."""
    return DECLARED.get(series) or next(
        (
            metric
            for name, metric in DECLARED.items()
            if metric.kind == "histogram" and series in {f"{name}_{part}" for part in ("bucket", "sum", "count")}
        ),
        None,
    )


def faults(expression: str) -> Iterator[str]:
    """What it asks for that is not there: metrics, or labels of them."""
    for name, labels in selectors(expression):
        metric = declared(name)
        if metric is not None:
            known = {*metric.labels, *OF_TARGETS, *(["le"] if name.endswith("_bucket") else [])}
            yield from (f"{name} has no label {label}" for label in sorted(labels - known))
        elif name not in OF_PROMETHEUS:
            yield f"there is no {name}"
