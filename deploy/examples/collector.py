"""Appends each message to the file named messages."""

import os
import re
from socketserver import BaseRequestHandler
from time import strftime

SEVERITIES = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]

file = os.open("messages", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)


class Collector(BaseRequestHandler):
    """A message begins with its priority in angle brackets (RFC 3164, RFC 5424)."""

    def handle(self):
        message = self.request[0].decode(errors="backslashreplace").rstrip("\0\n").replace("\n", "\\n")
        priority = re.match(r"<(\d{1,3})>", message)
        severity = SEVERITIES[int(priority[1]) % 8] if priority else "notice"
        text = message[priority.end() :] if priority else message
        os.write(file, f"{strftime('%FT%T')} {severity} {text}\n".encode())
