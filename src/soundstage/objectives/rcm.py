"""rCM (arXiv:2510.08431): a consistency loss that covers all modes, with distribution matching that sharpens each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from soundstage.core.av import AV
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError
from soundstage.core.flow import ToData
from soundstage.core.rng import Rng
from soundstage.core.schedule import shift
from soundstage.objectives.base import Batch, Nets, Objective
from soundstage.objectives.consistency import ContinuousConsistency
from soundstage.objectives.dmd import DMD
from soundstage.objectives.flow_map import play
from soundstage.objectives.rollout import Given, Rollout, Simulated


@dataclass(frozen=True)
class Wandering:
    """A rollout of 1 to `steps` calls at levels drawn anew: the first at 1, the others uniform, shifted and descending.

    The draw is the same for all samples, micro-batches and processes. So the student is trained for any list of times,
    not for one.
    """

    steps: int = 4
    shift: AV[float] = AV(5.0, 5.0)  # noqa: RUF009 (AV is frozen)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"Wandering.steps: {self.steps} is too few, use at least 1")

    def times(self, rng: Rng) -> AV[tuple[float, ...]]:
        """The levels of this draw, per modality."""
        shared = rng.everywhere()
        calls = int(shared.fold("calls").integers(1, self.steps + 1))
        # 24-bit numbers: half a step up keeps the levels above 0
        drawn = shared.fold("levels").uniform(self.steps - 1, dtype=torch.float64)[0] + 2.0**-25
        levels = sorted(drawn[: calls - 1].tolist(), reverse=True)
        return self.shift.map(lambda by: (1.0, *(shift(level, by) for level in levels)))

    def __call__(self, student: Denoiser, given: Given, rng: Rng) -> Simulated:
        """One sample per seed, with the gradient of its last call."""
        rollout = Rollout(self.times(rng))
        return rollout(student, given, rng, exits=torch.full((len(rng),), rollout.steps - 1))


@dataclass(frozen=True)
class RCM:
    """The student's terms are those of `consistency` and of `dmd` ("scm/video", "dmd/video"); other roles are dmd's.

    The paper weighs scm 100 to dmd 1 with a loss that is a mean; weights are the run's. consistency: any objective of
    the student, such as MeanFlow. two_times: the student is a flow map (MeanFlow): dmd sees it as one that jumps to
    clean data, and asks its fake score and teacher as ever.
    """

    consistency: Objective = field(default_factory=ContinuousConsistency)
    dmd: DMD = field(default_factory=lambda: DMD(rollout=Wandering()))
    two_times: bool = False

    def turn(self, step: int) -> tuple[str, ...]:
        """The turns of dmd."""
        return self.dmd.turn(step)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms and reports of one role; pure given rng. Raises ConfigError where both name the same term."""
        jumping = {**nets, "student": ToData(play(nets, "student"))} if self.two_times else nets
        terms = self.dmd.loss(role, jumping, batch, rng.fold("dmd"))
        if role != "student":
            return terms
        more = self.consistency.loss(role, nets, batch, rng.fold("consistency"))
        twice = sorted(terms.keys() & more.keys())
        if twice:
            raise ConfigError(f"RCM.consistency: it names {twice[0]!r}, which dmd does too")
        return terms | more
