"""Reasons in a line."""

import pytest

from preforkd.log import summary

TRACEBACK = """services.a:
Traceback (most recent call last):
  File "app.py", line 1
ValueError: no
(raised by the hook on_mold)"""
STACK = """services.a:
the import of a took longer
Current thread 0x1 (most recent call first):
  File "app.py", line 1 in f
Extension modules: x"""


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("", ""),
        ("one line", "one line"),
        ("first fault\nsecond fault", "first fault; and 1 more"),
        (
            "services.a:\n  File \"app.py\", line 7\n    x(\n     ^\nSyntaxError: '(' was never closed",
            "services.a: SyntaxError: '(' was never closed",
        ),
        (TRACEBACK, "services.a: ValueError: no"),
        (STACK, "services.a: the import of a took longer"),
    ],
)
def test_a_reason_in_a_line_is_what_was_raised_or_the_sentence_that_it_begins_with(reason: str, line: str) -> None:
    assert summary(reason) == line
