"""The hooks that a service's settings may name: what of the target is called beside its handlers, and when.

Each is called once for every server of the target. What one raises before the worker serves is a failure to boot; what
one raises later is logged and changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import Struct, field

ON_MOLD = "on_mold"
ON_WORKER_START = "on_worker_start"
ON_DRAIN = "on_drain"
ON_WORKER_STOP = "on_worker_stop"

# Every hook by the name of its setting, in the order in which they come.
HOOKS = ON_MOLD, ON_WORKER_START, ON_DRAIN, ON_WORKER_STOP

Hook = Callable[..., object]


class Hooks(Struct, frozen=True):
    """The hooks that a target has, by setting."""

    found: Mapping[str, Hook] = field(default_factory=dict)

    def __contains__(self, setting: str) -> bool:
        return setting in self.found

    @property
    def of_workers(self) -> bool:
        """Whether any is called at the begin or the end of every worker."""
        return ON_WORKER_START in self or ON_WORKER_STOP in self

    def run(self, setting: str, servers: list[Any], *arguments: object) -> None:
        """Call a hook, if there is one. Raises what it raises, with a note that says where it came from."""
        for error in self.faults(setting, servers, *arguments):
            raise error

    def faults(self, setting: str, servers: list[Any], *arguments: object) -> Iterator[BaseException]:
        """Call a hook, if there is one, for one server after the other: what it has raised, be it an exit."""
        for server in servers if setting in self.found else ():
            try:
                self.found[setting](server, *arguments)
            except BaseException as error:  # the hook's affair, an exit too: who called decides what becomes of it
                error.add_note(f"(raised by the hook {setting})")
                yield error
