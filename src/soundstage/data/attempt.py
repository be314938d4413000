"""One attempt at one task, on whatever process or machine: call the stage, and put what it made into the store."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from soundstage.core.errors import ConfigError
from soundstage.data.database import plain
from soundstage.data.flow import Drop, Flow, Gather, Item, Poison, Transient
from soundstage.data.ledger import record
from soundstage.data.seat import Seat, clear, noted
from soundstage.data.store import DiskFull, Ref, Store, is_full

__all__ = ["Job", "Outcome", "Result", "Work", "last_words"]

Kind = Literal["done", "transient", "poison", "error", "lost", "full", "released"]


@dataclass(frozen=True)
class Job:
    """A task as it travels: which stage, whose, and the records (files, facts) of its items; never their media.

    attempts: how many were made before this one.
    """

    position: int
    stage: int
    key: str
    attempts: int
    records: tuple[tuple[dict, dict], ...]

    @property
    def ticket(self) -> str:
        """What its worker notes while it is worked on, and what is left to read after a sudden end."""
        return f"{self.stage}-{self.key}"


@dataclass(frozen=True)
class Result:
    """What a stage made: a row of the ledger, the files that came into the store, and why it goes no further."""

    row: dict[str, str]
    blobs: tuple[tuple[str, int], ...]
    reason: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job. lost: its worker died in it; released: its worker died before it; full: the disk is.

    free: the attempt does not count.
    """

    kind: Kind
    results: tuple[Result, ...] = ()
    reason: str | None = None
    error: str | None = None
    after: float | None = None
    seconds: float | None = None
    free: bool = False


@dataclass(frozen=True)
class Work:
    """What a worker needs to know: the stages, where files are, and its seat. Called with a job.

    sync: workers of other hosts read what is noted here.
    """

    flow: Flow
    folder: Path
    owner: str
    seat: str = "here"
    sync: bool = False

    @cached_property
    def store(self) -> Store:
        """Of the dataset folder."""
        return Store(self.folder)

    @cached_property
    def stages(self) -> list[tuple[Any, bool]]:
        """In order, and whether each is a gather, which takes long to tell."""
        return [(stage, isinstance(stage, Gather)) for stage in self.flow.stages.values()]

    @cached_property
    def place(self) -> Seat:
        """This worker's."""
        return Seat(self.store, self.owner, self.seat, sync=self.sync)

    def __call__(self, job: Job) -> Outcome:
        """Try a job once; never raises but for what stops a process."""
        start = time.perf_counter()
        try:
            results = self._results(job, self.place.begin(job.ticket))
            outcome = Outcome("done", results, seconds=time.perf_counter() - start)
        except Exception as error:
            outcome = self._failure(error, time.perf_counter() - start)
        try:
            self.place.end()
        except OSError as error:
            return self._failure(error, time.perf_counter() - start)
        return outcome

    def _results(self, job: Job, scratch: Path) -> tuple[Result, ...]:
        for files, _ in job.records:
            self.store.check(files)
        items = [self.store.item(*each) for each in job.records]
        stage, gathers = self.stages[job.position]
        if gathers:
            outcomes = list(stage.gather(items, scratch))
            if sum(isinstance(each, Drop) for each in outcomes) > len(items):
                raise ConfigError("a gather dropped more items than its group has; each Drop stands for one member")
        else:
            outcomes = list(stage(items[0], scratch))
        moved: dict[Path, Ref] = {}
        return tuple(self._kept(each, scratch, moved) for each in outcomes)

    def _kept(self, outcome: Item | Drop, scratch: Path, moved: dict[Path, Ref]) -> Result:
        drop = outcome if isinstance(outcome, Drop) else None
        item, refs = self.store.put(drop.item if drop else outcome, scratch, moved)  # type: ignore[arg-type]
        blobs = tuple((ref[0], ref[2]) for ref in refs.values() if not Path(ref[0]).is_absolute())
        try:
            row = record(item, refs)
        except TypeError as error:
            raise ConfigError(
                f"a fact is no plain JSON value: {error}; facts hold numbers, text, lists, dicts"
            ) from None
        if drop is None:
            return Result(row, blobs)
        return Result(row, blobs, plain(drop.reason), None if drop.score is None else float(drop.score))

    def _failure(self, error: Exception, seconds: float) -> Outcome:
        from soundstage.media.errors import MediaError

        if isinstance(error, DiskFull) or is_full(error, self.folder):
            return Outcome("full", seconds=seconds)
        said = plain(f"{type(error).__name__}: {error}" if not isinstance(error, Poison | Transient) else str(error))
        trace = plain("".join(traceback.format_exception(error)))
        if isinstance(error, Poison | MediaError):
            return Outcome("poison", reason=plain(str(error)), error=trace, seconds=seconds)
        if isinstance(error, Transient):
            after, free = error.after, error.progressed or error.after is not None
            return Outcome("transient", reason=said, error=trace, after=after, seconds=seconds, free=free)
        return Outcome("error", reason=said, error=trace, seconds=seconds)


def last_words(store: Store, owner: str, seat: str, jobs: Sequence[Job], reason: str) -> list[tuple[Job, Outcome]]:
    """Of the jobs of a worker that died: the one it was in was lost, or met a full disk; the others are free."""
    begun = noted(store, owner, seat)
    clear(store, owner, seat)
    kind: Kind = "full" if is_full(None, store.folder) else "lost"
    ended, free = Outcome(kind, reason=reason, error=reason), Outcome("released")
    return [(job, ended if job.ticket in begun else free) for job in jobs]


def one_thread() -> None:
    """Keep the libraries of this process to one thread each: workers share the cores already."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ.setdefault(name, "1")
