"""Run any socketserver handler, unmodified, as a production daemon.

In place of ``socketserver``: everything public of that module is here as well, and beside each ``Forking`` class its
``PreForking`` one. They are loaded when first used, for the master of the daemon does without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preforkd.servers import *  # noqa: F403
    from preforkd.servers import __all__ as __all__

__version__ = "0.1.0"

if not TYPE_CHECKING:  # or a checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name != "__all__" and not name[0].isupper():  # no class: a module, which the import system looks for
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("preforkd.servers"), name)
