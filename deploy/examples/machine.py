"""Figures of this machine for Prometheus, each measured when it is asked for."""

import os
from wsgiref.simple_server import make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

registry = CollectorRegistry()
scrapes = Counter("machine_scrapes", "Times that this page was asked for.", registry=registry)
load = Gauge("machine_load", "Processes that run or want to, averaged over a minute.", registry=registry)
load.set_function(lambda: os.getloadavg()[0])
page = make_wsgi_app(registry)


def counting(environ, start_response):
    scrapes.inc()
    return page(environ, start_response)


def server(address):
    host, port = address[:2]
    return make_server(host, port, counting, ThreadingWSGIServer)
