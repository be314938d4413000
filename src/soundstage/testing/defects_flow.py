"""Trained students of the consistency family, the scores they must reach, and wrong losses that must miss them.

The problem is the ring of Gaussian blobs with its exact teacher (testing.toy). A score is the sliced 2-Wasserstein
distance of a student's samples to the ring. Each of `DEFECTS` is a trial's objective with one mistake, and must score
a quarter more than a gate of its trial.
"""

from __future__ import annotations

import copy
import math
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
from soundstage.core.rng import Rng
from soundstage.core.sampling import Sampler, euler, renoise
from soundstage.core.schedule import linear
from soundstage.core.times import Joint, LogitNormal, Uniform
from soundstage.objectives.base import Nets
from soundstage.objectives.consistency import Consistency, ContinuousConsistency, clean, ect
from soundstage.objectives.dmd import DMD, Guidance, Scores, score_times
from soundstage.objectives.flow_map import Grid, Narrowing, Scene, Sorted, Velocity, along, play
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.mean_flow import MeanFlow
from soundstage.objectives.progressive import Progressive
from soundstage.objectives.rcm import RCM, Wandering
from soundstage.objectives.rollout import Given
from soundstage.testing.flow_maps import Staged, jump
from soundstage.testing.toy import JointMLP, JointMLPConfig, QuickRng, fit, ring, sliced_wasserstein
from soundstage.training.config import Optim

CALLS = (1, 4)
TRUTH = ring()
SAMPLES = 20_000
BATCH = 512
EVEN = Joint(AV(Uniform()))
LOG_NORMAL = Joint(AV(LogitNormal(0.2, 1.2)))
ADAM = Optim(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, clip=None, schedule="cosine")
CRITIC = replace(ADAM, betas=(0.0, 0.999), schedule="constant")


