"""What a metric is, and how its figures of many clips become one score with an interval and a floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from soundstage.media.clip import Clip

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """One number that a metric reads from a clip, and how it is summed up over clips.

    key: its name in the metric's mapping. unit: "" for a share from 0 to 1. better: the direction of good.
    """

    key: str
    label: str
    unit: str = ""
    statistic: Literal["mean", "median"] = "mean"
    better: Literal["higher", "lower", "zero"] = "higher"


class Metric(Protocol):
    """Figures of one clip against what was asked for. A figure that cannot be measured is absent, never guessed."""

    figures: tuple[Figure, ...]

    def __call__(self, clip: Clip, wanted: str | Mapping[str, object]) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Score:
    """A figure over `num` clips: value with its bootstrap interval [low, high] at 95 %.

    floor: what real clips reach under the same metric, as good as the measurement allows; None where not measured.
    """

    figure: Figure
    value: float
    low: float
    high: float
    num: int
    floor: float | None = None


def summarise(figure: Figure, values: Sequence[float], floor: float | None = None, seed: int = 0) -> Score | None:
    """The score of one figure over clips; None without values."""
    if not len(values):
        return None
    statistic = {"mean": np.mean, "median": np.median}[figure.statistic]
    low, high = bootstrap(np.asarray(values, float), figure.statistic, seed)
    return Score(figure, float(statistic(values)), low, high, len(values), floor)


def bootstrap(values: np.ndarray, statistic: str = "mean", seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean or median of (N,) values under resampling of clips (Efron 1979), 1000 draws."""
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))]
    totals = drawn.mean(axis=1) if statistic == "mean" else np.median(drawn, axis=1)
    low, high = np.quantile(totals, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
