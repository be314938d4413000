"""Run a flow: claim, work, commit, until nothing is left; kill it whenever you like and start it again."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from soundstage.core.errors import ConfigError
from soundstage.data.attempt import Job, Outcome, Work
from soundstage.data.claims import Claims
from soundstage.data.flow import Flow, Gather
from soundstage.data.ledger import Ledger
from soundstage.data.reach import Count
from soundstage.data.store import DiskFull

__all__ = ["Crew", "Progress", "run"]

COMMIT_SECONDS = 0.1
"""The longest that what is done waits to be committed while there is more to do."""
AHEAD_SECONDS = 0.25
"""How much work is claimed ahead of the workers, so that hosts share what is left."""
POLL_SECONDS = 0.2
TELL_SECONDS = 0.5


class Crew(Protocol):
    """Who does the work: processes of this machine, or actors of a cluster."""

    @property
    def room(self) -> int:
        """How many jobs can be given now."""
        ...

    @property
    def busy(self) -> int:
        """How many jobs it has."""
        ...

    def give(self, job: Job) -> None:
        """Hand over one job, where there is room."""
        ...

    def reap(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """What became of jobs, waiting so long for the first."""
        ...

    def close(self) -> list[tuple[Job, Outcome]]:
        """End everyone, whatever they are doing; what they had done that was not reaped."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a run is. done: tasks settled in this run; left: known to be left now, before gathers that wait.

    stages: settled in this run by stage; outcomes: of them "done", "dropped", "poisoned", "failed", by count.
    """

    done: int
    left: int
    seconds: float
    stages: Mapping[str, int]
    outcomes: Mapping[str, int]

    @property
    def rate(self) -> float:
        """Tasks per second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


