"""Whether daemons answer at their control sockets. It changes nothing, and asks all at once."""

from collections.abc import Mapping
from threading import Thread
from time import monotonic

from preforkd.ctl import Connection, Failed, Lost, NoDaemon

# How often to ask a daemon that hangs up, as one does in the middle of an upgrade.
_ATTEMPTS = 3


def ask(controls: Mapping[str, str], patience: float) -> dict[str, str | None]:
    """Ask the daemons at these control sockets, all at the same time: what is wrong with each, None if nothing is.

    ``patience``, in seconds, is for every one of them: whoever hangs does not keep the others, nor us.
    """
    until = monotonic() + patience
    late = f"no answer within {patience:g} s"
    faults: dict[str, str | None] = dict.fromkeys(controls, late)

    def settle(name: str, path: str) -> None:
        fault = _fault_of(path, until)
        faults[name] = fault if fault is None or monotonic() < until else late

    threads = [Thread(target=settle, args=each, daemon=True) for each in controls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - monotonic()))
    return dict(faults)


def _fault_of(path: str, until: float) -> str | None:
    """Any answer will do, a refusal too: it comes from the loop, and shows that it turns."""
    for _ in range(_ATTEMPTS):
        try:
            connection = Connection(path, _left(until))
            try:
                for _ in connection.ask("ping", {}, _left(until)):
                    return None
            finally:
                connection.close()
        except Lost:
            continue
        except (Failed, NoDaemon) as reason:
            return str(reason).removeprefix(f"{path}: ")
        except (OSError, ValueError) as error:
            return f"no preforkd answers there: {error}"
    return "it hangs up"


def _left(until: float) -> float:
    return max(0.01, until - monotonic())  # 0 would be for ever, or not at all
