"""Who is compared with whom, by what, and what ratio is required: one table. Never runs anything itself."""

from __future__ import annotations

from tests.bench.crowd import SIZES, crowd
from tests.bench.pools import CLIENTS, CONNECT, CPU, ECHO, POOLS, UPPER
from tests.bench.probes import GET, LINE, Side, exchanges, memory, pages, time_to_ready
from tests.bench.rows import Contest, Row, cpu, rate
from tests.bench.servers import PROCESSES, gunicorn, in_c, in_module, in_python, preforkd, with_gevent

TALK, DATAGRAM = (f"tests/bench/handlers.py:{name}" for name in ("Talk", "Datagram"))
PAGE = "tests/bench/web.py:Page"
FEW, TALKERS = 2, 64  # processes that serve many connections each, and clients
OPEN = SIZES[-1]
THREADS = ("--kind", "thread", "--threads", "16")  # the default number: the other connections wait in the backlog
THREADS_FOR_ALL = ("--kind", "thread", "--threads", str(OPEN // PROCESSES))
GREENLETS = ("--kind", "gevent")
FRESH = ("--set", "max_requests=1")  # a process for each request, as ForkingMixIn has it
C = "C pre-fork"
GUNICORN = "gunicorn sync"
STREAM_SERVER = "gevent StreamServer"


def connect(peer: Side, *rows: Row, modules: tuple[str, ...] = ()) -> Contest:
    return Contest(exchanges(preforkd(ECHO), "connect", CLIENTS), peer, rows, modules)


def held(how: str, peer: str, side: int = 0, at_most: float | None = None) -> Row:
    what = f"memory of {OPEN:,} open connections, {how}"
    return Row(what, peer, "grown_mib", "{:.1f} MiB", at_most=at_most, side=side, plot="memory")


def latency(peer: str, at_most: float) -> Row:
    what = "median latency at 50/s, max_requests=1"
    return Row(what, peer, "p50_us", "{:.0f} us", at_most=at_most, plot="latency")


CONTESTS = (
    connect(
        exchanges(in_c("connect"), "connect", CLIENTS),
        rate(CONNECT, C, at_least=0.80, aim=0.90),
        cpu(CPU, C, at_most=2.2),
    ),
    connect(
        exchanges(in_python("threading"), "connect", CLIENTS),
        rate(CONNECT, "ThreadingTCPServer", at_least=4.5),
    ),
    Contest(
        exchanges(in_module("tests.bench.library"), "connect", CLIENTS),
        exchanges(in_python("threading"), "connect", CLIENTS),
        (rate("connect-echo-close TCP, library's pool", "ThreadingTCPServer", at_least=1.5),),
    ),
    connect(
        exchanges(in_python("forking"), "connect", CLIENTS),
        rate(CONNECT, "ForkingTCPServer", at_least=20),
    ),
    connect(
        exchanges(in_python("uvloop-streams"), "connect", CLIENTS),
        rate(CONNECT, "uvloop streams", at_least=1.3),
        modules=("uvloop",),
    ),
    connect(
        exchanges(in_python("uvloop-protocol"), "connect", CLIENTS),
        rate(CONNECT, "uvloop Protocol", at_least=1.0),
        modules=("uvloop",),
    ),
    Contest(  # a worker holds one connection at a time: no more clients than workers
        exchanges(preforkd(TALK), "persistent", PROCESSES),
        exchanges(in_c("persistent"), "persistent", PROCESSES),
        (rate("persistent echo TCP", C, at_least=0.85),),
    ),
    Contest(
        exchanges(preforkd(DATAGRAM, "udp"), "udp", CLIENTS),
        exchanges(in_c("udp"), "udp", CLIENTS),
        (rate("echo UDP", C, at_least=0.45),),
    ),
    Contest(
        exchanges(preforkd(DATAGRAM, "udp"), "udp", CLIENTS),
        exchanges(in_python("threading-udp"), "udp", CLIENTS),
        (rate("echo UDP", "ThreadingUDPServer", at_least=10),),
    ),
    Contest(
        pages(preforkd(PAGE), CLIENTS),
        pages(gunicorn(), CLIENTS),
        (
            rate("HTTP by wrk, http.server", GUNICORN, at_least=2.0),
            cpu("CPU time per page, http.server", GUNICORN),
        ),
        modules=("gunicorn",),
        commands=("wrk",),
    ),
    Contest(
        memory(lambda workers: preforkd(UPPER, processes=workers), LINE),
        memory(gunicorn, GET),
        (Row("memory of one more worker", GUNICORN, "mib", "{:.2f} MiB", at_most=2.0, of_figure=True),),
        modules=("gunicorn",),
    ),
    Contest(
        time_to_ready(preforkd(UPPER), LINE),
        time_to_ready(gunicorn(), GET),
        (Row("time to ready, sample", GUNICORN, "ms", "{:.0f} ms", at_most=1.2),),
        modules=("gunicorn",),
    ),
    Contest(
        time_to_ready(preforkd(PAGE), GET),
        time_to_ready(gunicorn(), GET),
        (Row("time to ready, http.server", GUNICORN, "ms", "{:.0f} ms", at_most=1.2),),
        modules=("gunicorn",),
    ),
    Contest(
        exchanges(preforkd(ECHO, options=THREADS), "connect", CLIENTS),
        exchanges(in_python("threading"), "connect", CLIENTS),
        (
            rate(f"{CONNECT}, threads", "ThreadingTCPServer", at_least=4),
            rate(f"{CONNECT}, threads, 1 process", "ThreadingTCPServer", side=1),
        ),
        more=(exchanges(preforkd(ECHO, processes=1, options=THREADS), "connect", CLIENTS),),
    ),
    Contest(
        crowd(preforkd(TALK, options=THREADS), most_at_once=PROCESSES * 16),
        crowd(in_python("threading-talk")),
        (
            held("16 threads per process", "ThreadingTCPServer", at_most=0.25),
            held("as many threads", "ThreadingTCPServer", side=1),
        ),
        more=(crowd(preforkd(TALK, options=THREADS_FOR_ALL)),),
    ),
    Contest(
        exchanges(preforkd(ECHO, processes=FEW, options=GREENLETS), "connect", TALKERS),
        exchanges(with_gevent("connect", FEW), "connect", TALKERS),
        (rate(f"{CONNECT}, gevent", STREAM_SERVER, at_least=0.8),),
        modules=("gevent",),
    ),
    Contest(
        exchanges(preforkd(TALK, processes=FEW, options=GREENLETS), "persistent", TALKERS),
        exchanges(with_gevent("persistent", FEW), "persistent", TALKERS),
        (rate("persistent echo TCP, gevent", STREAM_SERVER, at_least=0.8),),
        modules=("gevent",),
    ),
    Contest(
        crowd(preforkd(TALK, processes=FEW, options=GREENLETS)),
        crowd(with_gevent("persistent", FEW)),
        (held("gevent", STREAM_SERVER),),
        modules=("gevent",),
    ),
    Contest(
        exchanges(preforkd(ECHO, options=FRESH), "steady", CLIENTS),
        exchanges(in_python("forking"), "steady", CLIENTS),
        (latency("ForkingTCPServer", at_most=0.5),),
    ),
    Contest(
        exchanges(preforkd(ECHO, options=FRESH), "steady", CLIENTS),
        exchanges(preforkd(ECHO), "steady", CLIENTS),
        (latency("preforkd, workers that stay", at_most=1.3),),
    ),
    Contest(
        exchanges(preforkd(ECHO, options=FRESH), "connect", CLIENTS),
        exchanges(in_python("forking"), "connect", CLIENTS),
        (rate(f"{CONNECT}, max_requests=1", "ForkingTCPServer", at_least=1),),
    ),
    *POOLS,
)
