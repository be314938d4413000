"""A run that is killed again and again, whole or one of its workers, at random moments; what must be true after."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import ClassVar

from soundstage.data.database import tables
from soundstage.data.flow import Drop, Flow, Gather, Item, Stage
from soundstage.data.ledger import Ledger
from soundstage.data.pool import QUEUED
from soundstage.data.reach import Count
from soundstage.data.runner import run
from soundstage.data.store import DiskFull, digest_of
from soundstage.testing.stages import Bundle, Gate, Split, Write, numbers

__all__ = ["Case", "Report", "Round", "Trouble", "compare", "disturb", "drive", "repeated", "toy", "undisturbed"]

BATCH = 16
ATTEMPTS = 100
AT_WORK = 0.8
"""Of the kills so many come at a random call of a stage, the others before the next call, as while a run starts."""
CALL = 64
"""Bytes of a line in a log."""


@dataclass(frozen=True)
class Watched:
    """A stage whose calls leave a line in a log."""

    stage: Stage
    log: str = field(compare=False)
    version: ClassVar[int] = 1

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        """As the stage."""
        _note(self.log, item, folder)
        return self.stage(item, folder)


@dataclass(frozen=True)
class WatchedGather:
    """A gather whose calls leave a line in a log."""

    stage: Gather
    log: str = field(compare=False)
    version: ClassVar[int] = 1

    def groups(self, items: Sequence[Item]) -> Iterable[Sequence[Item]]:
        """As the gather."""
        return self.stage.groups(items)

    def gather(self, group: Sequence[Item], folder: Path) -> Iterable[Item | Drop]:
        """As the gather."""
        _note(self.log, group[0], folder)
        return self.stage.gather(group, folder)


def _note(log: str, item: Item, folder: Path) -> None:
    """One line for a call that begins: on what, and in which run."""
    process = folder.parent.name.split("-")[-2]
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{item.id} {process}".encode().ljust(CALL - 1) + b"\n")
    os.close(handle)


@dataclass(frozen=True)
class Case:
    """What is run: stages, the last of them a gather, and what enters. broken: items ("n") that are to be poison."""

    stages: Mapping[str, Stage | Gather]
    items: Sequence[Item]
    broken: frozenset[int] = frozenset()

    def flow(self, folder: Path) -> Flow:
        """With a log of every stage's calls in `folder`/logs."""
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return Flow(
            {
                name: WatchedGather(stage, str(logs / name))
                if isinstance(stage, Gather)
                else Watched(stage, str(logs / name))
                for name, stage in self.stages.items()
            }
        )


def toy(items: int, seconds: float = 0.004) -> Case:
    """Files, pieces of files, a gate, and a packer of text."""
    stages = {
        "write": Write(seconds=seconds),
        "split": Split(pieces=3, without=(1,), seconds=seconds),
        "gate": Gate(below=10**6, even=True),
        "pack": Bundle(size=5, seconds=2 * seconds),
    }
    return Case(stages, list(numbers(items)))


@dataclass
class Round:
    """One run, from its start to its end: what befell it, and how many of its calls had to be made again.

    workers: of them killed; ended: the run itself was; others: further troubles.
    """

    workers: int = 0
    ended: bool = False
    others: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Report:
    """What a disturbed run cost. tasks: calls that were needed; calls: that were made; batch: calls that one end of a
    run may waste: what waits to be committed, and what its workers have."""

    kills: dict[str, int]
    tasks: int
    calls: int
    rounds: tuple[Round, ...]
    batch: int
    seconds: float

    @property
    def repeated(self) -> int:
        """Calls of stages that were made again."""
        return sum(each.repeated for each in self.rounds)

    @property
    def allowed(self) -> int:
        """How many there may be at most: one for each worker that was killed, a batch for every other trouble."""
        return sum(self.bound(each) for each in self.rounds)

    @property
    def most(self) -> int:
        """The most calls that one run's end and troubles cost, its killed workers not counted."""
        return max((each.repeated - each.workers for each in self.rounds), default=0)

    def bound(self, each: Round) -> int:
        """How many calls of one run may be made again."""
        return each.workers + self.batch * (each.ended + each.others)


