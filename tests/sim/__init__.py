"""A simulator of elastic pools. ``python -m tests.sim`` runs it."""
