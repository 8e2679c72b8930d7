"""Modules that are waited for: whoever waits is told once, when the module is there."""

import importlib
import sys
from pathlib import Path

import pytest

from preforkd_workers.awaited import Awaited


def test_all_who_wait_for_a_module_are_told_when_it_has_been_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wanted.py").write_text("there = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    told: list[tuple[str, bool]] = []
    for who in ("first", "second"):
        Awaited("wanted", lambda module, who=who: told.append((who, module.there))).expect()  # type: ignore[misc]
    importlib.import_module("wanted")
    assert sorted(told) == [("first", True), ("second", True)]
    monkeypatch.delitem(sys.modules, "wanted")


def test_a_module_that_is_not_there_is_missed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for _ in range(2):
        Awaited("nowhere_to_be_found", lambda _: pytest.fail("it is not there")).expect()
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        importlib.import_module("nowhere_to_be_found")
