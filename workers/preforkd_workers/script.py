"""A script, run as ``python script.py`` or ``python -m module`` runs it, up to where it calls ``serve_forever()``.

That call, in the main thread, is where the mold waits and forks. In a worker it serves, and returns when the worker
drains, so that the lines below it run there as their author meant them; in the mold it never returns.
``handle_request()`` in a loop of the script's will do as well.

Servers that other threads serve at that moment are services of their own, each with a mold of its own, which has run
the script as this one has.
"""

import atexit
import builtins
import os
import runpy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from socketserver import BaseServer
from types import ModuleType
from typing import Any, NoReturn

from preforkd_workers.adoption import keep, keep_sockets, made_by, protect
from preforkd_workers.audit import Snapshot
from preforkd_workers.bindings import Bindings
from preforkd_workers.explanation import TargetError
from preforkd_workers.hooks import Hook, Hooks
from preforkd_workers.process import Worker
from preforkd_workers.single import Drained
from preforkd_workers.spec import MODULE, Spec
from preforkd_workers.target import Target, find_hook, fit, prepare

# How long a thread that calls serve_forever() waits for the main thread to do so, too, in seconds.
ALONE_FOR = 2.0

# How long the main thread waits for threads that are about to call it, in seconds.
PATIENCE = 1.0

_WANTED = "want one whose main thread calls serve_forever() of a socketserver server"


class Script:
    """The script of a mold, with which every worker of the mold goes on.

    ``wait`` is called where the script serves, with what is to be served and the URLs of all servers of the script: it
    returns in a worker only, with that worker. ``fail`` ends the mold.
    """

    def __init__(
        self,
        spec: Spec,
        bindings: Bindings,
        wait: Callable[[Target, list[str]], Worker],
        fail: Callable[[BaseException], NoReturn],
    ) -> None:
        self.spec = spec
        self.bindings = bindings
        self.worker: Worker | None = None
        self._wait, self._fail = wait, fail
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._in_threads: list[tuple[threading.Thread, Any]] = []  # who has called serve_forever(), and of what
        self._is_served = False  # the main thread has called it

    def known(self, before: Snapshot) -> Snapshot:
        """What was there before, and what is there on purpose since: listeners, and threads that stand still."""
        threads = {thread.native_id or 0: thread.name for thread, _ in self._in_threads}
        listeners = {-each.inode: f"socket:[{each.inode}]" for each in self.bindings.open()}
        return Snapshot({**before.threads, **threads}, before.tasks, {**before.descriptors, **listeners})

    @property
    def name(self) -> str:
        return self.spec.target.removeprefix(MODULE)

    def run(self) -> None:
        """Run it to its end, which in a worker is its author's affair. In the mold every end is a failure.

        Raises what the script raises, and TargetError when it has not served.
        """
        keep(self.spec.kept_files)
        protect(self.spec.listeners)
        if self.spec.is_rehearsal:
            keep_sockets()
        atexit._clear()  # what is there is the master's
        try:
            with made_by(self.bindings.make), self._in_place_of_the_loop():
                _run_as_main(self.spec.target, self.spec.args)
            if self.worker is None:
                raise TargetError(self._why_not())
        except SystemExit as error:
            if self.worker is None:
                error.add_note(f"({self.name} has not called serve_forever(); {_WANTED})")
            raise
        finally:
            if self.worker is not None:
                self.worker.finish()
                atexit._run_exitfuncs()  # the script's

    def _why_not(self, patience: str = "") -> str:
        """Why there is nothing to serve."""
        for thread, server in self._in_threads:
            return (
                f"{self.name} calls serve_forever() of a {type(server).__name__} in the thread {thread.name!r} and "
                f"not {patience}in the main thread; a fork copies no other thread than the one that forks: call it in "
                "the main thread (the workers serve clients side by side without threads)"
            )
        return f"{self.name} has come to its end without a call of serve_forever(); {_WANTED}"

    # In the mold: what stands where socketserver has its loop.

    @contextmanager
    def _in_place_of_the_loop(self) -> Iterator[None]:
        self._loop, self._turn = BaseServer.serve_forever, BaseServer.handle_request

        def serve_forever(server: BaseServer, poll_interval: float = 0.5) -> None:
            if os.getpid() != self._pid:  # a child of the script's own
                return self._loop(server, poll_interval)
            if (ours := self._stop(server)) is server:
                BaseServer.serve_forever(server, poll_interval)
            else:
                ours.serve_forever(poll_interval)
            return self._end()

        def handle_request(server: BaseServer) -> None:
            if os.getpid() != self._pid:
                return self._turn(server)
            if (ours := self._stop(server)) is server:
                return BaseServer.handle_request(server)
            with suppress(Drained):
                ours.serve_forever()
            return self._end()

        _replace_loop(serve_forever, handle_request)
        yield

    def _stop(self, server: BaseServer) -> BaseServer:
        """The mold stays here. In a worker, returns the server that it serves, by socketserver's loop as it is then."""
        if threading.current_thread() is not threading.main_thread():
            self._stop_thread(server)
        target, urls = self._found(server)
        self.worker = self._wait(target, urls)
        _replace_loop(self._loop, self._turn)
        for other in self._called(server):
            if other not in target.servers:  # nobody serves it here: there is nothing that its shutdown() can wait for
                other._BaseServer__is_shut_down.set()
        self.worker.take_over()
        return target.servers[0]

    def _stop_thread(self, server: BaseServer) -> NoReturn:
        """Another thread serves: its stack stays as it is, or its ``finally`` would run here."""
        thread = threading.current_thread()
        with self._changed:
            self._in_threads.append((thread, server))
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._is_served, ALONE_FOR):
                self._fail(TargetError(self._why_not(f"within {ALONE_FOR:g} s ")))
        while True:
            threading.Event().wait()

    def _called(self, server: BaseServer) -> list[Any]:
        """The servers whose loop was called, this one by the main thread."""
        return [server, *(other for _, other in self._in_threads)]

    def _found(self, server: BaseServer) -> tuple[Target, list[str]]:
        """Which server of the script is ours, and the URLs of them all."""
        with self._changed:
            if threading.active_count() > 1:
                self._changed.wait_for(lambda: len(self._called(server)) >= len(self.bindings.open()), PATIENCE)
            self._is_served = self.bindings.is_closed = True
            self._changed.notify_all()
        try:
            servers = self._in_order(self._called(server))
            urls = [url for url, _ in servers]
            return self._target(servers), urls
        except Exception as error:
            self._fail(error)

    def _in_order(self, servers: Sequence[Any]) -> list[tuple[str, Any]]:
        """Servers with the URLs of their listeners, in the order in which they were bound."""
        opened = self.bindings.open()
        found: list[tuple[int, str, Any]] = []
        for server in servers:
            binding = self.bindings.of(server)
            if binding is None and self.spec.listeners:
                found.append((len(opened), self.spec.listeners[0].url, server))
            elif binding is None:
                raise TargetError(
                    f"{self.name}: the socket of its {type(server).__name__} is not made by socketserver, so a reload "
                    "could not keep it open; say where to listen: --listen URL"
                )
            else:
                found.append((opened.index(binding), binding.url, server))
        return [(url, server) for _, url, server in sorted(found, key=lambda each: each[0])]

    def _target(self, servers: list[tuple[str, Any]]) -> Target:
        spec = self.spec
        if spec.server > len(servers):
            raise TargetError(f"{self.name} serves {len(servers)}: there is no server = {spec.server}")
        _, server = servers[spec.server - 1]
        for listener in spec.listeners:
            fit(self.name, server, listener)
            listener.socket.close()  # the server has a copy
        prepare(server, spec)
        return Target(
            "script", [server], Hooks({setting: self._hook(setting, name) for setting, name in spec.hooks.items()})
        )

    def _hook(self, setting: str, name: str) -> Hook:
        """A hook by its name in the script, or as ``module:name``."""
        if ":" in name:
            return find_hook(self.spec.target, setting, name)
        found = getattr(sys.modules["__main__"], name, None)
        if not callable(found):
            raise TargetError(f"{setting}: {self.name} has no function {name!r}")
        hook: Hook = found
        return hook

    # In a worker.

    def _end(self) -> None:
        """It has drained: whatever the script wants to serve next, it will not."""
        assert self.worker is not None
        self.worker.finish_requests()
        loop, turn = BaseServer.serve_forever, BaseServer.handle_request

        def serve_forever(server: BaseServer, poll_interval: float = 0.5) -> None:
            _drained_in_main_thread()
            loop(server, poll_interval)

        def handle_request(server: BaseServer) -> None:
            _drained_in_main_thread()
            turn(server)

        _replace_loop(serve_forever, handle_request)


