"""MeanFlow (arXiv:2505.13447): one network for every jump, u(x_t, t, r) with x_r = x_t - (t - r) u."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.objectives.base import Batch, Nets
from soundstage.objectives.dmd import Guidance
from soundstage.objectives.flow_map import Derivative, Pairs, Scene, Sorted, along, play, squared


@dataclass(frozen=True)
class MeanFlow:
    """u is regressed to v - (t - r) du/dt (arXiv:2505.13447, eq. 10), terms "mean_flow/video".

    The derivative is along the flow of v, by jvp or by central difference; with a time per modality, along the line
    of levels from t to r (flow_map). Samples with r = t are flow matching. pairs: law of (t, r).
    teacher: v is the guided teacher's; otherwise it is noise - x0, and guidance is built in from the student itself
    (their appendix B.1): v~ = w v + k u(x_t, t, t | cond) + (1 - w - k) u(x_t, t, t | negative), of effective scale
    w / (1 - k). guidance: that effective scale, or the teacher's, and its negative; mix: k.
    drop_text: share of samples told no text, which then have v.
    Loss of a sample and modality: e / stop(e + floor)^power of the mean square e (their eq. 22); reports
    "mean_flow/video/error" are e itself. ramp: share of the derivative in the target, raised to 1 by stages.
    """

    pairs: Pairs = field(default_factory=Sorted)
    ramp: float = 1.0
    power: float = 0.75
    floor: float = 1e-2
    derivative: Derivative = field(default_factory=Derivative)
    teacher: bool = True
    guidance: Guidance | None = None
    mix: float = 0.0
    drop_text: float = 0.0
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})
    bins: int = 4

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise ConfigError(f"MeanFlow.floor: {self.floor} must be above 0, or an error of 0 divides by it")
        if not 0 <= self.mix < 1:
            raise ConfigError(f"MeanFlow.mix: {self.mix} is not in [0, 1)")
        if not self.mix:
            return
        if self.teacher or self.guidance is None:
            raise ConfigError("MeanFlow.mix: it is of guidance without a teacher; use teacher=False and guidance")
        if any(scale * (1 - self.mix) == 1 for scale in self.guidance.scale.values()):
            raise ConfigError(
                "MeanFlow.mix: guidance x (1 - mix) = 1 leaves no weight to measure by; change mix a little"
            )

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """Only the student moves."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms and reports by noise level; pure given rng."""
        scene = Scene.of(batch, self.tasks, rng)
        t, r = scene.pair(self.pairs, rng)
        x_t = scene.at(t)
        student = play(nets, role)
        dropped = self._dropped(scene, rng)
        cond = scene.cond if dropped is None else scene.cond.drop("text", dropped)
        v = self._velocity(nets, student, scene, x_t, t, cond, dropped)
        around = scene.around(student)
        aim = self.target(around, v, x_t, t, r, cond)
        error = scene.given.means(squared(around(x_t, t, cond, r=r) - aim))
        values = error.map(lambda e: e / (e.detach() + self.floor) ** self.power)
        terms = scene.terms("mean_flow", values, t, self.bins)
        return terms | scene.report("mean_flow/{}/error", error.map(Tensor.detach))

    def target(
        self, student: Denoiser, v: AV[Tensor], x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions
    ) -> AV[Tensor]:
        """v - (t - r) du/dt, without gradient."""
        _, slope = along(self.derivative, lambda x, s: student(x, s, cond, r=r), x_t, t, r, v)
        return v - self.ramp * slope

    def _dropped(self, scene: Scene, rng: Rng) -> Tensor | None:
        """(B,) whose text is dropped, or None."""
        if not self.drop_text or scene.cond.text is None:
            return None
        return (rng.fold("drop_text").uniform() < self.drop_text).to(next(scene.noise.values()).device)

    @torch.no_grad()
    def _velocity(
        self,
        nets: Nets,
        student: Denoiser,
        scene: Scene,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,
        dropped: Tensor | None,
    ) -> AV[Tensor]:
        if self.teacher:
            return scene.teacher(nets, self.guidance)(x_t, t, cond)
        v = scene.velocity
        if self.guidance is None:
            return v
        w = self.guidance.scale.only(*x_t.modalities).map(lambda scale: scale * (1 - self.mix))
        # k u(cond) + (1 - w - k) u(negative) = (1 - w) (s u(cond) + (1 - s) u(negative)), s = k / (1 - w)
        scale = w.map(lambda weight: 0.0 if weight == 1 else self.mix / (1 - weight))
        own = scene.around(replace(self.guidance, scale=scale)(student, cond))
        mixed = w * v + w.map(lambda weight: 1 - weight) * own(x_t, t, cond)
        return mixed if dropped is None else mixed.map(lambda a, b: torch.where(spread(dropped, a), b, a), v)
