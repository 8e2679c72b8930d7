"""A file of ``[section]`` and ``key=value``, changed in place: its order and its comments stay, and so does whatever is
not changed. Understands what units of systemd and the configuration of supervisord have in common, and opens nothing.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

_HEADING = re.compile(r"\[(.+)\]\s*$")
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.]*)\s*=\s*(.*)$", re.DOTALL)
_COMMENT = ("#", ";")


class Sections:
    """The text of such a file. Sections are named without brackets. ``mark``: with what its comments begin."""

    def __init__(self, text: str, mark: str = "#") -> None:
        self._lines = text.splitlines()
        self._mark = mark

    @property
    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def names(self) -> list[str]:
        """The sections there are, in their order."""
        return [found[1] for line in self._lines if (found := _HEADING.match(line))]

    def values(self, section: str, key: str) -> list[str]:
        """Everything that is assigned to a key, in order."""
        return [value for _, _, name, value in self._assignments(section) if name == key]

    def value(self, section: str, key: str) -> str:
        """What is assigned to a key last; empty when nothing is."""
        return next(reversed(self.values(section, key)), "")

    def rename(self, section: str, to: str) -> None:
        """Give another name to a section."""
        self._lines = [f"[{to}]" if _is_heading(line, section) else line for line in self._lines]

    def set(self, section: str, key: str, value: str, why: str = "", near: str = "") -> None:
        """Have a key say this and nothing else. ``why``: a comment above the line, if it is changed at all.

        ``near``: the key behind which it goes, when nothing is assigned to it yet.
        """
        if self.values(section, key) == [value]:
            return None
        found = [each for each in self._assignments(section) if each[2] == key] or self._example(section, key)
        if not found:
            return self.add(section, key, value, why, near)
        for first, end, _, _ in reversed(found[1:]):
            del self._lines[first:end]
        first, end, _, _ = found[0]
        self._lines[first:end] = [*self._comment(why), f"{key}={value}"]
        return None

    def add(self, section: str, key: str, value: str, why: str = "", near: str = "") -> None:
        """Assign something more to a key: behind what it is assigned, or behind ``near``, or at the section's end."""
        if value in self.values(section, key):
            return
        ends = {name: end for _, end, name, _ in self._assignments(section)}
        at = ends.get(key, ends.get(near, self._end(section)))
        self._lines[at:at] = [*self._comment(why), f"{key}={value}"]

    def close(self, section: str, key: str, why: str) -> None:
        """Have a key say nothing: what it says now becomes a comment, below another that says why."""
        for first, end, name, _ in reversed([*self._assignments(section)]):
            if name == key:
                self._lines[first:end] = [
                    *self._comment(why),
                    *(f"{self._mark}{line}" for line in self._lines[first:end]),
                ]

    def _example(self, section: str, key: str) -> list[tuple[int, int, str, str]]:
        """The line that says in a comment what could be assigned to a key, if there is one."""
        first, behind = self._span(section)
        examples = [at for at in range(first, behind) if re.match(rf"[#;]{re.escape(key)}=", self._lines[at])]
        return [(at, at + 1, key, "") for at in examples[:1]]

    def _assignments(self, section: str) -> Iterator[tuple[int, int, str, str]]:
        """The lines from and to, the key and the value of everything that is assigned in a section."""
        first, behind = self._span(section)
        at = first
        while at < behind:
            end = at + 1
            if found := _ASSIGNMENT.match(self._lines[at]):
                while end < behind and self._goes_on(end):
                    end += 1
                yield at, end, found[1], "\n".join([found[2], *self._lines[at + 1 : end]])
            at = end

    def _goes_on(self, at: int) -> bool:
        """Whether this line belongs to the value before it: after a backslash, or indented."""
        line = self._lines[at]
        return self._lines[at - 1].endswith("\\") or (line[:1].isspace() and bool(line.strip()))

    def _span(self, section: str) -> tuple[int, int]:
        """The lines of a section, without its heading. Raises KeyError when there is none of this name."""
        headings = [at for at, line in enumerate(self._lines) if _HEADING.match(line)] + [len(self._lines)]
        for first, behind in pairwise(headings):
            if _is_heading(self._lines[first], section):
                return first + 1, behind
        raise KeyError(section)

    def _comment(self, text: str) -> list[str]:
        return [f"{self._mark} {line}" for line in text.splitlines()]

    def _end(self, section: str) -> int:
        """Behind the last line of a section that says something; comments above the next heading are that one's."""
        first, behind = self._span(section)
        while behind > first and (not self._lines[behind - 1].strip() or self._lines[behind - 1].startswith(_COMMENT)):
            behind -= 1
        return behind


def _is_heading(line: str, section: str) -> bool:
    found = _HEADING.match(line)
    return found is not None and found[1] == section
