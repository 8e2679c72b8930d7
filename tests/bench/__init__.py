"""How fast preforkd is, next to servers doing the same work: `python -m tests.bench`. Never fails a build."""
