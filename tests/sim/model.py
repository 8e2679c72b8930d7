"""A pool under load as a discrete-event model: the real rules of size and of steps, a fake clock, no process.

Requests arrive, wait in one queue, and are served by whichever worker is idle, the lowest slot first. Workers are what
``plan`` makes of them: they boot, serve, and leave when they are told to and hold nothing.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf

from preforkd.holdback import HoldBack
from preforkd.plan import (
    Haste,
    Kill,
    Retire,
    Spawn,
    State,
    Timeouts,
    Wanted,
    is_failed_start,
    plan,
    wake_at,
)
from preforkd.sizing import Bounds, Breath, begin, breathe, changes

TIMEOUTS = Timeouts(boot=1e6, graceful=1e6, eof=1e6)


@dataclass(frozen=True)
class Request:
    """One request: when it comes, and how long a worker needs for it; seconds."""

    at: float
    takes: float


@dataclass(frozen=True)
class Scenario:
    """What is put upon a pool, and the pool. Times in seconds."""

    name: str
    tells: str  # what is to be seen in it
    bounds: Bounds
    requests: Callable[[], Iterable[Request]]
    lasts: float
    boot: float = 0.05
    crashes: tuple[float, float] = (inf, inf)  # a worker that starts in this time dies as soon as it has booted


@dataclass(eq=False)
class Worker:
    """A child without a process."""

    slot: int
    since: float
    generation: int = 1
    state: State = State.BOOTING
    busy: bool = False
    ended: int = 0
    born: float = 0.0
    worn: str | None = None
    retires_first: bool = False


@dataclass
class Course:
    """What has happened."""

    sizes: list[tuple[float, int, int]] = field(default_factory=list)  # time, workers wanted, workers ready
    waits: list[tuple[float, float]] = field(default_factory=list)  # when a request came, how long it waited
    events: list[tuple[float, str, str]] = field(default_factory=list)  # time, event, reason
    most_booting: int = 0
    unserved: int = 0
    retired_busy: int = 0  # while somebody else was idle

    def changes(self, after: float = 0.0) -> int:
        """How often the size has changed since this time."""
        return sum(at >= after and event in ("grown", "shrunk") for at, event, _ in self.events)

    def worker_seconds(self) -> float:
        """Workers wanted, summed over time."""
        return sum((b[0] - a[0]) * a[1] for a, b in zip(self.sizes, self.sizes[1:], strict=False))


class Pool:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.bounds = scenario.bounds
        self.now = 0.0
        self.breath: Breath = begin(0.0, self.bounds)
        self.workers: dict[int, Worker] = {}
        self.queue: deque[Request] = deque()
        self.held_back: dict[int, HoldBack] = defaultdict(HoldBack)  # by slot
        self.course = Course()
        self.has_changed = True  # who is there, or in which state
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.ticket = count()
        self.requests: Iterator[Request] = iter(scenario.requests())

    def run(self) -> Course:
        """From the start to the end of the scenario."""
        self._expect()
        wake = 0.0
        while True:
            if self.has_changed or self.now >= wake:  # requests come and go without a look at the rules
                self.has_changed = False
                self._settle()
                wake = min(self.breath.wake_at, wake_at(self._wanted(), self._children(), TIMEOUTS, self._not_before()))
            due = self.agenda[0][0] if self.agenda else inf
            self.now = max(self.now, min(due, wake))
            if self.now >= self.scenario.lasts:
                break
            while self.agenda and self.agenda[0][0] <= self.now:
                heappop(self.agenda)[2]()
        self.now = self.scenario.lasts
        self._note()
        self.course.unserved = len(self.queue)
        self.course.waits += [(request.at, self.now - request.at) for request in self.queue]
        return self.course

    def _at(self, time: float, do: Callable[[], None]) -> None:
        heappush(self.agenda, (time, next(self.ticket), do))

    # The load.

    def _expect(self) -> None:
        request = next(self.requests, None)
        if request is not None:
            self._at(request.at, lambda: self._arrived(request))

    def _arrived(self, request: Request) -> None:
        self.queue.append(request)
        self._serve()
        self._expect()

    def _serve(self) -> None:
        idle = [each for each in self._children() if each.state is State.READY and not each.busy]
        for worker in sorted(idle, key=lambda each: each.slot)[: len(self.queue)]:
            request = self.queue.popleft()
            self.course.waits.append((request.at, self.now - request.at))
            worker.busy = True
            self._at(self.now + request.takes, lambda worker=worker: self._served(worker))  # type: ignore[misc]

    def _served(self, worker: Worker) -> None:
        worker.busy, worker.ended = False, worker.ended + 1
        if worker.state is State.READY:
            self._serve()
        else:
            self._gone(worker)

    # The pool, as ``breathing.py`` and ``pool.py`` keep it.

    def _children(self) -> list[Worker]:
        return [*self.workers.values()]

    def _live(self) -> list[Worker]:
        return [each for each in self._children() if each.state in (State.BOOTING, State.READY)]

    def _wanted(self) -> Wanted:
        return Wanted(self.breath.size, haste=Haste.NONE)

    def _settle(self) -> None:
        self._breathe()
        for step in plan(self.now, self._wanted(), self._children(), TIMEOUTS, self._not_before()):
            match step:
                case Spawn(slot):
                    self._spawn(slot)
                case Retire(Worker() as worker):
                    self.course.retired_busy += worker.busy and not all(each.busy for each in self._live())
                    worker.state, worker.since = State.DRAINING, self.now
                    if not worker.busy:
                        self._at(self.now, lambda worker=worker: self._gone(worker))  # type: ignore[misc]
                case Kill():
                    raise AssertionError(f"{step} although nobody is late")
        booting = sum(each.state is State.BOOTING for each in self._children())
        self.course.most_booting = max(self.course.most_booting, booting)
        self._note()

    def _breathe(self) -> None:
        ready = [each for each in self._children() if each.state is State.READY]
        before, busy = self.breath, sum(each.busy for each in ready)
        self.breath = breathe(self.now, before, self.bounds, busy, len(ready))
        self.course.events += [(self.now, event, reason) for event, reason in changes(before, self.breath)]

    def _note(self) -> None:
        ready = sum(each.state is State.READY for each in self._children())
        self.course.sizes.append((self.now, self.breath.size, ready))

    def _spawn(self, slot: int) -> None:
        worker = self.workers[slot] = Worker(slot, self.now, born=self.now)
        self._at(self.now + self.scenario.boot, lambda: self._booted(worker))

    def _booted(self, worker: Worker) -> None:
        if worker.state is not State.BOOTING:
            return
        self.has_changed = True
        worker.state, worker.since = State.READY, self.now
        begins, ends = self.scenario.crashes
        if begins <= worker.born < ends:
            self._crashed(worker)
        else:
            self._serve()

    def _not_before(self) -> dict[int, float]:
        return {slot: each.until for slot, each in self.held_back.items()}

    def _crashed(self, worker: Worker) -> None:
        self._gone(worker)
        if is_failed_start(self.now - worker.born, worker.ended):
            self.held_back[worker.slot].fail(self.now)

    def _gone(self, worker: Worker) -> None:
        self.has_changed = True
        if self.workers.get(worker.slot) is worker:
            del self.workers[worker.slot]