def _drained_in_main_thread() -> None:
    if threading.current_thread() is threading.main_thread():
        raise Drained(0)


def _replace_loop(serve_forever: Any, handle_request: Any) -> None:
    BaseServer.serve_forever, BaseServer.handle_request = serve_forever, handle_request  # type: ignore[method-assign]


# How Python runs a script.


def _run_as_main(target: str, args: Sequence[str]) -> None:
    if target.startswith(MODULE):
        _run_module(target.removeprefix(MODULE), args)
    else:
        _run_file(target, args)


def _run_module(name: str, args: Sequence[str]) -> None:
    """As ``python -m name`` does."""
    sys.path.insert(0, os.getcwd())
    try:
        found = find_spec(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise
        found = None
    if found is None:
        raise TargetError(f"no module named {name!r} in {os.getcwd()} or elsewhere on sys.path")
    sys.argv = [name, *args]  # the first is replaced by the module's file
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_file(path: str, args: Sequence[str]) -> None:
    """As ``python path`` does: its bytecode is neither read nor written."""
    where = os.path.abspath(path)
    if not os.path.isfile(where):
        raise TargetError(f"{where}: no such file")
    sys.argv = [path, *args]
    sys.path.insert(0, os.path.dirname(os.path.realpath(where)))
    loader = SourceFileLoader("__main__", where)
    main = sys.modules["__main__"] = ModuleType("__main__")
    vars(main).update(__file__=where, __loader__=loader, __cached__=None, __builtins__=builtins)
    with suppress(OSError):
        loader.path_stats(where)  # dev mode sees by it what is imported
    exec(loader.source_to_code(loader.get_data(where), where), vars(main))
