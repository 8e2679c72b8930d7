"""What ps(1) shows of a process.

By the extension module of setproctitle alone: what is around it imports logging, which has a part in every fork from
then on, and is copied for it.
"""

from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec


def _found() -> Callable[[str], None]:
    package = find_spec("setproctitle")
    spec = PathFinder.find_spec("_setproctitle", package.submodule_search_locations if package else None)
    if spec is None or spec.loader is None:
        raise ImportError("setproctitle has no extension module here")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str], None] = module.setproctitle
    return found


setproctitle = _found()