@dataclass(frozen=True)
class Trouble:
    """What happens to a run beside kills. undo: after it has ended the run, such as a full disk does."""

    begin: Callable[[], None]
    undo: Callable[[], None] = lambda: None


def undisturbed(case: Case, where: str | Path, folder: Path, workers: int = 3) -> int:
    """One quiet run; how many calls of stages it made."""
    with Ledger.open(where, folder / "set") as ledger:
        ledger.add(case.items)
        run(case.flow(folder), ledger, workers=workers, batch=BATCH)
    return _calls(folder)


def disturb(
    case: Case,
    where: str | Path,
    folder: Path,
    calls: int,
    kills: int,
    *,
    seed: int = 0,
    workers: int = 3,
    others: Mapping[str, Trouble] | None = None,
    logs: Path | None = None,
    on_kill: Callable[[int], None] = lambda count: None,  # noqa: ARG005
) -> Report:
    """Run with up to `kills` ends by SIGKILL, of workers and of the whole run, and other troubles, until all is done.

    calls: that a quiet run makes; the kills are spread over what is left of them. logs: a folder for what is counted,
    `folder` itself unless told. Raises AssertionError where a run ends by itself in any way but well or by a full disk.
    """
    rng, start, others = random.Random(seed), time.monotonic(), dict(others or {})
    counts, logs = {"worker": 0, "run": 0, **dict.fromkeys(others, 0)}, logs or folder
    flow, rounds = case.flow(logs), dict[int, Round]()
    with Ledger.open(where, folder / "set") as ledger:
        ledger.add(case.items)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soundstage.testing.kills", "sqlalchemy.dialects.sqlite"])  # for quick restarts
    undo: list[Callable[[], None]] = []
    driver = None
    while True:
        if driver is None:
            driver = context.Process(target=drive, args=(str(where), folder, flow, workers))
            driver.start()
            rounds[driver.pid or 0] = Round()
        this, total = rounds[driver.pid or 0], sum(counts.values())
        if total >= kills:
            driver.join()
        elif rng.random() < AT_WORK:
            left = max(0, calls - _calls(logs)) / (kills - total)
            _work_on(driver, logs, rng.uniform(0, 1.5 * left), rng.uniform(0.0, 0.05))
        else:
            _work_on(driver, logs, 1, 0.0, rng.uniform(0.0, 1.0))
        if driver.exitcode == errno.ENOSPC and undo:
            driver = None
        elif driver.exitcode is not None and driver.exitcode != -signal.SIGKILL:
            assert driver.exitcode == 0, f"the run ended with exit code {driver.exitcode}"
            break
        else:
            kind = rng.choice(["worker"] * 3 + ["run", *others])
            kind = next((name for name in others if not counts[name]), kind)  # each at least once
            if kind == "run":
                driver.kill()
                driver.join()
                driver, this.ended = None, True
            elif kind == "worker":
                if not _kill_worker(driver.pid or 0, rng):
                    continue
                this.workers += 1
            else:
                others[kind].begin()
                undo.append(others[kind].undo)
                this.others += 1
            counts[kind] += 1
            on_kill(total + 1)
        while driver is None and undo:
            undo.pop()()
    for each in undo:
        each()
    for process, count in repeated(logs).items():
        rounds[process].repeated = count
    made, batch = _calls(logs), BATCH - 1 + QUEUED * workers
    report = Report(counts, 0, made, tuple(rounds.values()), batch, time.monotonic() - start)
    return replace(report, tasks=made - report.repeated)


