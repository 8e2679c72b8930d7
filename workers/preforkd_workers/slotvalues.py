"""The values of prometheus_client's metrics in a worker: in memory, and in the files of its slot.

prometheus_client makes a value for every series (``values.ValueClass``), by default in memory, in its multiprocess mode
in a file that it shares with whoever adds the values up. This is that mode, in its file format, but for what a pool of
forked workers needs: what the mold has made at import moves into the worker's files; what a child of the handler's own
counts stays in its memory, or it would overwrite its parent's; no file is ever seen half made; the directory is not
told to programs that a handler runs; and a file that cannot be had costs its page, not the request.

Imported by whoever has imported prometheus_client, and by nobody else.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from prometheus_client.mmap_dict import mmap_key

from preforkd_workers.valuefile import ValueFile, identity, name_of

Say = Callable[..., None]  # event, and its fields


class Cell:
    """One value: a number, and where in which file it is kept, if it is."""

    __slots__ = ("at", "file", "is_set", "key", "kind", "time", "value")

    def __init__(self, kind: str, key: str) -> None:
        self.kind = kind
        self.key = key
        self.value = self.time = 0.0
        self.is_set = False  # by the code, and not only read from a file
        self.file: ValueFile | None = None
        self.at = 0

    def write(self, value: float, time: float) -> None:
        self.value, self.time, self.is_set = value, time, True
        if self.file is not None:
            words, at = self.file.words, self.at
            words[at], words[at + 1] = value, time

    def bind(self, file: ValueFile) -> None:
        """Go on with what the file says, but for a gauge that the mold has set, and later. Raises OSError."""
        at = file.place(self.key)
        value, time = file.words[at], file.words[at + 1]
        self.file, self.at = file, at
        if self.is_set and self.kind.startswith("gauge") and self.time >= time:
            self.write(self.value, self.time)
        else:
            self.value, self.time = value, time


class Values:
    """Every value of this process. Those with the same metric, name and labels are one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may count, too
        self._cells: dict[tuple[str, str], Cell] = {}
        self._files: dict[str, ValueFile | None] = {}  # by kind; None: cannot be had
        self._complained: set[str] = set()  # of which kinds
        self._path: Callable[[str], str] | None = None  # where the file of a kind is
        self._say: Say = lambda *_, **__: None
        os.register_at_fork(after_in_child=self._be_a_copy)

    def cell(self, kind: str, key: str) -> Cell:
        """The value of this key, in memory, and in a file if we have a place for it."""
        with self.lock:
            name = kind, identity(key.encode())
            if name not in self._cells:
                self._cells[name] = Cell(kind, key)
                self._bind(self._cells[name])
            return self._cells[name]

    def keep_what_the_mold_counted(self, directory: str, service: str, slot: str) -> None:
        """Add what was counted here to the files of ``slot``, but for gauges: those are each worker's.

        Raises OSError.
        """
        files: dict[str, ValueFile] = {}
        for cell in self._cells.values():
            if cell.is_set and not cell.kind.startswith("gauge"):
                if cell.kind not in files:
                    files[cell.kind] = ValueFile(os.path.join(directory, name_of(cell.kind, service, slot)))
                at = files[cell.kind].place(cell.key)
                files[cell.kind].words[at] += cell.value

    def attach(self, directory: str, service: str, slot: int, say: Say) -> None:
        """From now on have every value in the files of this slot."""
        with self.lock:
            self._say = say
            self._path = lambda kind: os.path.join(directory, name_of(kind, service, slot))
            for cell in self._cells.values():
                self._bind(cell)

    def _bind(self, cell: Cell) -> None:
        try:
            file = self._file(cell.kind)
            if file is not None:
                cell.bind(file)
        except OSError as error:  # no room: what is kept already stays, and this one is in memory only
            if cell.kind not in self._complained:
                self._complained.add(cell.kind)
                self._say("user_metrics_lost", kind=cell.kind, reason=error.strerror)

    def _file(self, kind: str) -> ValueFile | None:
        if self._path is not None and kind not in self._files:
            self._files[kind] = None  # one attempt
            file = self._files[kind] = ValueFile(self._path(kind))
            if file.damage:
                self._say("user_metrics_file_replaced", file=os.path.basename(file.path), reason=file.damage)
        return self._files.get(kind)

    def _be_a_copy(self) -> None:
        """In any child: the lock may have been held. In one that a handler forks: the files are not its own."""
        self.lock = threading.RLock()
        if self._path is not None:
            self._path = None
            for file in self._files.values():
                if file is not None:
                    file.words = memoryview(bytearray(file.words)).cast("d")
            self._files = {}


VALUES = Values()


class Value:
    """What prometheus_client wants of a ``values.ValueClass``."""

    _multiprocess = True

    def __init__(
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Any,
        labelvalues: Any,
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ) -> None:
        key = mmap_key(metric_name, name, labelnames, labelvalues, help_text)
        self._cell = VALUES.cell(f"{typ}_{multiprocess_mode}" if typ == "gauge" else typ, key)

    def inc(self, amount: float) -> None:
        with VALUES.lock:
            self._cell.write(self._cell.value + amount, 0.0)

    def set(self, value: float, timestamp: float | None = None) -> None:
        with VALUES.lock:
            self._cell.write(value, timestamp or 0.0)

    def get(self) -> float:
        with VALUES.lock:
            return self._cell.value

    def set_exemplar(self, exemplar: object) -> None:
        """The file format has no room for exemplars."""

    def get_exemplar(self) -> None:
        return None