def run(
    flow: Flow,
    ledger: Ledger,
    folder: Path | None = None,
    *,
    workers: int | None = None,
    attempts: int = 3,
    backoff: float = 1.0,
    lease: float = 60.0,
    limit: float | None = 3600.0,
    batch: int = 64,
    crew: Callable[[Work], Crew] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Count, ...]:
    """Bring every item as far through the flow as it goes; returns the funnel.

    folder: the ledger's own, given for a check. workers: processes; default one per core. attempts, backoff: of a task,
    and seconds before its second attempt, doubled for each further one. lease: seconds until another host takes over
    from a run that says nothing. limit: seconds of one attempt. batch: outcomes per transaction, at most. crew: other
    workers, such as `cluster.ray_crew()`. Raises DiskFull, LedgerError; KeyboardInterrupt after a clean stop by
    SIGINT or SIGTERM.
    """
    if folder is not None and Path(folder).absolute() != ledger.folder:
        raise ConfigError(f"folder: {folder} is not the ledger's, {ledger.folder}; open the ledger with this folder")
    for name, value, least in (("workers", workers, 1), ("attempts", attempts, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name}: {value} is below {least}")
    claims = Claims(ledger, attempts=attempts, lease=lease, backoff=backoff)
    make = crew or (lambda work: _pool(work, workers or os.cpu_count() or 1, limit))
    try:
        with _stoppable() as stopped:
            this = _Run(flow, claims, make, batch, stopped, on_progress)
            try:
                this.all()
            finally:
                this.close()
    finally:
        claims.close()
    return ledger.funnel(flow)


def _pool(work: Work, workers: int, limit: float | None) -> Crew:
    from soundstage.data.pool import Pool

    return Pool(work, workers, limit)


class _Run:
    """The loop of one run."""

    def __init__(
        self,
        flow: Flow,
        claims: Claims,
        make: Callable[[Work], Crew],
        batch: int,
        stopped: Callable[[], bool],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.flow, self.claims, self.batch = flow, claims, batch
        self.stopped, self.on_progress = stopped, on_progress
        self.make = make
        self.ready: deque[Job] = deque()
        self.outcomes: list[tuple[Job, Outcome]] = []
        self.start = self.recovered = self.committed = self.told = time.monotonic()
        self.stages, self.states = Counter[str](), Counter[str]()
        self.recent: deque[float] = deque(maxlen=256)

    @cached_property
    def crew(self) -> Crew:
        """Who works; called together when there is something to do."""
        return self.make(Work(self.flow, self.claims.ledger.folder, self.claims.owner))

    def close(self) -> None:
        """Send everyone home."""
        if "crew" in vars(self):
            self.crew.close()

    def all(self) -> None:
        """Up to each gather in turn, and then to the end."""
        names = list(self.flow.stages)
        for k, stage in enumerate(self.flow.stages.values()):
            if isinstance(stage, Gather):
                if k:
                    self.through(self.flow.until(names[k - 1]))
                self.claims.group(self.flow, k)
        self.through(self.flow)

    def through(self, part: Flow) -> None:
        """Work until nothing of these stages is left to do, by this run or another."""
        while (left := self.claims.want(part)).count:
            self.tell(left.count)
            self.drain(part)
        self.tell(0)

    def drain(self, part: Flow) -> None:
        """Until there is nothing to claim and nothing to wait for."""
        claim_at = 0.0
        while not self.stopped():
            if len(self.ready) < self.crew.room and time.monotonic() >= claim_at:
                jobs = self.claims.claim(part, self.ahead())
                self.ready.extend(jobs)
                claim_at = 0.0 if jobs else time.monotonic() + POLL_SECONDS
            while self.ready and self.crew.room > 0:
                self.crew.give(self.ready.popleft())
            if self.crew.busy:
                found = self.crew.reap(COMMIT_SECONDS)
                self.recent.extend([time.monotonic()] * len(found))
                self.outcomes += found
            late = time.monotonic() - self.committed > COMMIT_SECONDS
            if self.outcomes and (late or not self.ready or len(self.outcomes) >= self.batch):
                self.commit(part)
                claim_at = 0.0
            if claim_at and not self.crew.busy:
                if not self.wait(part):
                    return
                claim_at = 0.0
        if "crew" in vars(self):
            self.outcomes += self.crew.close()
        self.commit(part)
        raise KeyboardInterrupt

    def ahead(self) -> int:
        """How many tasks to claim: what the workers have room for, and a moment's work more."""
        span = time.monotonic() - self.recent[0] if self.recent else 0.0
        rate = len(self.recent) / span if span > 0 else 0.0
        return min(self.crew.room + math.ceil(AHEAD_SECONDS * rate), self.crew.room + self.batch)

    def wait(self, part: Flow) -> bool:
        """With nothing to claim: wait for a retry, or for other runs. False where nothing is left."""
        left = self.claims.left(self.claims.ledger.numbers(part))
        if not left.count:
            return False
        self.tell(left.count)
        if time.monotonic() - self.recovered > self.claims.lease / 3:
            self.recovered = time.monotonic()
            self.claims.recover()
        time.sleep(POLL_SECONDS if left.next is None else min(left.next, POLL_SECONDS))
        return True

    def commit(self, part: Flow) -> None:
        """Write what is done; raises DiskFull where a worker met one."""
        outcomes, self.outcomes = self.outcomes, []
        self.committed = time.monotonic()
        if not outcomes:
            return
        names = list(part.stages)
        for job, state in self.claims.commit(part, outcomes):
            if state != "pending":
                self.stages[names[job.position]] += 1
                self.states[state] += 1
        if any(outcome.kind == "full" for _, outcome in outcomes):
            raise DiskFull(self.claims.ledger.folder)
        if self.on_progress is not None and time.monotonic() - self.told > TELL_SECONDS:
            self.tell(self.claims.left(self.claims.ledger.numbers(part)).count)

    def tell(self, left: int) -> None:
        """Say how far it is."""
        self.told = time.monotonic()
        if self.on_progress is not None:
            seconds = self.told - self.start
            self.on_progress(Progress(self.states.total(), left, seconds, dict(self.stages), dict(self.states)))


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop; the second one is not waited for. Only the main thread can hear them."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hear(number: int, _: Any) -> None:  # noqa: ANN401
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {each: signal.signal(each, hear) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
