"""wsgiref's server around wsgiref's demonstration."""

from wsgiref.simple_server import demo_app, make_server


def server(address):
    host, port = address[:2]
    return make_server(host, port, demo_app)
