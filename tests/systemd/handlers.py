"""Handlers that need room: for the daemon under test as systemd confines it. They know nothing of preforkd."""

import ctypes
import os
import pwd
import socket
import ssl
import subprocess
from pathlib import Path
from socketserver import StreamRequestHandler, TCPServer
from typing import Any

import psutil


class Room(StreamRequestHandler):
    """Does what handlers do beside answering."""

    def handle(self) -> None:
        for line in self.rfile:
            order, *words = line.decode().split()
            try:
                answer = getattr(self, f"do_{order}")(*words)
            except OSError as error:
                answer = os.strerror(error.errno or 0)
            self.wfile.write(f"{answer}\n".encode())

    def do_whoami(self) -> str:
        return pwd.getpwuid(os.getuid()).pw_name

    def do_write(self, path: str) -> str:
        """Write a file, in the state directory if it is a name."""
        Path(os.environ["STATE_DIRECTORY"], path).write_text("kept")
        return "written"

    def do_list(self, path: str) -> str:
        return " ".join(sorted(os.listdir(path)))

    def do_connect(self, port: str) -> str:
        with socket.create_connection(("localhost", int(port)), 5) as other:
            return other.recv(99).decode()

    def do_run(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    def do_nice(self) -> int:
        return os.nice(1)

    def do_call_back(self) -> int:
        """Have C call Python, for which libffi makes code."""
        return int(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 42)())

    def do_machine(self) -> str:
        return f"{psutil.virtual_memory().total > 0} {psutil.cpu_times().user >= 0}"

    def do_chroot(self) -> None:
        os.chroot("/")


class Sealed(TCPServer):
    """Speaks TLS, with a key that it was given as a credential."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        given = Path(os.environ["CREDENTIALS_DIRECTORY"])
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(given / "tls.crt", given / "tls.key")

    def get_request(self) -> Any:
        connection, client = super().get_request()
        return self.context.wrap_socket(connection, server_side=True), client
