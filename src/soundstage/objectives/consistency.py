"""Consistency: every point of a trajectory of the flow leads to the same clean sample, f(x_t, t) = x_t - t F(x_t, t).

F is the student's velocity, so f(x, 0) = x needs no parametrisation, and `renoise` samples the student. Discrete pairs
of points (`Consistency`: distillation, and without a teacher ECT), or their limit (`ContinuousConsistency`: sCM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError, one_of
from soundstage.core.flow import to_x0
from soundstage.core.rng import Rng
from soundstage.core.times import Joint, LogitNormal
from soundstage.objectives.base import Batch, Nets
from soundstage.objectives.flow_map import (
    Derivative,
    Grid,
    Guide,
    Narrowing,
    Pairs,
    Scene,
    Step,
    along,
    heun_step,
    play,
    squared,
)

Weight = Callable[[Tensor, Tensor], Tensor]
"""(t, r) -> factor of a pair's loss, all (B,)."""


def even(t: Tensor, r: Tensor) -> Tensor:  # noqa: ARG001
    """1: errors of x0 count alike at every level."""
    return torch.ones_like(t)


def as_velocity(t: Tensor, r: Tensor) -> Tensor:  # noqa: ARG001
    """1 / (t^2 + 0.05): errors count as those of a velocity, x0 / t, bounded near the data."""
    return 1 / (t.square() + 0.05)


def inverse_gap(t: Tensor, r: Tensor) -> Tensor:
    """1 / (t - r) (arXiv:2310.14189, section 3.3): the loss keeps its size as the pairs come closer."""
    return 1 / (t - r).clamp_min(1e-4)


@dataclass(frozen=True)
class Consistency:
    """Discrete consistency (arXiv:2303.01469, eq. 7): w(t, r) d(f(x_t, t), stop-gradient f(x_r, r)); terms "cd/video".

    pairs: law of (t, r). teacher: x_r is a `step` of the guided teacher from x_t; otherwise it is the same noise at
    level r, and nothing but data is needed (consistency training, terms "ct/video"; `ect` has its settings).
    target: who plays f at r, the "student" itself or its average "ema". huber: c of the pseudo-Huber distance
    sqrt(mean e^2 + c^2) - c (arXiv:2310.14189, section 3.3; their 0.00054 sqrt(D) of the sum), 0 = squared.
    guidance: of the teacher, (teacher, conditions) -> Denoiser such as dmd.Guidance; the student then needs no more.
    """

    pairs: Pairs = field(default_factory=lambda: Grid(32))
    teacher: bool = True
    step: Step = heun_step
    target: Literal["student", "ema"] = "student"
    weight: Weight = as_velocity
    huber: float = 0.0
    guidance: Guide | None = None
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})
    bins: int = 4

    def __post_init__(self) -> None:
        if self.target not in ("student", "ema"):
            raise one_of("Consistency.target", self.target, ("student", "ema"))
        _guidable(self)

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """Only the student moves."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms and reports by noise level; pure given rng."""
        scene = Scene.of(batch, self.tasks, rng)
        t, r = scene.pair(self.pairs, rng)
        x_t = scene.at(t)
        aim = self.aim(nets, scene, x_t, t, r)
        made = clean(scene.around(play(nets, role)), x_t, t, scene.cond)
        values = (
            scene.given.means(squared(made - aim)).map(self._distance).map(lambda d, a, b: self.weight(a, b) * d, t, r)
        )
        return scene.terms("cd" if self.teacher else "ct", values, t, self.bins)

    @torch.no_grad()
    def aim(self, nets: Nets, scene: Scene, x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor]) -> AV[Tensor]:
        """f(x_r, r), without gradient."""
        x_r = self._back(nets, scene, x_t, t, r)
        return clean(scene.around(play(nets, self.target)), x_r, r, scene.cond)

    def _back(self, nets: Nets, scene: Scene, x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor]) -> AV[Tensor]:
        if not self.teacher:
            return scene.at(r)
        return self.step(scene.teacher(nets, self.guidance), x_t, t, r, scene.cond)

    def _distance(self, square: Tensor) -> Tensor:
        return square if not self.huber else (square + self.huber**2).sqrt() - self.huber


def ect(times: Joint, doublings: int = 1, **changes: object) -> Consistency:
    """Easy consistency tuning (arXiv:2406.14548): no teacher; pairs close in as stages raise `pairs.doublings`.

    changes: other fields of Consistency.
    """
    settings = {"teacher": False, "weight": inverse_gap, **changes}
    return Consistency(pairs=Narrowing(times, doublings), **settings)  # type: ignore[arg-type]


