"""``[rpcinterface:preforkd]``: supervisord's XML-RPC answers for the daemons that are its programs.

It is imported by supervisord, and runs in its one thread: whatever takes time is deferred, and nothing here waits. It
finds a daemon by the pid that supervisord knows, so it has no options.
"""

import re
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from supervisor import events
from supervisor.http import NOT_DONE_YET
from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.xmlrpc import Faults, RPCError

from preforkd.supervisor.loop import LOST, Conversation, end_all
from preforkd.supervisor.supervised import Master, master_of

# For the daemon to answer what takes no time, in seconds. What takes time has its deadlines in the daemon: while we
# wait for it, the daemon is asked every now and then whether its loop turns.
PATIENCE = 10.0
PULSE = 3.0

# How often a reload is followed over the end of the connection: an upgrade cuts it, and goes on with the reload.
FOLLOWED = 3

# How often we ask for an answer that nobody has told us of, in seconds at least.
DELAY = 0.5


def make(supervisord: Any, **options: str) -> "Preforkd":
    """The factory that supervisord's settings name."""
    if options:
        raise ValueError(f"[rpcinterface:preforkd] has no option {', '.join(options)}")
    return Preforkd(supervisord)


class Preforkd:
    """What may be called as ``preforkd.workers`` and so on.

    Each answer is a JSON object, as a string: what the daemon has answered (docs/reference.md, "The control
    protocol"). A fault says why there is none.
    """

    def __init__(self, supervisord: Any) -> None:
        self._supervisor = SupervisorNamespaceRPCInterface(supervisord)
        events.subscribe(events.SupervisorStoppingEvent, self._stop)

    def workers(self, name: str) -> Callable[[], object]:
        """Tell of the services, listeners and workers of a program

        @param string name     Process name (or ``group:name``)
        @return string result  The status, as a JSON object
        """
        return self._ask(name, "status", {}, is_quick=True)

    def scale(self, name: str, workers: int, service: str = "") -> Callable[[], object]:
        """Change how many workers a service has, and wait until it has them

        @param string name     Process name (or ``group:name``)
        @param int workers     How many
        @param string service  Which service; may be left out where there is one
        @return string result  How many there are, as a JSON object
        """
        return self._ask(name, "scale", {"workers": workers, **_of(service)})

    def roll(self, name: str, service: str = "") -> Callable[[], object]:
        """Replace all workers by fresh ones of the same code, and wait until they are

        @param string name     Process name (or ``group:name``)
        @param string service  Which service; all, when it is left out
        @return string result  How many there are, as a JSON object
        """
        return self._ask(name, "roll", _of(service))

    def reload(self, name: str, service: str = "") -> Callable[[], object]:
        """Have settings and code read anew, and wait for the verdict: a fault, with the traceback, when it is not done

        @param string name     Process name (or ``group:name``)
        @param string service  Which service; all, when it is left out
        @return string result  The generation and the seconds that it took, as a JSON object
        """
        return self._ask(name, "reload", _of(service))

    def _ask(
        self, name: str, do: str, arguments: Mapping[str, object], *, is_quick: bool = False
    ) -> Callable[[], object]:
        """The answer, which is deferred: a function, for supervisord to call until it has one."""
        call = _Call(self._master(name), do, arguments, is_quick=is_quick)

        def look() -> object:
            return call.look()

        look.delay = DELAY  # type: ignore[attr-defined]
        return look  # supervisord knows what is deferred by its being a plain function

    def _master(self, name: str) -> Master:
        """Raises RPCError when there is no such program, or when it is not running, or none of ours."""
        pid = self._supervisor.getProcessInfo(name)["pid"]
        if not pid:
            raise RPCError(Faults.NOT_RUNNING, name)
        master = master_of(pid)
        if master is None:
            raise _failed(f"pid {pid} is no preforkd with a control socket, or has only just started")
        return master

    def _stop(self, _: object) -> None:
        """Let go of our descriptors: a supervisord that restarts closes them all, and others get their numbers."""
        end_all("supervisord is stopping")


class _Call:
    """What has been asked of a daemon, until it has answered, or cannot any more."""

    def __init__(self, master: Master, do: str, arguments: Mapping[str, object], *, is_quick: bool) -> None:
        self.master, self.do = master, do
        pulse = None if is_quick else self._begin("ping", {})
        self.talk = self._begin(do, arguments)
        self.pulse = pulse or self.talk
        self.followed = 0

    def look(self) -> object:
        """The answer if it has come, or NOT_DONE_YET. Raises RPCError when there will be none."""
        if self.talk.look() and self._is_cut_by_upgrade():
            self.followed += 1
            self.talk = self._begin("outcome", {})
        if self.talk.is_over:
            self.pulse.end()
            return _answer(self.talk)
        try:
            self._feel_pulse()
        except RPCError:
            self.talk.end()
            raise
        return NOT_DONE_YET

    def _is_cut_by_upgrade(self) -> bool:
        return self.do == "reload" and self.talk.fault == LOST and self.followed < FOLLOWED

    def _feel_pulse(self) -> None:
        """Raises RPCError when the daemon has not answered for too long."""
        age = monotonic() - self.pulse.began
        if age > PATIENCE:  # of this process as well, perhaps: it may have been stopped itself
            self.pulse.handle_read_event()
        if self.pulse.look() and age > PULSE:
            self.pulse = self._begin("ping", {})
        elif not self.pulse.is_over and age > PATIENCE:
            self.pulse.end()
            raise _failed(f"no answer within {PATIENCE:g} s: the daemon is stopped or stuck")

    def _begin(self, do: str, arguments: Mapping[str, object]) -> Conversation:
        try:
            return Conversation(self.master, do, arguments)
        except BlockingIOError:
            raise _failed("no answer: the daemon takes no connections any more, it is stopped or stuck") from None
        except OSError as error:
            raise _failed(f"no daemon at {self.master.control}: {error.strerror}") from None


def _answer(talk: Conversation) -> str:
    """Raises RPCError when it is none, or a refusal."""
    if talk.answer is None:
        raise _failed(talk.fault)
    if not talk.answer.get("ok"):
        raise _failed(str(talk.answer.get("error")))
    return talk.line


def _of(service: str) -> dict[str, str]:
    return {"service": service} if service else {}


def _failed(reason: str) -> RPCError:
    r"""A fault with this text, in which all that XML cannot hold, or that is not ASCII, is an escape such as \xe9.

    The length that supervisord gives of a deferred answer counts its characters, not its bytes.
    """
    clean = _UNFIT.sub(lambda found: found[0].encode("unicode_escape").decode(), reason.rstrip())
    return RPCError(Faults.FAILED, clean)


_UNFIT = re.compile(r"[^\t\n\x20-\x7e]")
