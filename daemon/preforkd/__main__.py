"""``preforkd`` and ``python -m preforkd``: hold the signals first, then load the rest.

A signal that comes while the program is still loading is answered when the loop runs, instead of killing it.
"""

import signal
import sys

_HELD = {
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU),
}


def main() -> None:
    """Run the command line and exit with its status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    from preforkd import cli

    sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