def repeated(folder: Path) -> Counter[int]:
    """Of each run, by its process: how many of its calls were made again later, by what is in `folder`/logs."""
    found = Counter[int]()
    for log in (folder / "logs").iterdir():
        last: dict[str, int] = {}
        for line in log.read_text(encoding="ascii").splitlines():
            item, process = line.split()
            if item in last:
                found[last[item]] += 1
            last[item] = int(process)
    return found


def _calls(folder: Path) -> int:
    return sum(log.stat().st_size for log in (folder / "logs").iterdir()) // CALL


def _work_on(driver: BaseProcess, logs: Path, calls: float, more: float, at_most: float = float("inf")) -> None:
    """Until so many further calls of stages began, and some seconds more; or the run ends, or `at_most` seconds."""
    goal, end = _calls(logs) + calls, time.monotonic() + at_most
    while _calls(logs) < goal and driver.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    driver.join(more)


def compare(case: Case, where: str | Path, folder: Path, calm: Path) -> int:
    """How many files of shards are the same in a disturbed dataset as in a quiet one.

    Raises AssertionError where they differ, or where the disturbed one holds what it should not.
    """
    flow, same = case.flow(folder), 0
    with Ledger.open(where, folder / "set") as ledger, Ledger.open(calm / "set") as quiet:
        assert _lines(ledger.funnel(flow)) == _lines(quiet.funnel(flow)), "the funnels differ"
        for name in case.stages:
            ours, other = ledger.results(flow, name), quiet.results(flow, name)
            assert [item.id for item in ours] == [item.id for item in other], f"the items of {name} differ"
            for item, twin in zip(ours, other, strict=True):
                for role, path in item.files.items():
                    assert Path(path).read_bytes() == Path(twin.files[role]).read_bytes(), f"{path} differs"
                    same += name == list(case.stages)[-1]
        poisoned = [each.items[0].facts["n"] for each in ledger.quarantine(flow)]
        assert sorted(poisoned) == sorted(case.broken), "the quarantine is not what was broken"
        stored = {str(path.relative_to(ledger.folder)) for path in (ledger.folder / "store").rglob("*.*")}
        t = tables()
        named = set(ledger.database.read(lambda c: c.execute(t.blob.select()).scalars().all()))
        assert stored == named, "files that no item names, or names without a file"
        for name in stored:
            assert digest_of(ledger.folder / name) == Path(name).stem, f"{name} is corrupt"
        assert not ledger.database.read(lambda c: c.execute(t.owner.select()).all()), "a run left its name"
        held = t.task.select().where(t.task.c.state.not_in(["done", "dropped", "poisoned"]))
        assert not ledger.database.read(lambda c: c.execute(held).all()), "a task is not done"
        assert not list((ledger.folder / "work").iterdir()), "scratch files are left"
    return same


def _lines(lines: Sequence[Count]) -> list[Count]:
    """Without what a clock told."""
    return [replace(line, seconds=0.0) for line in lines]


def drive(where: str, folder: Path, flow: Flow, workers: int) -> None:
    """The run that is killed; a full disk ends its process with the number of that error."""
    try:
        with Ledger.open(where, folder / "set") as ledger:
            run(flow, ledger, workers=workers, batch=BATCH, attempts=ATTEMPTS, backoff=0.01)
    except DiskFull:
        sys.exit(errno.ENOSPC)


def _kill_worker(driver: int, rng: random.Random) -> bool:
    """Kill one worker of a run; False where none is alive now. Workers lead sessions, and a server is their parent."""
    told: dict[int, tuple[str, int, int, int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                told[int(path.name)] = _stat(int(path.name))
    servers = {number for number, (_, parent, _, _) in told.items() if parent == driver}
    found = [
        n for n, (state, parent, _, session) in told.items() if parent in servers and session == n and state != "Z"
    ]
    if found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(found), signal.SIGKILL)
    return bool(found)


def _stat(process: int) -> tuple[str, int, int, int]:
    """(state, parent, group, session) of a process."""
    told = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return told[0], int(told[1]), int(told[2]), int(told[3])
