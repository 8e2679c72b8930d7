"""The page that preforkd serves in the benchmark, by `http.server`. Never keeps a connection."""

from http.server import BaseHTTPRequestHandler

from tests.bench.wsgi import PAGE


class Page(BaseHTTPRequestHandler):
    """Answer every GET with PAGE; log no request, as gunicorn does by default."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is http.server's
        """Say nothing."""
