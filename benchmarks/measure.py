"""What every benchmark here shares: interleaved timing, the machine as found, tables.

A report names processor, versions and commit, and neither a host nor a path.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
"""Figures of one case, as they are written."""
Run = Callable[[], Any]
"""One call of a case; gives its result (a tensor, an AV of tensors) or nothing."""
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "torchao")


@dataclass(frozen=True)
class Timer:
    """How calls are timed: in rounds, one call of each case after the other.

    On one thread of a CPU the processor's own time is counted, which other programs do not lengthen much; elsewhere the
    time on the wall, once the device is done. keep: all cases are made at once and take turns; otherwise one is made,
    timed and dropped after another, which needs the memory of one.
    """

    device: torch.device
    rounds: int = 5
    keep: bool = True

    @property
    def clock(self) -> str:
        """Whose time is counted: "processor" or "wall"."""
        return "processor" if self.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"

    def seconds(self, run: Run) -> float:
        """Of one call."""
        now = time.process_time if self.clock == "processor" else time.perf_counter
        self.wait()
        start = now()
        run()
        self.wait()
        return now() - start

    def wait(self) -> None:
        """Until the device has done what is queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Timed:
    """One case. first: seconds on the wall of its first call, with what is made or compiled then. times: one per round.

    result: of a call, in host memory. peak: most bytes that the device held in a call, where it counts them.
    """

    first: float
    result: dict[str, Tensor]
    times: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def seconds(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.times)

    def difference(self, base: Timed) -> float | None:
        """Relative L2 distance of the results, the largest of all modalities; None where there is no result."""
        found = [
            float((self.result[name].double() - x.double()).norm() / x.double().norm())
            for name, x in base.result.items()
            if name in self.result
        ]
        return max(found, default=None)


@torch.no_grad()
def compare(cases: Mapping[str, Callable[[], Run]], timer: Timer) -> dict[str, Timed]:
    """Time cases side by side; each is a function that makes what is called."""
    done: dict[str, Timed] = {}
    if not timer.keep:
        for name, make in cases.items():
            run = make()
            done[name] = _first(run, timer)
            done[name].times += [timer.seconds(run) for _ in range(timer.rounds)]
            del run
            if timer.device.type == "cuda":
                done[name].peak = torch.cuda.max_memory_allocated(timer.device)
                torch.cuda.empty_cache()
        return done
    runs = {name: make() for name, make in cases.items()}
    done = {name: _first(run, timer) for name, run in runs.items()}
    order = list(runs)
    for _ in range(timer.rounds):
        for name in order:
            done[name].times.append(timer.seconds(runs[name]))
        order.append(order.pop(0))  # no case is always the one after another
    return done


def _first(run: Run, timer: Timer) -> Timed:
    if timer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(timer.device)
    start = time.perf_counter()
    result = run()
    timer.wait()
    first = time.perf_counter() - start
    items = {"": result} if isinstance(result, Tensor) else dict(result.items() if result is not None else ())
    kept = {name: x.detach().float().cpu() for name, x in items.items()}
    return Timed(first, kept)


# Figures


def rows(
    found: Mapping[str, Timed], dtype: torch.dtype, prefix: str = "", rate: float | None = None, work: int | None = None
) -> Iterator[Row]:
    """A row per case, held against the first.

    work: floating-point operations of a call. rate: TFLOP/s of a matrix product, of which `share` is reached.
    """
    base = next(iter(found.values()))
    for name, each in found.items():
        row: Row = {"case": prefix + name, "dtype": str(dtype).removeprefix("torch."), "seconds": each.seconds}
        if each is not base:
            row |= {**spread(each.times, base.times), "difference": each.difference(base)}
        if each.peak is not None:
            row["peak_bytes"] = each.peak
        if work is not None:
            row["tflops"] = 1e-12 * work / each.seconds
            if rate is not None:
                row["share"] = row["tflops"] / rate
        yield row


def spread(times: Sequence[float], base: Sequence[float]) -> Row:
    """The ratio of the times to those of `base` in the same round: median, least and most over the rounds."""
    ratios = [mine / theirs for mine, theirs in zip(times, base, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}


# The machine


def machine(device: torch.device) -> Row:
    """Processor, cores, memory, device and versions, as found."""
    packages = {name: version(name) for name in PACKAGES if find_spec(name) is not None}
    found: Row = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": packages,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["device"] = {
            "name": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def commit() -> Row:
    """The commit that was measured, and whether the work tree had changed since; nulls without git."""
    try:
        told = [_git("rev-parse", "HEAD").strip(), bool(_git("status", "--porcelain").strip())]
    except (OSError, subprocess.CalledProcessError):
        told = [None, None]
    return {"commit": told[0], "changed_since": told[1]}


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


# Tables


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> str:
    """Rows as a Markdown table; columns: heading to what a row has there. A column empty in every row is left out."""
    cells = {heading: [show(row) for row in rows] for heading, show in columns.items()}
    kept = {heading: found for heading, found in cells.items() if any(found)}
    lines = ["| " + " | ".join(kept) + " |", "|" + "---|" * len(kept)]
    lines += ["| " + " | ".join(found or "-" for found in row) + " |" for row in zip(*kept.values(), strict=True)]
    return "\n".join(lines)
