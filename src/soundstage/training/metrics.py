"""What a run writes while it runs: metrics.jsonl always, TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Meter:
    """Means of what was added since the last `take`, and the speed."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._samples = 0
        self._seconds = 0.0
        self._since = time.perf_counter()

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add `count` values of sum `total`."""
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def resume(self) -> None:
        """Start the clock (again): time until the next `step` counts as training."""
        self._since = time.perf_counter()

    def step(self, samples: int) -> None:
        """Count the samples of one step and the time it took."""
        now = time.perf_counter()
        self._samples, self._seconds, self._since = self._samples + samples, self._seconds + now - self._since, now

    def take(self) -> dict[str, float]:
        """The means by name, and samples_per_second; starts anew. Names without a value are left out."""
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count > 0}
        if self._seconds > 0:
            means["samples_per_second"] = self._samples / self._seconds
        self.__init__()  # type: ignore[misc]
        return means


class Log:
    """Appends entries to metrics.jsonl and TensorBoard; on resume, entries after `step` are dropped.

    entries: all of the run so far, as they are in the file.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if _step(line) <= step] if step else []
        path.write_text("".join(line + "\n" for line in kept))
        self.entries: list[dict[str, float | None]] = [json.loads(line) for line in kept]
        self._file = path.open("a")
        self._writer: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """One line: {"step": step, name: value, ...}; returned as a dict."""
        entry = {"step": step, **{name: float(value) for name, value in values.items()}}
        # JSON has no NaN or infinity
        shown = {name: value if math.isfinite(value) else None for name, value in entry.items()}
        self.entries.append(shown)
        self._file.write(json.dumps(shown) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        return entry

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read(folder: str | Path) -> list[dict[str, float]]:
    """The entries a run has written so far."""
    return [json.loads(line) for line in _lines(Path(folder) / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    """Whole lines; a line cut short by a crash is dropped."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def _step(line: str) -> int:
    return int(json.loads(line)["step"])
