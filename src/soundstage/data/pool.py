"""Worker processes of one machine: any of them may crash, hang or be killed without harm to the rest."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from soundstage.core.errors import ConfigError, SoundstageError
from soundstage.data.attempt import Job, Outcome, Work, last_words, one_thread
from soundstage.data.store import DiskFull, is_full

__all__ = ["Pool"]

QUEUED = 2
"""Jobs that a worker has, the one it is working on included: so it need not wait for the next."""
READY = "ready"
STILLBORN = 8
"""How many workers may die one after another before any was ready."""


@dataclass
class _Worker:
    seat: str
    process: BaseProcess
    pipe: Connection
    jobs: deque[Job] = field(default_factory=deque)
    since: float = 0.0  # when it began its first job
    ready: bool = False


class Pool:
    """Workers that take jobs and give back outcomes; a dead one is replaced.

    limit: seconds that one job may take, None for any time; then its worker is killed.
    """

    def __init__(self, work: Work, workers: int, limit: float | None = None) -> None:
        self.work, self.limit, self._stillborn, self._seats = work, limit, 0, 0
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context = multiprocessing.get_context(kind)
        try:
            self._job = pickle.dumps(work)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ConfigError(f"flow: a stage cannot go to workers: {error}; define its class in a module") from None
        with _one_thread():
            if kind == "forkserver":
                self._context.set_forkserver_preload(["soundstage.data.pool"])
            self._workers = [self._start() for _ in range(workers)]

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def room(self) -> int:
        """How many jobs can be given now."""
        return sum(QUEUED - len(worker.jobs) for worker in self._workers)

    @property
    def busy(self) -> int:
        """How many jobs are with the workers."""
        return sum(len(worker.jobs) for worker in self._workers)

    @property
    def processes(self) -> list[int]:
        """The numbers of the workers' processes."""
        return [worker.process.pid or 0 for worker in self._workers]

    def give(self, job: Job) -> None:
        """Hand a job to the worker that has the fewest."""
        worker = min(self._workers, key=lambda each: len(each.jobs))
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.append(job)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; reap finds out
            worker.pipe.send(job)

    def reap(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """What became of jobs, waiting so long for the first."""
        found: list[tuple[Job, Outcome]] = []
        pipes = {worker.pipe: n for n, worker in enumerate(self._workers)}
        for pipe in wait(list(pipes), self._patience(seconds)):
            found += self._read(pipes[pipe])  # type: ignore[index]
        for n, worker in enumerate(self._workers):
            if self.limit and worker.ready and worker.jobs and time.monotonic() - worker.since > self.limit:
                found += self._bury(n, f"it took longer than {self.limit:g} s and was stopped")
        return found

    def close(self) -> list[tuple[Job, Outcome]]:
        """End the workers, whatever they are doing; what they had done that was not reaped."""
        found: list[tuple[Job, Outcome]] = []
        for worker in self._workers:
            self._kill(worker)
        for worker in self._workers:
            with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
                while worker.pipe.poll():
                    said = worker.pipe.recv()
                    found += [(worker.jobs.popleft(), said)] if isinstance(said, Outcome) else []
            worker.pipe.close()
        self._workers = []
        return found

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        self._seats += 1
        seat = f"worker{self._seats}"
        process = self._context.Process(target=_main, args=(theirs, self._job, seat), name="soundstage-data")
        process.start()
        theirs.close()
        return _Worker(seat, process, ours)

    def _patience(self, seconds: float) -> float:
        """Until the next worker is over its limit, at most."""
        if self.limit is None:
            return seconds
        ends = [worker.since + self.limit - time.monotonic() for worker in self._workers if worker.jobs]
        return max(0.0, min([seconds, *ends]))

    def _read(self, n: int) -> list[tuple[Job, Outcome]]:
        """All that a worker has said; where it died, also what follows from that."""
        worker, found = self._workers[n], []
        try:
            while worker.pipe.poll():
                said = worker.pipe.recv()
                if isinstance(said, Outcome):
                    found.append((worker.jobs.popleft(), said))
                    worker.since = time.monotonic()
                elif said == READY:
                    worker.ready, worker.since, self._stillborn = True, time.monotonic(), 0
                elif is_full(None, self.work.folder):
                    raise DiskFull(self.work.folder)
                else:
                    raise SoundstageError(f"a worker could not start: {said}")
        except (EOFError, OSError, pickle.UnpicklingError):
            found += self._bury(n)
        return found

    def _bury(self, n: int, reason: str | None = None) -> list[tuple[Job, Outcome]]:
        """Replace a worker; its job was lost, those behind are free."""
        worker = self._workers[n]
        self._kill(worker, gently=reason is None)
        worker.pipe.close()
        self._stillborn += not worker.ready
        if self._stillborn > STILLBORN:
            raise SoundstageError(f"workers cannot start: the last ended with {_ending(worker.process.exitcode)}")
        why = reason or f"its worker was killed ({_ending(worker.process.exitcode)})"
        found = last_words(self.work.store, self.work.owner, worker.seat, worker.jobs, why)
        self._workers[n] = self._start()
        return found

    def _kill(self, worker: _Worker, *, gently: bool = False) -> None:
        """End a worker and what it started."""
        if gently:
            worker.process.join(1.0)  # its pipe broke: let it end by its own cause
        number = worker.process.pid
        if number is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(number, signal.SIGKILL)
        worker.process.kill()
        worker.process.join()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


@contextlib.contextmanager
def _one_thread() -> Any:  # noqa: ANN401
    """Processes that start inside have one thread per library."""
    before = dict(os.environ)
    one_thread()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main(pipe: Connection, pickled: bytes, seat: str) -> None:
    """A worker: jobs in, outcomes out, until the run closes the pipe or dies."""
    with contextlib.suppress(OSError):
        os.setsid()  # what a stage starts ends with its worker, and Ctrl-C reaches the run alone
    one_thread()
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs), daemon=True).start()
    try:
        work: Work = replace(pickle.loads(pickled), seat=seat)
        _temporary(work)
    except BaseException as error:
        pipe.send("".join(traceback.format_exception_only(error)).strip())
        sys.exit(1)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then the run is gone, and soon this worker
        pipe.send(READY)
        while True:
            pipe.send(work(jobs.get()))


def _listen(pipe: Connection, jobs: queue.SimpleQueue[Job]) -> None:
    """Take jobs in while the stage works; without the run, end with everything that was started."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.put(pipe.recv())
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _temporary(work: Work) -> None:
    """Temporary files go to the run's scratch folder, on the disk of the dataset, and are removed with it."""
    folder = work.store.scratch(work.owner) / "temporary"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
