"""Trained students of distribution matching, the scores they must reach, and wrong losses that must miss them.

The first problem is the ring of Gaussian blobs with its exact teacher: a student's samples must lie on the ring. The
second is two rings whose blobs are paired: a student that starts from the product of both must find the pairs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.flow import noised, to_x0, velocity
from soundstage.core.guidance import Isolated
from soundstage.core.rng import Rng
from soundstage.core.sampling import renoise
from soundstage.core.schedule import linear
from soundstage.objectives.base import Batch, Nets
from soundstage.objectives.consistency import Consistency
from soundstage.objectives.dmd import DMD, Guidance, Scores, score_times
from soundstage.objectives.flow_map import Grid
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.rollout import Given, Rollout, Simulated
from soundstage.testing.defects_flow import ADAM, BATCH, SAMPLES, Trial
from soundstage.testing.toy import JointMLP, JointMLPConfig, QuickRng, agreement, fit, rings, sliced_wasserstein

LEVELS = (1.0, 0.75, 0.5, 0.25)
EVEN = score_times(AV(1.0, 1.0))
PLAIN = Guidance(AV(1.0, 1.0))
QUICK = replace(ADAM, lr=4e-3, betas=(0.0, 0.999), final=0.02)
SLOW, STEADY = replace(QUICK, lr=5e-4), replace(QUICK, lr=2e-3, schedule="constant")

RIGHT = DMD(Rollout(AV(LEVELS)), PLAIN, EVEN, floor=1e-2, ratio=2, anchors=(Consistency(Grid(32), bins=0),))
"""Matching with a consistency anchor: without one, some seeds lose a blob."""

ALONE = replace(RIGHT, anchors=(), warmup=300)
"""Without the anchor, which leads a student to the ring whatever the scores say. The warm-up keeps its blobs."""

TRIALS: Mapping[str, Trial] = {
    "anchored": Trial(RIGHT, 1000, {4: 0.10}, optims={"student": QUICK, "fake_score": QUICK}, ema=0.98),
    "dmd": Trial(ALONE, 1100, {1: 0.25, 4: 0.15}, optims={"student": SLOW, "fake_score": STEADY}, ema=0.98),
}


@dataclass(frozen=True)
class Defect:
    """One mistake in the loss of a trial."""

    trial: str
    objective: Any

    @property
    def wrong(self) -> Trial:
        """The trial with the mistake."""
        return replace(TRIALS[self.trial], objective=self.objective)


class _Uphill(DMD):
    """The gradient with the other sign."""

    def scores(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Scores:
        right = DMD.scores(self, nets, x, given, rng)
        return replace(right, v_fake=right.v_real, v_real=right.v_fake)


class _Frozen(DMD):
    """The fake score never moves."""

    def turn(self, step: int) -> tuple[str, ...]:
        return ("student",) if "student" in DMD.turn(self, step) else ()


class _OnData(DMD):
    """The fake score learns data, not the student's samples."""

    def _fake_score(self, nets: Nets, given: Given, sample: Simulated, rng: Rng) -> Losses:
        return DMD._fake_score(self, nets, given, replace(sample, x0=given.x0), rng)


class _WrongWay(DMD):
    """The fake score learns x0 - noise."""

    def _fake_score(self, nets: Nets, given: Given, sample: Simulated, rng: Rng) -> Losses:
        return DMD._fake_score(self, {**nets, "fake_score": _Turned(nets["fake_score"])}, given, sample, rng)


class _Turned:
    """The velocity with the other sign."""

    def __init__(self, denoiser: Any) -> None:  # noqa: ANN401
        self.denoiser = denoiser

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return -self.denoiser(x_t, t, cond, r=r)


