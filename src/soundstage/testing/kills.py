"""A run that is killed again and again, whole or one of its workers, at random moments; what must be true after."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from soundstage.data.database import tables
from soundstage.data.flow import Flow
from soundstage.data.ledger import Ledger
from soundstage.data.reach import Count
from soundstage.data.runner import run
from soundstage.data.store import digest_of
from soundstage.testing.stages import Bundle, Gate, Split, Write, counted, numbers

__all__ = ["Report", "compare", "disturb", "flow_of", "undisturbed"]

LOGS = ("write", "split", "gate", "pack")
BATCH = 16
ATTEMPTS = 100
CALLS = 4.2
"""Of stages, for each item that enters `flow_of`."""


@dataclass(frozen=True)
class Report:
    """What a disturbed run cost. wasted: calls of stages whose work was lost; allowed: a call per killed worker, and
    for each killed run its workers' calls and one batch that waited to be committed."""

    kills: dict[str, int]
    tasks: int
    calls: int
    allowed: int
    seconds: float

    @property
    def wasted(self) -> int:
        """Calls beyond one per task."""
        return self.calls - self.tasks


def flow_of(logs: Path, seconds: float = 0.004) -> Flow:
    """Files, pieces of files, a gate, and a packer; every call leaves a byte in a log."""
    told = {name: str(logs / name) for name in LOGS}
    return Flow(
        {
            "write": Write(seconds=seconds, log=told["write"]),
            "split": Split(pieces=3, without=(1,), seconds=seconds, log=told["split"]),
            "gate": Gate(below=10**6, even=True, log=told["gate"]),
            "pack": Bundle(size=5, seconds=2 * seconds, log=told["pack"]),
        }
    )


def undisturbed(where: str | Path, folder: Path, items: int) -> None:
    """One quiet run."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with Ledger.open(where, folder / "set") as ledger:
        ledger.add(numbers(items))
        run(flow_of(logs), ledger, workers=3, batch=BATCH)


def disturb(
    where: str | Path,
    folder: Path,
    items: int,
    kills: int,
    *,
    seed: int = 0,
    workers: int = 3,
    others: Sequence[Callable[[], None]] = (),
    on_kill: Callable[[int], None] = lambda count: None,  # noqa: ARG005
) -> Report:
    """Run with up to `kills` ends by SIGKILL, a quarter of them of the whole run, until all is done.

    They are spread at random over the calls of the stages, so that slow starts do not draw them all.
    others: further disasters that take their turns, such as a server's restart.
    """
    rng, counts, start = random.Random(seed), {"worker": 0, "run": 0, "other": 0}, time.monotonic()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with Ledger.open(where, folder / "set") as ledger:
        ledger.add(numbers(items))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soundstage.testing.kills", "sqlalchemy.dialects.sqlite"])  # for quick restarts
    driver = None
    while True:
        if driver is None:
            driver = context.Process(target=_drive, args=(str(where), folder, workers))
            driver.start()
        total = sum(counts.values())
        if total < kills:
            _work_on(driver, logs, rng.uniform(0, 2 * CALLS * items / kills), rng.uniform(0.0, 0.05))
        else:
            driver.join()
        if driver.exitcode is not None and driver.exitcode != -signal.SIGKILL:
            assert driver.exitcode == 0, f"the run ended with exit code {driver.exitcode}"
            break
        kind = rng.choice(["worker"] * 3 + ["run", *["other"] * len(others)])
        if others and not counts["other"]:
            kind = "other"  # at least one, whatever the dice say
        if kind == "run":
            driver.kill()
            driver.join()
            driver = None
        elif kind == "other":
            rng.choice(others)()
        elif not _kill_worker(driver.pid or 0, rng):
            continue
        counts[kind] += 1
        on_kill(total + 1)
    with Ledger.open(where, folder / "set") as ledger:
        tasks = sum(line.entered for line in ledger.funnel(flow_of(logs).until("gate")))
        tasks += len(ledger.results(flow_of(logs)))
    calls = _calls(logs)
    allowed = counts["worker"] + counts["run"] * (workers + BATCH)
    return Report(counts, tasks, calls, allowed, time.monotonic() - start)


def _calls(logs: Path) -> int:
    return sum(counted(logs / name) for name in LOGS)


def _work_on(driver: BaseProcess, logs: Path, calls: float, seconds: float) -> None:
    """Until so many further calls of stages began, and some seconds more; or the run ends."""
    goal = _calls(logs) + calls
    while _calls(logs) < goal and driver.is_alive():
        time.sleep(0.002)
    driver.join(seconds)


def compare(where: str | Path, folder: Path, calm: Path) -> None:
    """Raises AssertionError where a disturbed dataset differs from a quiet one, or holds what it should not."""
    with Ledger.open(where, folder / "set") as ledger, Ledger.open(calm / "set") as quiet:
        mine, theirs = flow_of(folder / "logs"), flow_of(calm / "logs")
        assert _lines(ledger.funnel(mine)) == _lines(quiet.funnel(theirs)), "the funnels differ"
        for name in LOGS:
            ours, other = ledger.results(mine, name), quiet.results(theirs, name)
            assert [item.id for item in ours] == [item.id for item in other], f"the items of {name} differ"
            for item, twin in zip(ours, other, strict=True):
                for role, path in item.files.items():
                    assert Path(path).read_bytes() == Path(twin.files[role]).read_bytes(), f"{path} differs"
        stored = {str(path.relative_to(ledger.folder)) for path in (ledger.folder / "store").rglob("*.*")}
        t = tables()
        named = set(ledger.database.read(lambda c: c.execute(t.blob.select()).scalars().all()))
        assert stored == named, "files that no item names, or names without a file"
        for name in stored:
            assert digest_of(ledger.folder / name) == Path(name).stem, f"{name} is corrupt"
        assert not ledger.database.read(lambda c: c.execute(t.owner.select()).all()), "a run left its name"
        held = t.task.select().where(t.task.c.state.not_in(["done", "dropped"]))
        assert not ledger.database.read(lambda c: c.execute(held).all()), "a task is not done"
        assert not list((ledger.folder / "work").iterdir()), "scratch files are left"


def _lines(lines: Sequence[Count]) -> list[Count]:
    """Without what a clock told."""
    return [replace(line, seconds=0.0) for line in lines]


def _drive(where: str, folder: Path, workers: int) -> None:
    with Ledger.open(where, folder / "set") as ledger:
        flow = flow_of(folder / "logs")
        run(flow, ledger, workers=workers, batch=BATCH, attempts=ATTEMPTS, backoff=0.01)


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
