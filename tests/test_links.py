"""Every link between the pages leads to a file that is there, and every anchor to a heading of it."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("daemon", "workers", "deploy", "systemd", "tests")

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_ELSEWHERE = ("http://", "https://", "mailto:")


def pages() -> list[str]:
    """All Markdown of the repository, without what tools leave in hidden directories."""
    found = []
    for directory, below, files in os.walk(ROOT):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [str(Path(directory, name).relative_to(ROOT)) for name in files if name.endswith(".md")]
    return sorted(found)


def links(text: str) -> list[str]:
    """What a page links to, images included."""
    return _LINK.findall(_CODE.sub("", _FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as GitHub makes them: of two that are alike, the second ends in -1."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        alike = sum(bool(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other)) for other in found)
        found.add(f"{anchor}-{alike}" if alike else anchor)
    return found


def fault(page: str, link: str) -> str:
    """What is wrong with a link on a page; empty: nothing."""
    path, _, anchor = link.partition("#")
    target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    if not target.is_relative_to(ROOT.resolve()):
        return "leaves the repository"
    if not target.exists():
        return "no such file"
    if anchor and (target.suffix != ".md" or anchor not in anchors(target.read_text())):
        return "no such heading"
    return ""


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page: str) -> None:
    here = [link for link in links((ROOT / page).read_text()) if not link.startswith(_ELSEWHERE)]
    assert [f"{link}: {wrong}" for link in here if (wrong := fault(page, link))] == []


def test_pages_that_the_sources_name_are_there() -> None:
    files = [path for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix in {".py", ".conf", ".toml"}]
    named = {page for path in files for page in re.findall(r"\bdocs/\w+\.md\b", path.read_text())}
    assert "docs/reference.md" in named
    assert [page for page in named if not (ROOT / page).exists()] == []


def test_what_is_a_link_and_what_an_anchor() -> None:
    text = '# A `b_c = "d"`!\n\n[x](y.md#z) ![i](p.png) `[n](o.md)`\n\n```sh\n# none\n[n](o)\n```\n\n## E\n\n## E\n'
    assert links(text) == ["y.md#z", "p.png"]
    assert anchors(text) == {"a-b_c--d", "e", "e-1"}
    assert fault("README.md", "docs/design.md#no-such-thing") == "no such heading"
    assert fault("docs/design.md", "no-such-page.md") == "no such file"
    assert fault("README.md", "../elsewhere.md") == "leaves the repository"
