"""The exporter, read as Prometheus reads it. Never looks at what it says, but that it says something."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from threading import Event
from time import monotonic

from tests.bench.spawned import CannotRunError

EVERY = 1.0  # seconds: Prometheus by default takes 60, and hardly anybody less than 5
PATIENCE = 20.0  # seconds


def scrape(port: int) -> float:
    """Read the metrics once. How long that took, in seconds."""
    begun = monotonic()
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        if answer.status != 200 or b"preforkd_requests_total" not in answer.read():
            raise CannotRunError(f"a scrape was answered with status {answer.status}")
    return monotonic() - begun


@contextmanager
def scraping(port: int) -> Iterator[None]:
    """Read the metrics at once, and once a second as long as the block. Raises in the end what a scrape has raised."""
    is_over = Event()

    def go_on() -> None:
        scrape(port)
        while not is_over.wait(EVERY):
            scrape(port)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(go_on)
        try:
            yield
        finally:
            is_over.set()
        reading.result()
