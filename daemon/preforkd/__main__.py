"""``preforkd`` and ``python -m preforkd``: hold the signals first, then load the rest.

A signal that comes while the program is still loading is answered when the loop runs, instead of killing it.
"""

import gc
import os
import signal
import sys

_HELD = {
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH),
}


def main() -> None:
    """Run the command line and exit with its status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    _open_standard_streams()
    gc.disable()  # nothing of what is loaded is garbage
    from preforkd import cli

    gc.enable()
    sys.exit(cli.main(sys.argv[1:]))


def _open_standard_streams() -> None:
    """Whoever started us may have closed them: lest a listener becomes somebody's standard error."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - as long as we live
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    main()
