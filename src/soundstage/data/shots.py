"""Stage "shots": a file becomes its uninterrupted takes, by the times in its traces and without decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import ClassVar

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item
from soundstage.data.scan import measure
from soundstage.data.traces import Traces

__all__ = ["Shots"]


@dataclass(frozen=True)
class Shots:
    """Children with the facts "span" (seconds of the file) and "parent" (its digest), measured again over the span.

    They keep the native file and its traces. threshold: of media.shots. shortest, longest: seconds; a shorter take is
    dropped, a longer one is cut into equal parts. trim: seconds left out at either side of a boundary.
    """

    threshold: float = 0.25
    shortest: float = 3.0
    longest: float = 60.0
    trim: float = 0.1
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= self.longest or self.trim < 0:
            told = f"shortest {self.shortest}, longest {self.longest}, trim {self.trim}"
            raise ConfigError(f"Shots: {told}; give 0 < shortest <= longest and trim >= 0, in seconds")

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        traces = Traces.load(item.files["traces"])
        for start, end in self.spans(traces):
            span = [round(start, 6), round(end, 6)]
            child = item.child(span=span, parent=item.digests.get("media"))
            if end - start < self.shortest - 1e-6:
                yield Drop(child, "short take", round(end - start, 3))
            else:
                yield child.child(**measure(traces, span))

    def spans(self, traces: Traces) -> Iterator[tuple[float, float]]:
        """(start, end) in seconds of every take, too short ones as well."""
        found = traces.shots(threshold=self.threshold)
        for index, shot in enumerate(found):
            start = shot.start + (self.trim if index else 0.0)
            end = max(shot.end - (self.trim if index < len(found) - 1 else 0.0), start)
            parts = max(1, ceil((end - start) / self.longest - 1e-9))
            step = (end - start) / parts
            yield from ((start + n * step, start + (n + 1) * step) for n in range(parts))