class _Told(DMD):
    """The teacher is told half of the level."""

    def scores(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Scores:
        return DMD.scores(self, {**nets, "teacher": _Halved(nets["teacher"])}, x, given, rng)


class _Halved:
    """A network told half of the level."""

    def __init__(self, denoiser: Any) -> None:  # noqa: ANN401
        self.denoiser = denoiser

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return self.denoiser(x_t, t.map(lambda level: level / 2), cond, r=r)


class _FakeTold(DMD):
    """The fake score learns under half of the level."""

    def _fake_score(self, nets: Nets, given: Given, sample: Simulated, rng: Rng) -> Losses:
        return DMD._fake_score(self, {**nets, "fake_score": _Halved(nets["fake_score"])}, given, sample, rng)


class _OtherTarget(DMD):
    """The noise in the fake score's target is not that in its input."""

    def _fake_score(self, nets: Nets, given: Given, sample: Simulated, rng: Rng) -> Losses:
        x = sample.x0
        t, noise, other = self.times(rng, x), rng.fold("one").normal_like(x), rng.fold("other").normal_like(x)
        error = nets["fake_score"](noised(x, noise, t), t, given.cond) - velocity(x, other)
        return given.terms("fake_score", error.map(torch.square))


class _ToData(DMD):
    """The sample is drawn to a sample of the data: fake - real = x - data."""

    def scores(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Scores:
        right = DMD.scores(self, nets, x, given, rng)
        return replace(right, v_fake=right.v_real - (x - given.x0) / right.t)


class _NoFake(DMD):
    """The sample itself in place of the fake score's prediction: regression to the teacher's mean."""

    def scores(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Scores:
        right = DMD.scores(self, nets, x, given, rng)
        return replace(right, v_fake=(right.x_t - x) / right.t)


class _OtherNoise(DMD):
    """Each score sees the sample with noise of its own."""

    def scores(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Scores:
        one, two = (DMD.scores(self, nets, x, given, rng.fold(i)) for i in range(2))
        return replace(one, v_fake=two.v_fake)


@dataclass(frozen=True)
class _NoNoise(Rollout):
    """The next call gets the clean prediction, without fresh noise."""

    def _entering(self, denoiser: Denoiser, given: Given, exits: Tensor, rng: Rng) -> AV[Tensor]:
        x = rng.fold("start").normal_like(given.x0)
        with torch.no_grad():
            for level in self.times["video"][: int(exits.max())]:
                t = x.map(lambda z, level=level: torch.full((len(z),), level))
                x = to_x0(x, denoiser(x, t, given.cond), t)
        return x


@dataclass(frozen=True)
class _FirstExit(Rollout):
    """Only the first call is ever trained."""

    def exits(self, rng: Rng) -> Tensor:
        return torch.zeros(len(rng), dtype=torch.int64)


def _as(kind: type[DMD], **changes: Any) -> DMD:  # noqa: ANN401
    """The right objective, of another class or with other fields."""
    return kind(**{name: getattr(ALONE, name) for name in ALONE.__dataclass_fields__} | changes)


DEFECTS: Mapping[str, Defect] = {
    "dmd: sign flipped": Defect("dmd", _as(_Uphill)),
    "dmd: fake score frozen": Defect("dmd", _as(_Frozen)),
    "dmd: fake score on data": Defect("dmd", _as(_OnData)),
    "dmd: fake score learns x0 - noise": Defect("dmd", _as(_WrongWay)),
    "dmd: no fake score": Defect("dmd", _as(_NoFake)),
    "dmd: teacher told half the level": Defect("dmd", _as(_Told)),
    "dmd: fake score told half the level": Defect("dmd", _as(_FakeTold)),
    "dmd: fake score's target of other noise": Defect("dmd", _as(_OtherTarget)),
    "dmd: towards data": Defect("dmd", _as(_ToData)),
    "dmd: student asked at other levels": Defect("dmd", _as(DMD, rollout=Rollout(AV((0.4, 0.3, 0.2, 0.1))))),
}
"""Every one must miss a gate of its trial by a quarter (`Measured.caught`)."""

UNSEEN: Mapping[str, DMD] = {
    "dmd: noise of their own": _as(_OtherNoise),
    "dmd: no fresh noise in the rollout": _as(DMD, rollout=_NoNoise(AV(LEVELS))),
    "dmd: exit always the first": _as(DMD, rollout=_FirstExit(AV(LEVELS))),
}
"""Mistakes that training forgives on this problem: an identity tells each of them."""


# Two modalities


class Marginal(DMD):
    """Each modality scored by itself: the pairs are out of sight."""

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        apart = {name: Isolated(nets[name]) for name in ("teacher", "fake_score")}
        return DMD.loss(self, role, {**nets, **apart}, batch, rng)


JOINT = DMD(Rollout(AV(LEVELS, LEVELS), each=True), PLAIN, EVEN, floor=1e-2, ratio=2, warmup=300)
APART = Marginal(JOINT.rollout, PLAIN, EVEN, floor=1e-2, ratio=2, warmup=300)
PAIRS = rings()


@dataclass(frozen=True)
class Coupling:
    """How a student of two modalities is trained: from joint scores, or `apart`, each modality by its own.

    paired: it starts from the pairs, not from the product of both.
    """

    apart: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    paired: bool = False
    steps: int = 1300


@dataclass(frozen=True)
class Coupled:
    """Share of samples whose modalities belong together, the distance of each to its ring, and CPU seconds."""

    agreement: float
    distance: AV[float]
    seconds: float


def couple(trial: Coupling, seed: int = 0) -> Coupled:
    """Train from the product of the marginals (or from the pairs) and score the student with four calls."""
    start = started(trial.paired)
    fake = started(trial.paired, apart=True) if trial.apart else start
    nets = {"student": copy.deepcopy(start), "fake_score": copy.deepcopy(fake), "teacher": PAIRS}
    optims = {"student": replace(QUICK, lr=1e-3), "fake_score": STEADY}
    began = time.process_time()
    objective = APART if trial.apart else JOINT
    student = fit(objective, nets, optims, PAIRS, trial.steps, batch=BATCH, weights=trial.weights, ema=0.98, seed=seed)
    seconds = time.process_time() - began
    return replace(scored(student), seconds=seconds)


@torch.no_grad()
def scored(student: Denoiser) -> Coupled:
    """Agreement and distances of four calls."""
    rng = QuickRng.of(1, SAMPLES)
    truth = PAIRS.sample(QuickRng.of(2, SAMPLES))
    made = renoise(student, rng.fold("start").normal_like(truth), linear(4, AV(1.0, 1.0)), Conditions(), rng=rng)
    distances = {name: sliced_wasserstein(made.only(name), truth.only(name)) for name in made.modalities}
    return Coupled(agreement(made, PAIRS), AV(**distances), 0.0)


@cache
def started(paired: bool = False, apart: bool = False) -> JointMLP:
    """The network that students and fake scores start as, which knows the modalities together, or each by itself.

    Not to be changed, but copied.
    """
    torch.manual_seed(0)
    network = JointMLPConfig(AV((2, 1, 1, 1), (2, 1)), width=128).build()
    tasks = {"t2v": 1.0, "t2a": 1.0} if apart else {"t2av": 1.0}
    objective = FlowMatching(EVEN, tasks, drop_text=0.0, given_noise=0.0, bins=0)
    data = PAIRS if paired else PAIRS.product()
    return fit(objective, {"student": network}, {"student": replace(ADAM, lr=2e-3)}, data, 1500, batch=BATCH)
