"""A worker that is to end only so many requests counts them, and tells the master when it is worn.

It goes on serving until it is replaced.
"""

from itertools import count
from typing import TYPE_CHECKING

from preforkd_workers.tally import follow

if TYPE_CHECKING:
    from preforkd_workers.process import Worker


def limit(worker: "Worker", most: int) -> None:
    """Tell the master after the last request that it is to end; and again after the next, until that was heard.

    The master looks for itself then: a child that a handler has forked may say so as well.
    """
    requests = count(1)
    unheard = [worker.lifeline.worn]

    def tell() -> None:
        if next(requests) >= most and unheard and unheard[0]():
            unheard.clear()

    for tally in worker.tallies:
        follow(tally, "end", tell)
        follow(tally, "refuse", tell)
