"""wsgiref's WSGIServer under curl."""

import random
from pathlib import Path

from tests.clients.conftest import METRICS, SERVERS, needs, outcomes, run
from tests.conftest import Serve

PAGES = 200


@needs("curl", "curl")
def test_curl_reads_pages_and_gets_back_what_it_posts(serve: Serve, tmp_path: Path) -> None:
    daemon = serve(f"{SERVERS}:wsgi", "--listen", "tcp://127.0.0.1:0", *METRICS)
    host, port = daemon.address()
    curl = ("curl", "--no-progress-meter", "--fail", "--fail-early")
    pages = "".join(f'url = "http://{host}:{port}/{number}"\noutput = "{number}"\n' for number in range(PAGES))
    run(*curl, "--parallel", "--parallel-max", 8, "--config", "-", directory=tmp_path, text=pages)
    wrong = [n for n in range(PAGES) if (tmp_path / f"{n}").read_text() != f"GET /{n} on port {port}\n"]
    assert wrong == []
    (tmp_path / "sent").write_bytes(random.Random("sent").randbytes(1 << 20))
    post = ("--data-binary", "@sent", "--header", "Content-Type: application/octet-stream", "--output", "back")
    run(*curl, *post, f"http://{host}:{port}/", directory=tmp_path)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "sent").read_bytes()
    assert outcomes(daemon, "wsgi", PAGES + 1) == {"ok": PAGES + 1}
    assert "Traceback" not in daemon.log.text
