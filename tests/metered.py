"""A handler that counts with prometheus_client as any single-process program does. It knows nothing of preforkd."""

import os
import threading
from socketserver import StreamRequestHandler

from prometheus_client import Counter, Gauge, Histogram, Summary

LINES = Counter("app_lines", "Lines, by what they say.", ["order"])
SIZE = Histogram("app_size", "Sizes.", buckets=(1, 10))
COST = Summary("app_cost", "Costs.")
MODES = ("all", "liveall", "min", "livemin", "max", "livemax", "sum", "livesum", "mostrecent", "livemostrecent")
GAUGES = {mode: Gauge(f"app_{mode}", "A gauge.", multiprocess_mode=mode) for mode in MODES}  # type: ignore[arg-type]

# What a program counts while it starts.
IMPORTS = Counter("app_imports", "Imports.")
IMPORTS.inc()
VERSION = Gauge("app_version", "Version.", ["version"])
VERSION.labels("one").set(1)


class Metered(StreamRequestHandler):
    """Does what the line says, counts it, and tells its pid."""

    def handle(self) -> None:
        for line in self.rfile:
            order, *words = line.decode().split()
            LINES.labels(order).inc()
            self.obey(order, *words)
            self.wfile.write(b"%d\n" % os.getpid())

    def obey(self, order: str, *words: str) -> None:
        match order:
            case "size":
                SIZE.observe(float(words[0]))
            case "cost":
                COST.observe(float(words[0]))
            case "gauge":
                GAUGES[words[0]].set(float(words[1]))
            case "late":  # a metric that is made while it serves
                Counter("app_late", "Late.", registry=None).inc()
            case "series":
                for number in range(int(words[0])):
                    LINES.labels(f"order {number}").inc()
            case "fork":
                child = os.fork()
                if child == 0:
                    for _ in range(5):
                        LINES.labels("fork").inc()
                        COST.observe(100)
                    Gauge("app_childs", "A child's.", registry=None).set(1)
                    os._exit(0)
                os.waitpid(child, 0)
            case "threads":
                threads = [threading.Thread(target=self.count, args=(LINES.labels("thread"),)) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

    def count(self, counter: Counter) -> None:
        for _ in range(1000):
            counter.inc()
