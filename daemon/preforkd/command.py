"""One command of the control socket: what it is called, what it takes, and what does it.

Which commands there are is in ``commands.py``.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

if TYPE_CHECKING:
    from preforkd.control import Request
    from preforkd.master import Master


class Argument(Struct, frozen=True):
    """What a command may be given: a key of the request, and a word or a flag of preforkctl."""

    name: str
    type: type
    help: str
    is_required: bool = False
    bounds: tuple[int, int] | None = None
    flags: tuple[str, ...] = ()  # of preforkctl, which turn the default over; none: a word
    default: object = None

    def checked(self, value: object) -> Any:
        """The value, if it is one. Raises ValueError with what is wanted instead."""
        if type(value) is not self.type:
            raise ValueError(f"{self.name}: want {_KINDS[self.type]}, not {value!r}")
        if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:  # type: ignore[operator]
            raise ValueError(f"{self.name}: want {self.bounds[0]} to {self.bounds[1]}, not {value}")
        return value

    @property
    def usage(self) -> str:
        word = self.flags[-1] if self.flags else self.name.upper()
        return word if self.is_required else f"[{word}]"


_KINDS = {str: "text", int: "a whole number", bool: "true or false"}

# Of commands that take time.
WAIT = Argument("wait", bool, "do not wait for the outcome", flags=("--no-wait",), default=True)


class Command(Struct, frozen=True):
    """One command: what it is called, takes and does."""

    name: str
    help: str
    act: "Callable[[Master, Request], None]"
    arguments: tuple[Argument, ...] = ()
    changes: bool = False  # it is logged, with who has asked

    @property
    def usage(self) -> str:
        return " ".join([self.name, *(argument.usage for argument in self.arguments)])

    @property
    def takes_time(self) -> bool:
        return WAIT in self.arguments

    def checked(self, given: Mapping[str, object]) -> dict[str, Any]:
        """All arguments with the values given, or those left out. Raises ValueError."""
        known = {argument.name: argument for argument in self.arguments}
        for name in given:
            if name not in known:
                raise ValueError(f"{self.name} takes {', '.join(known) or 'nothing'}, not {name!r}")
        values = {}
        for name, argument in known.items():
            if given.get(name) is not None:
                values[name] = argument.checked(given[name])
            elif argument.is_required:
                raise ValueError(f"{name}: required, {argument.help}")
            else:
                values[name] = argument.default
        return values
