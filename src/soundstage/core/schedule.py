"""Inference grids: `times`, an AV of descending levels (steps + 1,) in float64, 1 = noise, 0 = data.

Each modality has its own grid with the same number of steps. A constant stretch leaves a modality as it is, so
"audio is given" is `held(times, "audio", 0.0)`, and an edit starts below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError

Level = TypeVar("Level", float, Tensor)
Levels = TypeVar("Levels", bound=Sequence[float])


def shift(t: Level, by: float) -> Level:
    """Move levels towards noise: t -> by t / (1 + (by - 1) t) (arXiv:2403.03206, eq. 23); `by` = 1 is the identity."""
    return by * t / (1 + (by - 1) * t)


def linear(steps: int, start: AV[float] = AV(1.0, 1.0)) -> AV[Tensor]:  # noqa: B008 (AV is frozen)
    """Equal steps from `start` down to 0, one grid per modality in `start`."""
    return shifted(steps, start.map(lambda _: 1.0), start)


def shifted(steps: int, by: AV[float], start: AV[float] | None = None) -> AV[Tensor]:
    """Equal steps, shifted by a factor per modality, from `start` (a level after the shift; default 1) down to 0.

    Wan's UniPC grid is `shifted(n, AV(5.0), AV(shift(0.999, 5.0)))`. Raises ConfigError for steps < 1, a factor
    not above 0, or a start outside (0, 1].
    """
    if steps < 1:
        raise ConfigError(f"steps: {steps} is too few, use at least 1")
    start = by.map(lambda _: 1.0) if start is None else start

    def grid(factor: float, first: float) -> Tensor:
        if not factor > 0:
            raise ConfigError(f"shift: {factor} must be above 0; 1 means no shift")
        if not 0 < first <= 1:
            raise ConfigError(f"start: {first} is not in (0, 1]; to hold a modality at a level use held()")
        levels = shift(torch.linspace(shift(float(first), 1 / factor), 0.0, steps + 1, dtype=torch.float64), factor)
        levels[0] = first
        return levels

    return by.map(grid, start)


def explicit(times: AV[Levels]) -> AV[Tensor]:
    """Levels as listed, one list per modality; the last is usually 0.

    Raises ConfigError when a list ascends, leaves [0, 1], or differs in length from the other.
    """
    grids = times.map(lambda levels: torch.tensor(list(levels), dtype=torch.float64))
    check(grids)
    return grids


def held(times: AV[Tensor], modality: str, level: float = 0.0) -> AV[Tensor]:
    """The same grids with one modality (present or added) held at a level: 0 = given clean, small = lightly noised."""
    like = next(iter(times.values()))
    grids = times.replace(**{modality: torch.full_like(like, level)})
    check(grids)
    return grids


def check(times: AV[Tensor]) -> int:
    """Number of steps of the grids; raises ConfigError unless they descend within [0, 1] and agree in length."""
    lengths = {name: grid.numel() for name, grid in times.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
        raise ConfigError(f"times: lengths {lengths} must agree and be at least 2 (steps + 1)")
    for name, grid in times.items():
        levels = grid.tolist()
        if grid.ndim != 1 or not all(1 >= a >= b >= 0 for a, b in pairwise(levels)):
            raise ConfigError(f"times.{name}: {levels} must descend from at most 1 to at least 0")
    return min(lengths.values()) - 1
