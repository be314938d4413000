"""Progressive distillation: a student whose one step is several of its teacher's, halved again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.objectives.base import Batch, Nets
from soundstage.objectives.flow_map import Grid, Guide, Scene, Step, euler_step, play, squared


@dataclass(frozen=True)
class Progressive:
    """Progressive distillation (arXiv:2202.00512, algorithm 2) in velocity, terms "progressive/video".

    The student's velocity is regressed to (x_t - x_r) / (t - r), with x_r where `substeps` steps of the guided teacher
    lead: one Euler step of the student then equals them. grid: the student's inference grid; the teacher walks the
    grid of `substeps` times as many steps. 50 -> 16 -> 8 -> 4 is (16, 3), (8, 2), (4, 2), each from the student before.
    """

    grid: Grid = field(default_factory=lambda: Grid(8))
    substeps: int = 2
    step: Step = euler_step
    guidance: Guide | None = None
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})
    bins: int = 4

    def __post_init__(self) -> None:
        if self.substeps < 1:
            raise ConfigError(f"Progressive.substeps: {self.substeps} is too few, use at least 1 (2 halves the steps)")

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """Only the student moves."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms and reports by noise level; pure given rng."""
        scene = Scene.of(batch, self.tasks, rng)
        k = rng.fold("times", "step").integers(1, self.grid.steps + 1).double()
        levels = [scene.levels(level) for level in self._levels(k, scene.given.x0)]
        x_t = scene.at(levels[0])
        aim = self.target(scene.teacher(nets, self.guidance), x_t, levels, scene.cond)
        made = scene.around(play(nets, role))(x_t, levels[0], scene.cond)
        return scene.terms("progressive", scene.given.means(squared(made - aim)), levels[0], self.bins)

    def _levels(self, k: Tensor, x: AV[Tensor]) -> list[AV[Tensor]]:
        """The teacher's levels from step k of the student's grid down to step k - 1."""
        return [self.grid.level((k - j / self.substeps) / self.grid.steps, x) for j in range(self.substeps + 1)]

    @torch.no_grad()
    def target(self, teacher: Denoiser, x_t: AV[Tensor], levels: Sequence[AV[Tensor]], cond: Conditions) -> AV[Tensor]:
        """The one velocity that takes x_t from the first level to the last as the teacher's steps do."""
        x = x_t
        for t, r in pairwise(levels):
            x = self.step(teacher, x, t, r, cond)
        return (x_t - x).map(lambda way, span: way / spread(span, way).clamp_min(1e-6), levels[0] - levels[-1])


@dataclass(frozen=True)
class Gate:
    """Whether a stage may end: its metric within the bound, or else the stage is extended, at most `extensions` times.

    metric: a name in what validation returns. at_least, at_most: one of them or both.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    extensions: int = 1

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ConfigError(f"Gate: {self.metric} needs at_least or at_most")

    def __call__(self, values: Mapping[str, float], extended: int = 0) -> Literal["pass", "extend", "stop"]:
        """The verdict after a stage that was extended so often; a number that is not finite never passes.

        Raises ConfigError when the metric is not among the values.
        """
        if self.metric not in values:
            raise ConfigError(f"Gate.metric: {self.metric!r} was not measured; there are {', '.join(sorted(values))}")
        value = values[self.metric]
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        # both comparisons are false for nan
        if low <= value <= high and abs(value) != float("inf"):
            return "pass"
        return "extend" if extended < self.extensions else "stop"
