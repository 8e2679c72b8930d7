"""The C programs of the benchmark, compiled into a temporary folder. Never keeps a binary."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.spawned import CannotRunError

HERE = Path(__file__).parent
COMPILE_PATIENCE = 60  # seconds


@dataclass(frozen=True)
class Tools:
    """Paths that a measurement needs."""

    load: str
    server: str
    bytecode: str


@contextmanager
def built() -> Iterator[Tools]:
    """Compile load.c and server.c. Raises CannotRunError if there is no compiler or it finds a fault."""
    with TemporaryDirectory(prefix="preforkd-bench-") as folder:
        yield Tools(compiled("load", folder), compiled("server", folder), f"{folder}/bytecode")


def compiled(name: str, folder: str) -> str:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CannotRunError("no C compiler: the load generator needs one (Debian: gcc, libc6-dev)")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-o", f"{folder}/{name}", str(HERE / f"{name}.c")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_PATIENCE, check=False)
    if result.returncode:
        raise CannotRunError(f"{name}.c does not compile:\n{result.stderr}")
    return f"{folder}/{name}"
