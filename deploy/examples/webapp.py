"""An application, and Werkzeug's server around it."""

import logging

from flask import Flask, request
from werkzeug.serving import make_server

app = Flask(__name__)
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each page


@app.get("/hello/<name>")
def hello(name):
    return f"hello, {name}\n"


@app.post("/count")
def count():
    return {"bytes": len(request.get_data())}


def server(address):
    host, port = address[:2]
    return make_server(host, port, app)
