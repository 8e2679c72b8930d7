"""By what a daemon and its successor under the same pid know each other."""

# To be raised with every change of the state that is handed over, of the scoreboard's layout, or of the protocol with
# molds and workers.
STATE_VERSION = 1

# The variable that tells a successor the descriptor of the state.
VARIABLE = "_PREFORKD_STATE_FD"


def refusal(version: object) -> str:
    """What is said of a state that we cannot take over."""
    return f"the daemon that runs hands over a state of version {version}, and this takes over version {STATE_VERSION}"
