"""Workers on a Ray cluster: actors that take jobs as they are; the ledger stays with the run, media stay on the disk.

What travels is a task's id and the records (facts, names of files) of its items. The dataset folder must be on a file
system that all nodes see, and the code importable on them.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from soundstage.core.errors import ConfigError, MissingExtra
from soundstage.data.attempt import Job, Outcome, Work, last_words
from soundstage.data.pool import QUEUED

__all__ = ["RayCrew", "ray_crew"]

LOOPBACK = "127.0.0.1"
STILLBORN = 8


def ray_crew(
    workers: int | None = None, address: str | None = None, limit: float | None = 3600.0
) -> Callable[[Work], RayCrew]:
    """For `run(crew=...)`. address: of a running cluster, such as "auto"; None starts one on this machine.

    workers: actors of one core each, by default as many as the cluster has cores. limit: seconds of one attempt.
    """
    return lambda work: RayCrew(work, workers, address, limit)


@dataclass
class _Actor:
    seat: str
    handle: Any
    jobs: deque[tuple[Any, Job]] = field(default_factory=deque)  # (reference of the outcome, job)
    since: float = 0.0


class RayCrew:
    """Actors that take jobs and give back outcomes; a dead one is replaced."""

    def __init__(self, work: Work, workers: int | None, address: str | None, limit: float | None) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtra("ray", "cluster") from None
        self.ray, self.work, self.limit, self._deaths, self._seats = ray, replace(work, sync=True), limit, 0, 0
        self._ours = not ray.is_initialized()
        if self._ours:
            quiet = {"log_to_driver": False, "configure_logging": False}
            here = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": LOOPBACK}
            try:
                ray.init(address=address, **quiet, **({} if address else here))
            except ConnectionError as error:
                raise ConfigError(
                    f"ray: {address} cannot be reached: {error}; start it with ray start --head"
                ) from None
        self._class = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(_remote())
        self._work = ray.put(pickle.dumps(self.work))
        count = workers or int(ray.cluster_resources().get("CPU", 1))
        self._actors = [self._start() for _ in range(count)]

    @property
    def room(self) -> int:
        """How many jobs can be given now."""
        return sum(QUEUED - len(actor.jobs) for actor in self._actors)

    @property
    def busy(self) -> int:
        """How many jobs are with the actors."""
        return sum(len(actor.jobs) for actor in self._actors)

    def give(self, job: Job) -> None:
        """Hand a job to the actor that has the fewest."""
        actor = min(self._actors, key=lambda each: len(each.jobs))
        if not actor.jobs:
            actor.since = time.monotonic()
        actor.jobs.append((actor.handle.attempt.remote(job), job))

    def reap(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """What became of jobs, waiting so long for the first."""
        waiting = [reference for actor in self._actors for reference, _ in actor.jobs]
        self.ray.wait(waiting, num_returns=1, timeout=seconds)
        ready = set(self.ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
        found: list[tuple[Job, Outcome]] = []
        for n, actor in enumerate(self._actors):
            while actor.jobs and actor.jobs[0][0] in ready:
                reference, job = actor.jobs[0]
                try:
                    outcome = self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    found += self._bury(n, _reason(error))
                    break
                found.append((job, outcome))
                actor.jobs.popleft()
                actor.since, self._deaths = time.monotonic(), 0
            if self.limit and actor.jobs and time.monotonic() - actor.since > self.limit:
                found += self._bury(n, f"it took longer than {self.limit:g} s and was stopped")
        return found

    def close(self) -> list[tuple[Job, Outcome]]:
        """End the actors, and the cluster where this started it; what they had done that was not reaped."""
        found = self.reap(0.0) if self.busy else []
        for actor in self._actors:
            self._kill(actor)
        self._actors = []
        if self._ours:
            self._ours = False
            self.ray.shutdown()
        return found

    def _start(self) -> _Actor:
        self._seats += 1
        seat = f"actor{self._seats}"
        return _Actor(seat, self._class.remote(list(sys.path), [self._work], seat))

    def _bury(self, n: int, reason: str) -> list[tuple[Job, Outcome]]:
        """Replace an actor; the job it was in was lost, those behind are free."""
        actor = self._actors[n]
        self._kill(actor)
        jobs = [job for _, job in actor.jobs]
        found = last_words(self.work.store, self.work.owner, actor.seat, jobs, reason)
        self._deaths += all(outcome.kind == "released" for _, outcome in found)
        if self._deaths > STILLBORN:
            raise ConfigError(f"ray: its workers end before they begin: {reason}")
        self._actors[n] = self._start()
        return found

    def _kill(self, actor: _Actor) -> None:
        with contextlib.suppress(Exception):  # it may be dead already, in more ways than one
            self.ray.kill(actor.handle)


def _reason(error: Exception) -> str:
    return f"its worker was killed ({type(error).__name__})"


def _remote() -> type:
    """The class of an actor, which travels by value: where it arrives our package may not be importable yet."""

    class Actor:
        def __init__(self, path: list[str], work: list[Any], seat: str) -> None:
            import pickle
            import sys
            from dataclasses import replace

            import ray

            sys.path += [each for each in path if each not in sys.path]
            self.work = replace(pickle.loads(ray.get(work[0])), seat=seat)

        def attempt(self, job: Any) -> Any:  # noqa: ANN401
            return self.work(job)

    return Actor
