"""SimpleXMLRPCServer, called by xmlrpc.client from several threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from xmlrpc.client import Fault, MultiCall, ServerProxy

import pytest

from tests.clients.conftest import METRICS, SERVERS, outcomes
from tests.conftest import Serve

THREADS = 8
CALLS = 50


def test_calls_from_many_threads_get_their_own_answers(serve: Serve) -> None:
    daemon = serve(f"{SERVERS}:xmlrpc", "--listen", "tcp://127.0.0.1:0", *METRICS)
    host, port = daemon.address()

    def call(thread: int) -> list[object]:
        with ServerProxy(f"http://{host}:{port}") as proxy:
            return [proxy.add(1000 * thread, number) for number in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as threads:
        answers = [*threads.map(call, range(THREADS))]
    assert answers == [[1000 * thread + number for number in range(CALLS)] for thread in range(THREADS)]
    assert outcomes(daemon, "xmlrpc", THREADS * CALLS) == {"ok": THREADS * CALLS}


def test_faults_long_texts_and_many_calls_in_one_request(serve: Serve) -> None:
    daemon = serve(f"{SERVERS}:xmlrpc", "--listen", "tcp://127.0.0.1:0", *METRICS)
    host, port = daemon.address()
    text = "".join(map(chr, range(0x20, 0x2000))) * 20
    with ServerProxy(f"http://{host}:{port}") as proxy:
        methods: Any = proxy.system.listMethods()
        assert {"add", "divide", "reverse", "system.multicall"} <= set(methods)
        assert proxy.reverse(text) == text[::-1]
        with pytest.raises(Fault, match="ZeroDivisionError"):
            proxy.divide(1, 0)
        calls = MultiCall(proxy)
        for number in range(10):
            calls.add(number, number)
        answers: Any = calls()
        assert [*answers] == [2 * number for number in range(10)]
    assert outcomes(daemon, "xmlrpc", 4) == {"ok": 4}
