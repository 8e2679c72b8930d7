"""The page that gunicorn serves in the benchmark, as a WSGI application. Imports nothing but types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

PAGE = b"<!doctype html><title>bench</title><p>The same bytes from everyone.</p>\n" * 14  # about 1 KiB


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer every request with PAGE."""
    start_response("200 OK", [("Content-Type", "text/html"), ("Content-Length", str(len(PAGE)))])
    return [PAGE]
