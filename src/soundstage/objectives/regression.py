"""Regression to the teacher's ODE: from any point of a trajectory straight to its end (arXiv:2311.18828, eq. 9).

An anchor of distribution matching, and by itself the start of students unlike their teacher (arXiv:2412.07772,
section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError, one_of
from soundstage.core.flow import to_x0
from soundstage.core.rng import Rng
from soundstage.core.sampling import SAMPLERS
from soundstage.objectives.base import Batch, Nets
from soundstage.objectives.rollout import Given, warped

__all__ = ["Pair", "Pairs", "Regression", "Solved"]


@dataclass(frozen=True, eq=False)
class Pair:
    """x_t at t, per modality (B,), and the end x0 of the trajectory it lies on."""

    x_t: AV[Tensor]
    t: AV[Tensor]
    x0: AV[Tensor]


class Pairs(Protocol):
    """One pair per sample of the batch: solved here, or read with the batch from disk."""

    def __call__(self, nets: Nets, batch: Batch, given: Given, rng: Rng) -> Pair: ...


@dataclass(frozen=True)
class Solved:
    """Trajectories of the guided teacher, solved on the spot; each sample starts from one of `times`, drawn.

    times: the student's levels. substeps: solver steps from each to the next. sampler: a name in core.SAMPLERS that
    draws no fresh noise. guidance: (teacher, conditions) -> Denoiser, None = the teacher as it is.
    """

    times: AV[tuple[float, ...]] = field(default_factory=warped)
    substeps: int = 8
    sampler: str = "heun"
    guidance: Callable[[Denoiser, Conditions], Denoiser] | None = None

    def __post_init__(self) -> None:
        solvers = SAMPLERS.keys() - {"renoise"}
        if self.sampler not in solvers:
            raise one_of("Solved.sampler", self.sampler, solvers)
        if self.substeps < 1:
            raise ConfigError(f"Solved.substeps: {self.substeps} is too few, use at least 1")

    @torch.no_grad()
    def __call__(self, nets: Nets, batch: Batch, given: Given, rng: Rng) -> Pair:  # noqa: ARG002
        teacher = nets["teacher"] if self.guidance is None else self.guidance(nets["teacher"], given.cond)
        known = given.around(teacher)
        noise = rng.fold("start").normal_like(given.x0)
        grid = self.times.only(*noise.modalities).map(self._grid)
        path = [noise]
        x0 = SAMPLERS[self.sampler](known, noise, grid, given.cond, on_step=lambda _i, x, _x0: path.append(x))
        at = rng.fold("level").integers(0, len(next(self.times.values()))) * self.substeps
        rows = torch.arange(len(at))
        x_t = AV(**{name: torch.stack([x[name] for x in path])[at, rows] for name in noise.modalities})
        return Pair(x_t, x_t.map(lambda x, levels: levels.to(x)[at.to(x.device)], grid), known.keep(x0))

    def _grid(self, levels: tuple[float, ...]) -> Tensor:
        """(steps substeps + 1,) the levels and 0, with equal steps between neighbours."""
        spans = [torch.linspace(a, b, self.substeps + 1, dtype=torch.float64) for a, b in pairwise((*levels, 0.0))]
        return torch.cat([spans[0], *(span[1:] for span in spans[1:])])


@dataclass(frozen=True)
class Regression:
    """Mean squared error of the student's clean prediction, terms "regression/video" and "regression/audio".

    tasks: as in FlowMatching.
    """

    pairs: Pairs = field(default_factory=Solved)
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """Only the student moves."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms of one batch; pure given rng."""
        given = Given.of(batch, self.tasks, rng.fold("tasks"))
        pair = self.pairs(nets, batch, given, rng.fold("pairs"))
        made = to_x0(pair.x_t, given.around(nets[role])(pair.x_t, pair.t, given.cond), pair.t)
        return given.terms("regression", (made - pair.x0).map(torch.square))
