"""What supervisord is asked by its XML-RPC, as by one of its children. Nothing here waits, or keeps a connection."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Any
from xmlrpc.client import Error, Fault, ProtocolError, ServerProxy

from msgspec import Struct

# For supervisord to answer, in seconds. None of what we ask for takes time.
PATIENCE = 5.0

# Of its faults (supervisor.xmlrpc: Faults).
_ALREADY_STARTED = 60

STATES = ("STOPPED", "STARTING", "RUNNING", "BACKOFF", "STOPPING", "EXITED", "FATAL", "UNKNOWN")


class Unreachable(Exception):
    """It has not done what it was asked for; the message says why."""


class Program(Struct, frozen=True):
    """A process of supervisord's, as it is now."""

    group: str
    name: str
    state: str  # one of STATES
    pid: int  # 0: it has none
    started: int  # since the epoch; 0: never
    age: int  # in seconds; supervisord's clock may be set, so any number

    @property
    def namespec(self) -> str:
        """As supervisorctl has it."""
        return namespec(self.group, self.name)


def namespec(group: str, name: str) -> str:
    """``x``, or ``group:x``."""
    return name if group == name else f"{group}:{name}"


class Supervisord:
    """The supervisord whose child we are: ``environment`` says where it is, and who we are to it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def programs(self) -> list[Program]:
        """All that it has. Raises Unreachable, as the others do."""
        with self._asked() as supervisor:
            found = supervisor.getAllProcessInfo()
        return [_program(info) for info in found]

    def kill(self, program: Program) -> bool:
        """Kill the process that it was when it was seen. False: it is that no more."""
        with self._asked() as supervisor:
            now = _program(supervisor.getProcessInfo(program.namespec))
            if (now.pid, now.state) != (program.pid, program.state):
                return False
            supervisor.signalProcess(program.namespec, "KILL")
        return True

    def start(self, program: Program) -> None:
        """Start it, and do not wait for what becomes of that. It may have been started already."""
        try:
            with self._asked() as supervisor:
                supervisor.startProcess(program.namespec, False)
        except Unreachable as reason:
            if not isinstance(reason.__cause__, Fault) or reason.__cause__.faultCode != _ALREADY_STARTED:
                raise

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        from supervisor.childutils import getRPCTransport  # an extra

        try:
            transport = getRPCTransport(self._environment)
            transport._get_connection = _patient(transport._get_connection)
            with ServerProxy("http://127.0.0.1", transport=transport) as proxy:  # the transport knows where it is
                yield proxy.supervisor
        except Fault as fault:
            raise Unreachable(fault.faultString) from fault
        except ProtocolError as error:
            raise Unreachable(f"{error.errcode} {error.errmsg}") from error
        except (OSError, HTTPException, Error) as error:
            raise Unreachable(str(error) or type(error).__name__) from error


def _patient(make: Any) -> Any:
    """What makes a connection, with a time-out: supervisor's own has none."""

    def connected() -> HTTPConnection:
        connection: HTTPConnection = make()
        connection.timeout = PATIENCE
        connection.connect()
        connection.sock.settimeout(PATIENCE)
        return connection

    return connected


def _program(info: Mapping[str, Any]) -> Program:
    age = info["now"] - info["start"]
    return Program(info["group"], info["name"], info["statename"], info["pid"], info["start"], age)
