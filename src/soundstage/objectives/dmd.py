"""Distribution matching distillation (arXiv:2311.18828), in its second form (arXiv:2405.14867), for both modalities.

The student's own samples are moved along the difference of two scores: the teacher's, frozen, and that of the student's
samples, learnt by `fake_score` while the student moves. Both see a sample's modalities together, which is what keeps
picture and sound in step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError
from soundstage.core.flow import noised, to_x0, velocity
from soundstage.core.guidance import APG, Guided
from soundstage.core.rng import Rng
from soundstage.core.times import Joint, Shifted, TimeLaw, Uniform
from soundstage.objectives.base import Batch, Nets, Objective, Sum, report
from soundstage.objectives.gan import GAN
from soundstage.objectives.rollout import Given, Rollout, Simulate, Simulated

__all__ = ["DMD", "Clamped", "Guidance", "Scores", "no_text", "score_gradient", "score_times", "surrogate"]


@dataclass(frozen=True)
class Clamped:
    """Another law held between two levels; what falls outside gathers at the ends."""

    law: TimeLaw
    low: float = 0.02
    high: float = 0.98

    def __call__(self, u: Tensor, tokens: int = 0) -> Tensor:
        return self.law(u, tokens).clamp(self.low, self.high)


def score_times(shift: AV[float] = AV(5.0, 5.0)) -> Joint:  # noqa: B008 (AV is frozen)
    """Levels scores are compared at: uniform, shifted, within [0.02, 0.98]; both modalities share a sample's number."""
    return Joint(shift.map(lambda by: Clamped(Shifted(Uniform(), by))), shared=True)


def no_text(cond: Conditions) -> Conditions:  # noqa: ARG001
    """The negative of a teacher trained with dropped text."""
    return Conditions()