@dataclass(frozen=True)
class Trial:
    """How objectives are trained and judged: with n calls a student must score below `gates[n]`.

    objective: or several, where each trains the student of the one before, which is its teacher too. steps: of each.
    The first student is a network trained by flow matching. weights: of the terms.
    """

    objective: Any
    steps: int
    gates: Mapping[int, float]
    sampler: Sampler = renoise
    optims: Mapping[str, Optim] = field(default_factory=lambda: {"student": ADAM})
    ema: float = 0.99
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Scores by number of calls, infinite where the training diverged, and CPU seconds of the training."""

    scores: Mapping[int, float]
    seconds: float

    def passes(self, gates: Mapping[int, float]) -> bool:
        """Every gate is kept."""
        return all(self.scores[calls] < gate for calls, gate in gates.items())

    def caught(self, gates: Mapping[int, float]) -> bool:
        """Some score is more than a quarter above its gate."""
        return any(self.scores[calls] > 1.25 * gate for calls, gate in gates.items())


def measure(trial: Trial, seed: int = 0) -> Measured:
    """Train and score. Where objectives follow each other, the student for n calls is that of the grid of n steps."""
    chain = trial.objective if isinstance(trial.objective, tuple) else (trial.objective,)
    student, teacher, scores = pretrained(), TRUTH, {}
    began, scoring = time.process_time(), 0.0
    for objective in chain:
        nets = {"student": copy.deepcopy(student), "teacher": teacher, "fake_score": copy.deepcopy(pretrained())}
        student = fit(
            objective,
            nets,
            trial.optims,
            TRUTH,
            trial.steps,
            batch=BATCH,
            weights=trial.weights,
            ema=trial.ema,
            seed=seed,
        )
        teacher, paused = student, time.process_time()
        for calls in CALLS if len(chain) == 1 else {objective.grid.steps} & set(CALLS):
            scores[calls] = score(student, trial.sampler, calls)
        scoring += time.process_time() - paused
    return Measured({calls: scores[calls] for calls in CALLS}, time.process_time() - began - scoring)


@cache
def pretrained() -> JointMLP:
    """The network every student starts as: flow matching on data; not to be changed, but copied."""
    torch.manual_seed(0)
    network = JointMLPConfig(width=128).build()
    objective = FlowMatching(EVEN, drop_text=0.0, given_noise=0.0, bins=0)
    optim = replace(ADAM, lr=2e-3)
    return fit(objective, {"student": network}, {"student": optim}, TRUTH, 1500, batch=BATCH)


@torch.no_grad()
def score(denoiser: Denoiser, sampler: Sampler, calls: int) -> float:
    """Distance to the ring of samples made with `calls` equal steps; infinite where they are not finite."""
    noise = QuickRng.of(1, SAMPLES).fold("noise").normal_like(TRUTH.sample(QuickRng.of(0, SAMPLES)))
    made = sampler(denoiser, noise, linear(calls, AV(1.0)), Conditions(), rng=QuickRng.of(1, SAMPLES))
    return distance(made) if bool(made["video"].isfinite().all()) else math.inf


def distance(x: AV[Tensor]) -> float:
    """Sliced 2-Wasserstein distance to a sample of the ring with as many points in every blob."""
    means = TRUTH.means["video"]
    centres = means[torch.arange(len(x["video"])) % len(means)]
    return sliced_wasserstein(
        x, AV(centres + TRUTH.std * QuickRng.of(2, len(centres)).normal_like(AV(centres))["video"])
    )


def floor(seed: int = 3) -> float:
    """The distance of an independent sample of the ring itself."""
    return distance(TRUTH.sample(QuickRng.of(seed, SAMPLES)))


def _ramped(objective: Any, over: int = 500) -> Staged:  # noqa: ANN401
    """The objective with its derivative raised from none to all in five stages over `over` steps."""
    return Staged(objective, {round(over * i / 5): {"ramp": objective.ramp * i / 5} for i in range(6)})


def _narrowed(objective: Consistency, over: int = 1250) -> Staged:
    """Easy consistency tuning in seven stages, each halving the gap: what is left of it biases the student."""
    return Staged(objective, {round(over * i / 7): {"pairs": Narrowing(EVEN, i + 3)} for i in range(7)})


CD = Consistency(Grid(32), bins=0)
ECT = ect(EVEN, bins=0)
SCM = ContinuousConsistency(LOG_NORMAL, bins=0)
MEAN_FLOW = MeanFlow(Sorted(EVEN), bins=0)
HALVES = tuple(Progressive(Grid(n), bins=0) for n in (16, 8, 4, 2, 1))
MATCHING = DMD(Wandering(4, AV(1.0)), Guidance(AV(1.0)), score_times(AV(1.0)), floor=1e-2)
BOTH = RCM(SCM, MATCHING)

TRIALS: Mapping[str, Trial] = {
    "cd": Trial(CD, 2000, {1: 0.09, 4: 0.09}),
    "ect": Trial(_narrowed(ECT), 2500, {1: 0.14, 4: 0.14}, ema=0.995),
    "scm": Trial(_ramped(SCM), 1500, {1: 0.12, 4: 0.12}),
    "mean_flow": Trial(MEAN_FLOW, 2000, {1: 0.16, 4: 0.16}, jump, ema=0.995),
    "progressive": Trial(HALVES, 500, {1: 0.09, 4: 0.075}, euler),
    "rcm": Trial(BOTH, 2500, {4: 0.10}, optims={"student": replace(ADAM, betas=(0.0, 0.999)), "fake_score": CRITIC}),
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


class _Asked:
    """A derivative taken along a direction that is wrong by factors: of dx, and of dt."""

    def __init__(self, dx: float = 1.0, dt: float = 1.0) -> None:
        self.by = (dx, dt)

    def __call__(
        self, fn: Velocity, x: AV[Tensor], t: AV[Tensor], dx: AV[Tensor], dt: AV[Tensor]
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        return RIGHT(fn, x, t, self.by[0] * dx, self.by[1] * dt)


RIGHT = SCM.derivative


@dataclass(frozen=True)
class _TargetAtT(Consistency):
    """f(x_r, t): the target is asked at the student's time."""

    @torch.no_grad()
    def aim(self, nets: Nets, scene: Scene, x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor]) -> AV[Tensor]:
        return clean(scene.around(play(nets, self.target)), self._back(nets, scene, x_t, t, r), t, scene.cond)


@dataclass(frozen=True)
class _TargetIsX(Consistency):
    """x_r in place of f(x_r, r): the boundary is put at r."""

    @torch.no_grad()
    def aim(self, nets: Nets, scene: Scene, x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor]) -> AV[Tensor]:
        return self._back(nets, scene, x_t, t, r)


@dataclass(frozen=True)
class _OtherNoise(Consistency):
    """x_r of another noise than x_t: the pair lies on no common path."""

    def _back(self, nets: Nets, scene: Scene, x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor]) -> AV[Tensor]:  # noqa: ARG002
        return replace(scene, noise=scene.noise.map(lambda z: z.flip(0))).at(r)


def _uphill(denoiser: Denoiser, x: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions) -> AV[Tensor]:
    """A step of the teacher towards noise."""
    return x + (t - r) * denoiser(x, t, cond)


def _nowhere(denoiser: Denoiser, x: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions) -> AV[Tensor]:  # noqa: ARG001
    """No step."""
    return x


class _Flipped(ContinuousConsistency):
    """The tangent with the other sign."""

    def tangent(self, student: Denoiser, v: AV[Tensor], x_t: AV[Tensor], t: AV[Tensor], cond: Conditions) -> AV[Tensor]:
        return -ContinuousConsistency.tangent(self, student, v, x_t, t, cond)


