"""The scrape config of Prometheus, fitted to a daemon: its address and its name. Pure: text to text."""

import json
import re
from collections.abc import Mapping

from preforkd.addresses import ip_of
from preforkd.deploy.facts import Facts
from preforkd.deploy.shipped import Fitted
from preforkd.sources import Faults

_EXAMPLE = 'such as metrics = "tcp://127.0.0.1:9109"'
_SCRAPE = "preforkd-scrape.yml"
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # that YAML takes for something else than text


def fit_scraping(shipped: Mapping[str, str], facts: Facts) -> Fitted:
    """Fit the scrape config; the rules are for every daemon. Raises Faults where there is nobody to be asked."""
    fitted = Fitted()
    for name, text in shipped.items():
        fitted.add(name, _fit(text, facts) if name == _SCRAPE else text, is_shared=name != _SCRAPE)
    return fitted


def _fit(text: str, facts: Facts) -> str:
    job, ahead, rest = text.partition("job_name: preforkd\n")
    rest, count = re.subn(
        r"(targets: )\[.*\]", lambda found: f"{found[1]}[{json.dumps(_target(facts))}]", rest, count=1
    )
    rest, named = re.subn(r"(daemon: )\S+", lambda found: f"{found[1]}{_scalar(facts.name)}", rest, count=1)
    assert count == named == 1, "the shipped file has other lines than we know of"
    return job + ahead + rest


def _target(facts: Facts) -> str:
    metrics = facts.metrics
    if metrics is None:
        raise Faults([f"metrics: none are served; set it, {_EXAMPLE}"])
    if metrics.scheme == "fd":
        passed = next(each for each in facts.passed if each.url == metrics.url)
        metrics = passed.address or metrics
    if metrics.scheme != "tcp" or not metrics.port:
        raise Faults([f"metrics: {metrics.url}: Prometheus cannot ask there; set an address and a port, {_EXAMPLE}"])
    ip = ip_of(metrics.host)
    if ip is not None and ip.is_unspecified:
        return f"localhost:{metrics.port}"
    return f"[{metrics.host}]:{metrics.port}" if ":" in metrics.host else f"{metrics.host}:{metrics.port}"


def _scalar(name: str) -> str:
    """As YAML has it: quoted wherever it might be taken for something else than text."""
    return name if re.fullmatch(r"[A-Za-z_][\w-]*", name) and name.lower() not in _WORDS else json.dumps(name)
