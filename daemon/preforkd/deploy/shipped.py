"""The files for service managers and Prometheus that come with preforkd: which there are, where they are found, and
what comes of fitting them to a daemon.

A wheel has them in preforkd's package (pyproject.toml, force-include); in a checkout they are where they are edited.
"""

import os

from msgspec import Struct, field

# Of each the files, by their path in a checkout, in the order in which they are shown.
SHIPPED = {
    "systemd": (
        "systemd/preforkd@.service",
        "systemd/preforkd@.socket",
        "systemd/preforkd.sysusers",
        "systemd/preforkd.tmpfiles",
        "systemd/notify-reload.conf",
    ),
    "supervisor": (
        "deploy/supervisor/preforkd.conf",
        "deploy/supervisor/preforkd-fcgi.conf",
        "deploy/supervisor/preforkd-listener.conf",
        "deploy/supervisor/preforkd-rpc.conf",
    ),
    "prometheus": (
        "deploy/prometheus/preforkd-scrape.yml",
        "deploy/prometheus/preforkd-rules.yml",
        "deploy/prometheus/preforkd-alerts.yml",
    ),
}

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_IN_WHEEL = os.path.join(_PACKAGE, "shipped")
_CHECKOUT = os.path.dirname(os.path.dirname(_PACKAGE))


def read(manager: str) -> dict[str, str]:
    """The texts of the files for it, by name. Raises OSError when one is missing."""
    root = _IN_WHEEL if os.path.isdir(_IN_WHEEL) else _CHECKOUT
    return {os.path.basename(path): _content(os.path.join(root, path)) for path in SHIPPED[manager]}


def _content(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


class Fitted(Struct):
    """What fitting comes to: texts of files by name, and notes on what is left for people to see to, a line each."""

    files: dict[str, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)  # those that are alike for every daemon
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, *, is_shared: bool = False) -> None:
        self.files[name] = text
        if is_shared:
            self.shared.add(name)