class _OwnVelocity(ContinuousConsistency):
    """The flow followed is the student's own, not the teacher's."""

    def _velocity(self, nets: Nets, scene: Scene, x_t: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
        return scene.around(play(nets, "student"))(x_t, t, scene.cond).map(Tensor.detach)


class _WholeSpanMoves(MeanFlow):
    """du/dt with r moving along with t."""

    def target(
        self, student: Denoiser, v: AV[Tensor], x_t: AV[Tensor], t: AV[Tensor], r: AV[Tensor], cond: Conditions
    ) -> AV[Tensor]:
        _, slope = along(self.derivative, lambda x, s: student(x, s, cond, r=r + (s - t)), x_t, t, r, v)
        return v - slope


class _HalfSpan(Progressive):
    """The way of both steps over the time of one."""

    def target(self, teacher: Denoiser, x_t: AV[Tensor], levels: Any, cond: Conditions) -> AV[Tensor]:  # noqa: ANN401
        return 2 * Progressive.target(self, teacher, x_t, levels, cond)


class _OneStep(Progressive):
    """The teacher's first step alone."""

    def target(self, teacher: Denoiser, x_t: AV[Tensor], levels: Any, cond: Conditions) -> AV[Tensor]:  # noqa: ANN401
        return Progressive.target(self, teacher, x_t, levels[:2], cond)


class _WrongTime(Progressive):
    """The student is asked at the level of the step's end."""

    def loss(self, role: str, nets: Nets, batch: Any, rng: Rng) -> Losses:  # noqa: ANN401
        return Progressive.loss(self, role, {**nets, role: _Late(play(nets, role), self.grid.steps)}, batch, rng)


class _Late:
    """A network told a level one step of a grid below its input's."""

    def __init__(self, denoiser: Denoiser, steps: int) -> None:
        self.denoiser, self.steps = denoiser, steps

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return self.denoiser(x_t, t.map(lambda level: level - 1 / self.steps), cond, r=r)


class _Uphill(DMD):
    """The teacher and the fake score change places: the gradient has the other sign."""

    def scores(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Scores:
        right = DMD.scores(self, nets, x, given, rng)
        return replace(right, v_fake=right.v_real, v_real=right.v_fake)


def _as(kind: type, right: Any, **changes: Any) -> Any:  # noqa: ANN401
    """An objective of another class with the same fields."""
    return kind(**{name: getattr(right, name) for name in right.__dataclass_fields__} | changes)


def _both(matching: DMD = MATCHING, scm: Any = SCM) -> RCM:  # noqa: ANN401
    return RCM(scm, matching)


DEFECTS: Mapping[str, Defect] = {
    "cd: target asked at t": Defect("cd", _as(_TargetAtT, CD)),
    "cd: target is x_r": Defect("cd", _as(_TargetIsX, CD)),
    "cd: teacher steps towards noise": Defect("cd", replace(CD, step=_uphill)),
    "cd: teacher does not step": Defect("cd", replace(CD, step=_nowhere)),
    "ect: another noise at r": Defect("ect", _narrowed(_as(_OtherNoise, ECT))),
    "ect: target asked at t": Defect("ect", _narrowed(_as(_TargetAtT, ECT))),
    "ect: the gap never closes": Defect("ect", ECT),
    "scm: derivative dropped": Defect("scm", replace(SCM, ramp=0.0)),
    "scm: derivative flipped": Defect("scm", _ramped(replace(SCM, ramp=-1.0))),
    "scm: tangent flipped": Defect("scm", _ramped(_as(_Flipped, SCM))),
    "scm: no derivative by t": Defect("scm", _ramped(replace(SCM, derivative=_Asked(dt=0.0)))),
    "scm: no derivative by x": Defect("scm", _ramped(replace(SCM, derivative=_Asked(dx=0.0)))),
    "scm: own velocity": Defect("scm", _ramped(_as(_OwnVelocity, SCM))),
    "mean_flow: du/dt dropped": Defect("mean_flow", replace(MEAN_FLOW, ramp=0.0)),
    "mean_flow: du/dt flipped": Defect("mean_flow", replace(MEAN_FLOW, ramp=-1.0)),
    "mean_flow: tangent of t zero": Defect("mean_flow", replace(MEAN_FLOW, derivative=_Asked(dt=0.0))),
    "mean_flow: tangent of x zero": Defect("mean_flow", replace(MEAN_FLOW, derivative=_Asked(dx=0.0))),
    "mean_flow: r moves with t": Defect("mean_flow", _as(_WholeSpanMoves, MEAN_FLOW)),
    "progressive: half the span": Defect("progressive", tuple(_as(_HalfSpan, p) for p in HALVES)),
    "progressive: one step of the teacher": Defect("progressive", tuple(_as(_OneStep, p) for p in HALVES)),
    "progressive: asked at the step's end": Defect("progressive", tuple(_as(_WrongTime, p) for p in HALVES)),
    "rcm: scores exchanged": Defect("rcm", _both(_as(_Uphill, MATCHING))),
    "rcm: tangent flipped": Defect("rcm", _both(scm=_as(_Flipped, SCM))),
}
"""Every one must miss a gate of its trial: `measure(defect.wrong).caught(defect.wrong.gates)`.

A fake score that learns data is not among them: beside a right consistency loss it did no harm (0.089 and 0.068).
"""
