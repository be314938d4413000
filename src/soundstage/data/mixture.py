"""What a run is made of: shares of categories and of lengths, kept exactly whatever the data holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from soundstage.core.errors import Caution, ConfigError

__all__ = ["CATEGORIES", "DURATIONS", "Mixture", "Phase"]

CATEGORIES: Mapping[str, float] = MappingProxyType(
    {"music": 30.0, "speech": 20.0, "nature": 15.0, "action": 15.0, "daily": 10.0, "other": 10.0}
)
"""Per cent of what is shown, for general joint training."""
DURATIONS: Mapping[str, float] = MappingProxyType({"3-10": 40.0, "10-30": 40.0, "30-60": 15.0, "60+": 5.0})
"""Per cent of clips by their length in seconds, from (with) to (without)."""
OTHER = "other"
ROUNDS = 200


@dataclass(frozen=True)
class Mixture:
    """Shares of clips by category and by length in seconds ("3-10", "60+"); any positive numbers, not only per cent.

    categories: a clip whose category is not named belongs to "other" where that is. Clips of no category or length
    named here are not shown, and a warning counts them. Where the data lacks a combination, the others make up for it
    so that both tables are kept as nearly as they can be, with a warning where they cannot.
    """

    categories: Mapping[str, float] = field(default_factory=lambda: dict(CATEGORIES))
    durations: Mapping[str, float] = field(default_factory=lambda: dict(DURATIONS))

    def __post_init__(self) -> None:
        for name in ("categories", "durations"):
            shares = getattr(self, name)
            if not shares or min(shares.values()) < 0 or not sum(shares.values()) > 0:
                raise ConfigError(f"{name}: {dict(shares)} are no shares; give numbers of which one is above 0")
        self._spans()

    def cells(self, categories: Sequence[str], seconds: np.ndarray) -> np.ndarray:
        """(N,) int64 number of each clip's combination, category x lengths + length; -1 where it has none."""
        names = {name: index for index, name in enumerate(self.categories)}
        which = np.array([names.get(name, names.get(OTHER, -1)) for name in categories], np.int64)
        length = np.full(len(which), -1, np.int64)
        for index, (low, high) in enumerate(self._spans()):
            length[(seconds >= low) & (seconds < high)] = index
        return np.where((which < 0) | (length < 0), -1, which * len(self.durations) + length)

    def shares(self, counts: np.ndarray) -> np.ndarray:
        """(cells,) part of all draws for each combination, of which the data has so many clips; they sum to 1.

        Both tables fitted in turns (iterative proportional fitting), starting from their product. Raises ConfigError
        where no clip belongs to any share.
        """
        rows, columns = (_normal(shares) for shares in (self.categories, self.durations))
        there = counts.reshape(len(rows), len(columns)) > 0
        weights = np.where(there, rows[:, None] * columns, 0.0)
        if not weights.sum() > 0:
            raise ConfigError(
                f"mixture: no clip is of {', '.join(self.categories)} and of {', '.join(self.durations)} seconds; "
                "change the shares, or add such clips"
            )
        for _ in range(ROUNDS):
            for axis, wanted in ((1, rows), (0, columns)):
                found = weights.sum(axis=axis)
                wanted = np.where(found > 0, wanted, 0)
                factor = np.divide(wanted / wanted.sum(), found, out=np.zeros_like(found), where=found > 0)
                weights *= np.expand_dims(factor, axis)
        self._tell(weights, rows, columns)
        return (weights / weights.sum()).reshape(-1)

    @property
    def names(self) -> list[str]:
        """Of the combinations, "music 3-10 s" ..., in the order of their numbers."""
        return [f"{category} {length} s" for category in self.categories for length in self.durations]

    def _spans(self) -> list[tuple[float, float]]:
        found = []
        for text in self.durations:
            low, dash, high = text.removesuffix("+").partition("-")
            try:
                span = float(low), float(high) if dash else math.inf
            except ValueError:
                raise ConfigError(f"durations: {text!r} is not a span of seconds such as 3-10 or 60+") from None
            if not (dash or text.endswith("+")) or span[0] >= span[1]:
                raise ConfigError(f"durations: {text!r} is not a span of seconds such as 3-10 or 60+")
            found.append(span)
        return found

    def _tell(self, weights: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        """Warn of shares that the data cannot meet."""
        total = weights.sum()
        wrong = []
        for names, wanted, axis in ((self.categories, rows, 1), (self.durations, columns, 0)):
            for name, want, have in zip(names, wanted, weights.sum(axis=axis) / total, strict=True):
                if abs(want - have) > 0.005:
                    wrong.append(f"{name} {have:.1%} instead of {want:.1%}")
        if wrong:
            warnings.warn(
                f"mixture: the data cannot meet the shares: {', '.join(wrong)}; add clips of these, or ask for what "
                "there is",
                Caution,
                stacklevel=4,
            )


@dataclass(frozen=True)
class Phase:
    """Of a curriculum: from step `start` on, this mixture. Steps count as if all had the batch size that now holds."""

    start: int
    mixture: Mixture


def _normal(shares: Mapping[str, float]) -> np.ndarray:
    values = np.array(list(shares.values()), np.float64)
    return values / values.sum()
