"""A stock that is kept in memory, and called over XML-RPC."""

import threading
from collections import Counter
from xmlrpc.server import SimpleXMLRPCServer


class Stock:
    """Called from many threads."""

    def __init__(self):
        self.lock = threading.Lock()
        self.items = Counter()

    def add(self, item, number):
        with self.lock:
            self.items[item] += number
            return self.items[item]

    def take(self, item, number):
        with self.lock:
            if self.items[item] < number:
                raise ValueError(f"{self.items[item]} left of {item}")
            self.items[item] -= number
            return self.items[item]

    def list(self):
        with self.lock:
            return dict(self.items)


def server(address):
    made = SimpleXMLRPCServer(address, logRequests=False, allow_none=True)
    made.register_instance(Stock())
    made.register_introspection_functions()
    return made
