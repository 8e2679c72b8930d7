"""What somebody may have meant who has misspelt a name."""

from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str | None:
    """The one of these names that is most like it; None when none is."""
    from difflib import get_close_matches  # here: nobody needs it who makes no mistake

    return next(iter(get_close_matches(name, known, 1)), None)


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that there is not: ``; did you mean …?``, or nothing."""
    found = meant(name, known)
    return f"; did you mean {found}?" if found else ""