@dataclass(frozen=True)
class Guidance:
    """The teacher's guidance, v + (scale - 1) (v - v_negative), per modality; the student learns its result.

    negative: from the batch's conditions to what the weak prediction is told, with a text per modality; a batch of one
        serves all samples. interval, projection, together: as in core.guidance.Guided.
    """

    scale: AV[float] = field(default_factory=lambda: AV(4.0, 3.0))
    negative: Callable[[Conditions], Conditions] = no_text
    interval: tuple[float, float] = (0.0, 1.0)
    projection: APG | None = None
    together: bool = True

    def __call__(self, denoiser: Denoiser, cond: Conditions) -> Denoiser:
        """The guided teacher for these conditions."""
        return Guided(
            denoiser,
            self.negative(cond),
            self.scale,
            self.interval,
            projection=self.projection,
            together=self.together,
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """Both scores of the same noised samples x_t at t, as velocities of the fake score and of the guided teacher."""

    x_t: AV[Tensor]
    t: AV[Tensor]
    v_fake: AV[Tensor]
    v_real: AV[Tensor]

    @property
    def fake(self) -> AV[Tensor]:
        """The fake score's clean prediction."""
        return to_x0(self.x_t, self.v_fake, self.t)

    @property
    def real(self) -> AV[Tensor]:
        """The teacher's clean prediction."""
        return to_x0(self.x_t, self.v_real, self.t)

    @property
    def gap(self) -> AV[Tensor]:
        """fake - real, without the rounding of x_t: t^2 / (1 - t) times the difference of the scores."""
        return self.t * (self.v_real - self.v_fake)


def score_gradient(x: AV[Tensor], scores: Scores, given: Given, floor: float) -> AV[Tensor]:
    """g = (fake - real) / max(mean |x - real|, floor) (arXiv:2311.18828, eq. 7-8), per sample and per modality.

    x: the student's samples. The mean is over what is generated, so that the size of g does not depend on how much of
    a clip is given.
    """
    distance = given.means((x - scores.real).map(torch.abs))
    return scores.gap / distance.map(lambda d: d.clamp_min(floor))


def surrogate(x: AV[Tensor], gradient: AV[Tensor]) -> AV[Tensor]:
    """0.5 (x - stopgrad(x - g))^2 in every element: its derivative by x is g, without the rounding of x - g."""
    return (x - x.map(Tensor.detach) + gradient).map(lambda error: 0.5 * error.square())


@dataclass(frozen=True)
class DMD:
    """Terms "dmd/video", "dmd/audio" of the student and "fake_score/..." of the fake score; more by `gan`, `anchors`.

    rollout: how the student's samples are made. guidance: (teacher, conditions) -> Denoiser, what the student becomes.
    times: law of the levels at which scores are compared, and the fake score is trained. tasks: as in FlowMatching;
        of the data only what a task gives (a first frame) is used, all else is the student's.
    target: what the fake score regresses, its velocity or x0 (t^2 times the former). floor: of the normaliser.
    ratio: the fake score moves at every step, the student at every ratio-th, the first being step `warmup`.
    gan: an adversarial term on real data. anchors: objectives whose terms for the student are added, such as a
        consistency loss or regression to the teacher's ODE: DMD alone may drop modes.

    Reports: "exit/k", the share of exits; "dmd/video/exit{k}", the loss by exit; "gap/video", how far the scores are
    apart; "error/fake/video" and "error/teacher/video", how far each predicts from the sample.
    """

    rollout: Simulate = field(default_factory=Rollout)
    guidance: Callable[[Denoiser, Conditions], Denoiser] = field(default_factory=Guidance)
    times: Joint = field(default_factory=score_times)
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})
    target: Literal["flow", "x0"] = "flow"
    floor: float = 1e-3
    ratio: int = 5
    warmup: int = 0
    gan: GAN | None = None
    anchors: tuple[Objective, ...] = ()

    def __post_init__(self) -> None:
        if self.target not in ("flow", "x0"):
            raise ConfigError(f"DMD.target: {self.target!r} is not one of flow, x0")
        if not self.floor > 0:
            raise ConfigError(f"DMD.floor: {self.floor} must be above 0, or a perfect sample divides by zero")
        if self.ratio < 1 or self.warmup < 0:
            raise ConfigError(f"DMD: ratio {self.ratio} must be at least 1 and warmup {self.warmup} at least 0")

    def turn(self, step: int) -> tuple[str, ...]:
        """The student at every ratio-th step after the warm-up, the others always."""
        others = ("fake_score",) if self.gan is None else ("fake_score", "discriminator")
        due = step >= self.warmup and (step - self.warmup) % self.ratio == 0
        return ("student", *others) if due else others

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms and reports of one role on a fresh sample of the student; pure given rng.

        Raises ConfigError where two objectives share the name of a term.
        """
        if self.anchors:
            return Sum(replace(self, anchors=()), self.anchors).loss(role, nets, batch, rng)
        given = Given.of(batch, self.tasks, rng.fold("tasks"))
        with torch.set_grad_enabled(role == "student" and torch.is_grad_enabled()):
            sample = self.rollout(nets["student"], given, rng.fold("rollout"))
        if role == "student":
            return self._student(nets, given, sample, rng)
        if role == "discriminator" and self.gan is not None:
            return self.gan.discriminator(nets, sample.x0, given, rng.fold("gan"))
        return self._fake_score(nets, given, sample, rng)

    def _student(self, nets: Nets, given: Given, sample: Simulated, rng: Rng) -> Losses:
        x = sample.x0
        with torch.no_grad():
            scores = self.scores(nets, x.map(Tensor.detach), given, rng.fold("score"))
            gradient = score_gradient(x, scores, given, self.floor)
        values = surrogate(x, gradient)
        terms = given.terms("dmd", values)
        if self.gan is not None:
            terms |= self.gan.student(nets, x, given, rng.fold("gan"))
        return terms | self._reports(given, sample, values, scores)

    def scores(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Scores:
        """What both say of the samples x, noised alike."""
        t = self.times(rng, x)
        x_t = noised(x, rng.fold("noise").normal_like(x), t)
        teacher = self.guidance(nets["teacher"], given.cond)
        v_fake, v_real = (given.around(d)(x_t, t, given.cond) for d in (nets["fake_score"], teacher))
        return Scores(x_t, t, v_fake, v_real)

    def _fake_score(self, nets: Nets, given: Given, sample: Simulated, rng: Rng) -> Losses:
        x, rng = sample.x0, rng.fold("score")
        t, noise = self.times(rng, x), rng.fold("noise").normal_like(x)
        v = given.around(nets["fake_score"])(noised(x, noise, t), t, given.cond)
        error = v - velocity(x, noise)
        if self.target == "x0":
            error = t * error
        terms = given.terms("fake_score", error.map(torch.square))
        if self.gan is not None and self.gan.features == "fake_score":
            terms |= self.gan.judge(nets, x, given, rng.fold("gan"))
        return terms

    def _reports(self, given: Given, sample: Simulated, values: AV[Tensor], scores: Scores) -> Losses:
        x = sample.x0.map(Tensor.detach)
        generated = given.generated()
        reports: Losses = {}
        shown = {"gap": scores.gap, "error/fake": x - scores.fake, "error/teacher": x - scores.real}
        for name, value in shown.items():
            means = given.means(value.map(torch.abs))
            reports |= {f"{name}/{m}": report(mean, generated[m]) for m, mean in means.items()}
        losses = given.means(values)
        exits = sample.exits.to(next(x.values()).device)
        for k in range(self.rollout.steps):
            here = exits == k
            reports[f"exit/{k}"] = report(here.float(), torch.ones_like(here))
            reports |= {f"dmd/{m}/exit{k}": report(loss, generated[m] & here) for m, loss in losses.items()}
        return reports