def clean(denoiser: Denoiser, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions) -> AV[Tensor]:
    """The consistency function f(x_t, t) = x_t - t F(x_t, t); f(x, 0) = x."""
    return to_x0(x_t, denoiser(x_t, t, cond), t)


@dataclass(frozen=True)
class ContinuousConsistency:
    """Continuous-time consistency, sCM (arXiv:2410.11081, eq. 8), terms "scm/video", reports "scm/video/tangent".

    On our path df/dt = (v - F) - t dF/dt along the flow of v. TrigFlow's time tau has tan(tau) = t / (1 - t); with
    c = sqrt((1 - t)^2 + t^2) its sample is x_t / c, its network F' = c F + ((1 - 2 t) / c) x_t and dtau = dt / c^2.
    So the paper's g = cos(tau) df/dtau is (1 - t) c df/dt, and its loss |F' - stop(F') - g / (|g| + floor)|^2 is
    |c (F - stop(F)) - g / (|g| + floor)|^2: the same numbers, no wrapper. |.| is the root mean square over what is
    generated, per sample and modality.

    times: law of t; LogitNormal(m, s) is the paper's log-normal law of tan(tau). ramp: the paper's tangent warm-up r
    (section 4.1), 0 = regression to v; raise it to 1 by stages. floor: of the tangent normalisation.
    teacher: v is the guided teacher's (distillation), otherwise noise - x0 (training). derivative: jvp or difference.
    """

    times: Joint = field(default_factory=lambda: Joint(AV(LogitNormal(0.2, 1.2), LogitNormal(0.2, 1.2))))
    ramp: float = 1.0
    floor: float = 0.1
    derivative: Derivative = field(default_factory=Derivative)
    teacher: bool = True
    guidance: Guide | None = None
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})
    bins: int = 4

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise ConfigError(
                f"ContinuousConsistency.floor: {self.floor} must be above 0, or a tangent of 0 divides it"
            )
        _guidable(self)

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """Only the student moves."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms and reports by noise level; pure given rng."""
        scene = Scene.of(batch, self.tasks, rng)
        t = scene.levels(self.times(rng.fold("times"), scene.given.x0))
        x_t = scene.at(t)
        student = scene.around(play(nets, role))
        g = self.tangent(student, self._velocity(nets, scene, x_t, t), x_t, t, scene.cond)
        size = scene.given.means(squared(g)).map(torch.sqrt)
        step = g.map(lambda a, s: a / (spread(s, a) + self.floor), size)
        made = student(x_t, t, scene.cond)
        moved = t.map(_radius) * (made - made.map(Tensor.detach))
        terms = scene.terms("scm", scene.given.means(squared(moved - step)), t, self.bins)
        return terms | scene.report("scm/{}/tangent", size)

    def _velocity(self, nets: Nets, scene: Scene, x_t: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
        if not self.teacher:
            return scene.velocity
        with torch.no_grad():
            return scene.teacher(nets, self.guidance)(x_t, t, scene.cond)

    def tangent(self, student: Denoiser, v: AV[Tensor], x_t: AV[Tensor], t: AV[Tensor], cond: Conditions) -> AV[Tensor]:
        """g = (1 - t) c (k (v - F) - ramp t dF/dt) of the student, without gradient.

        k = ((1 - t) - ramp t (1 - 2 t)) / c^2 is what the paper's warm-up leaves of v - F: 1 where ramp is 1.
        """
        zero = t.map(torch.zeros_like)
        made, slope = along(self.derivative, lambda x, s: student(x, s, cond), x_t, t, zero, v)
        k = t.map(lambda s: ((1 - s) - self.ramp * s * (1 - 2 * s)) / _radius(s).square())
        return t.map(lambda s: (1 - s) * _radius(s)) * (k * (v - made) - self.ramp * slope)


def _guidable(objective: Consistency | ContinuousConsistency) -> None:
    if objective.guidance is not None and not objective.teacher:
        raise ConfigError(f"{type(objective).__name__}.guidance: it is the teacher's; use teacher=True or no guidance")


def _radius(t: Tensor) -> Tensor:
    """c = sqrt((1 - t)^2 + t^2): how far TrigFlow's unit circle is from our straight path."""
    return ((1 - t).square() + t.square()).sqrt()
