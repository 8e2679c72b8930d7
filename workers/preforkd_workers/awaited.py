"""Modules that a target may import or not: what is done when it does, and who never imports them pays nothing."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Awaited:
    """A finder that waits for the first import of one module (importlib.abc.MetaPathFinder), and finds nothing itself.

    ``do`` is called with the module once it has been executed, in the thread that imports it, before anybody else sees
    it as imported.
    """

    def __init__(self, name: str, do: Callable[[ModuleType], object]) -> None:
        self.name = name
        self.do = do

    def expect(self) -> None:
        """Take part in the import, if there will be one."""
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The import system asks: have who would find the module find it, who may be one that waits for it as well."""
        if name != self.name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if found is not None and found.loader is not None:
            execute = found.loader.exec_module

            def execute_and_do(module: ModuleType) -> None:
                execute(module)
                self.do(module)

            found.loader.exec_module = execute_and_do  # type: ignore[method-assign]
        return found
