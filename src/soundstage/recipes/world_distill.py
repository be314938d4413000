"""Recipes that make a four-step student of the shipped tiny model, each with about the same processor time.

soundstage train soundstage.recipes.world_distill:consistency4
soundstage train soundstage.recipes.world_distill:dmd4
soundstage train soundstage.recipes.world_distill:rcm4
soundstage train soundstage.recipes.world_distill:mean_flow4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from soundstage.core.av import AV, collate
from soundstage.core.system import Sampling, System, load_system
from soundstage.core.times import Joint, LogitNormal
from soundstage.data.latents import Latents
from soundstage.data.records import ClipShape, to_media
from soundstage.evaluation.suite import stream_items
from soundstage.inference.generator import Generator
from soundstage.models.system import save_system
from soundstage.models.text.bytes import tokenize
from soundstage.models.weights import fingerprint
from soundstage.objectives.consistency import Consistency, ContinuousConsistency
from soundstage.objectives.dmd import DMD, Guidance, score_times
from soundstage.objectives.flow_map import Grid, Sorted
from soundstage.objectives.mean_flow import MeanFlow
from soundstage.objectives.rcm import RCM, Wandering
from soundstage.objectives.rollout import Rollout, warped
from soundstage.recipes.judging import InStep
from soundstage.recipes.world import MIXTURE, World, WorldCodec, scored
from soundstage.training.checkpoint import load_weights
from soundstage.training.config import Optim, Role, TrainConfig
from soundstage.training.state import Validation
from soundstage.training.vitals import Vitals

TEACHER = "world-tiny"
GUIDANCE = AV(3.0, 3.0)
SHIFT = AV(3.0, 3.0)
STEPS = 4
TASKS = {"t2av": 0.7, "a2v": 0.1, "v2a": 0.1, "i2av": 0.1}


@dataclass(frozen=True)
class Shipped:
    """The denoiser of a model folder, with its weights."""

    model: str = TEACHER

    def build(self) -> torch.nn.Module:
        """The module, its parameters free to move."""
        with torch.device("cpu"):  # whole, also where others are only counted
            denoiser: Any = load_system(self.model).denoiser
        return denoiser.requires_grad_(True)


LEVELS = (*warped(STEPS, SHIFT["video"])["video"], 0.0)
SAMPLING = Sampling("renoise", STEPS, SHIFT, times=AV(LEVELS, LEVELS), baked=GUIDANCE, tasks=tuple(TASKS))
"""How the students are sampled: four calls, the teacher's guidance built in."""


def student_system(student: torch.nn.Module, sampling: Sampling = SAMPLING) -> System:
    """The shipped model with a student in the teacher's place."""
    return replace(load_system(TEACHER), denoiser=student, sampling=sampling, name="tiny-4step")


def pack(run: str | Path, folder: str | Path, sampling: Sampling = SAMPLING) -> Path:
    """Write the averaged student of a run, with the shipped model's codec, as a model folder; returns the folder."""
    shipped = load_system(TEACHER)
    student: Any = Shipped().build()
    base = {"name": TEACHER, "sha256": fingerprint(student.state_dict())}
    load_weights(student, run)
    codec: Any = shipped.codec
    return save_system(Path(folder), "tiny-4step", student.config, student, codec, sampling, base=base)


@dataclass(frozen=True)
class Scored:
    """`world.score` of a student. sampling: how it is asked."""

    sampling: Sampling = SAMPLING

    def __call__(self, validation: Validation) -> dict[str, float]:
        """The numbers of a run at a moment."""
        return scored(Generator(student_system(validation.student, self.sampling)), validation.folder)


@dataclass(frozen=True)
class Filmed:
    """Clips of four prompts with four seeds each. sampling: how the student is asked; None = by the teacher."""

    sampling: Sampling | None = SAMPLING

    def __call__(self, validation: Validation) -> AV[torch.Tensor]:
        """Media: video (16, 3, F, H, W), audio (16, channels, samples)."""
        asked = self.sampling
        system = load_system(TEACHER) if asked is None else student_system(validation.student, asked)
        prompts = [item.caption for item in stream_items(4, seed=2, kinds=("bounce", "metronome", "drums", "engine"))]
        made = Generator(system).generate(prompts, num=4)
        return collate([to_media(one.clip, ClipShape()) for one in made])


def judged(sampling: Sampling = SAMPLING) -> Vitals:
    """What these recipes measure: the score, and vital signs beside the teacher's, by which a sick run is stopped."""
    in_step = InStep(ClipShape().rate)
    return Vitals(Filmed(sampling), Filmed(None), seeds=4, sync=in_step, scores=Scored(sampling))


def _run(name: str, objective: Any, **changes: Any) -> TrainConfig:  # noqa: ANN401
    """What the four recipes share: the shipped model as student and teacher, its data, and the size of the run."""
    optim = Optim(lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup=50, schedule="wsd", decay=0.3)
    config = TrainConfig(
        name=f"world-{name}",
        model=Shipped(),
        objective=objective,
        data=Latents(World(seed=1, kinds=MIXTURE), WorldCodec(model=TEACHER), tokenize, num=8192),
        steps=800,
        batch_size=32,
        optim=optim,
        roles={"teacher": Role(Shipped())},
        ema=0.995,
        save_every=50,
        validate=judged(),
        validate_every=200,
    )
    return replace(config, **changes)


def _critic() -> Mapping[str, Role]:
    optim = Optim(lr=4e-4, betas=(0.0, 0.99), weight_decay=0.0, warmup=50)
    return {"teacher": Role(Shipped()), "fake_score": Role(Shipped(), optim)}


def consistency4() -> TrainConfig:
    """Consistency distillation.

    soundstage train soundstage.recipes.world_distill:consistency4

    Not yet run whole.
    """
    objective = Consistency(Grid(32, SHIFT), guidance=Guidance(GUIDANCE), tasks=TASKS)
    return _run("consistency4", objective)


def _anchor() -> Consistency:
    return Consistency(Grid(32, SHIFT), guidance=Guidance(GUIDANCE), tasks=TASKS)


def dmd4() -> TrainConfig:
    """DMD2 with backward simulation and a consistency anchor.

    soundstage train soundstage.recipes.world_distill:dmd4

    Not yet run whole.
    """
    objective = DMD(
        Rollout(warped(STEPS, SHIFT["video"])),
        Guidance(GUIDANCE),
        score_times(SHIFT),
        TASKS,
        ratio=2,
        anchors=(_anchor(),),
    )
    optim = Optim(lr=2e-4, betas=(0.0, 0.99), weight_decay=0.0, warmup=50, schedule="wsd", decay=0.3)
    return _run("dmd4", objective, roles=_critic(), optim=optim, weights={"cd/video": 3.0, "cd/audio": 3.0}, steps=480)


def rcm4() -> TrainConfig:
    """rCM: continuous consistency with distribution matching.

    soundstage train soundstage.recipes.world_distill:rcm4

    Not yet run whole.
    """
    times = Joint(AV(LogitNormal(0.2, 1.2), LogitNormal(0.2, 1.2)))
    consistency = ContinuousConsistency(times, guidance=Guidance(GUIDANCE), tasks=TASKS)
    matching = DMD(Wandering(STEPS, SHIFT), Guidance(GUIDANCE), score_times(SHIFT), TASKS, ratio=2)
    return _run("rcm4", RCM(consistency, matching), roles=_critic(), steps=480)


MAPPED = replace(SAMPLING, flow_map=True)
"""How a flow map is sampled: the same four calls, each asked for the jump down to clean data."""


def mean_flow4() -> TrainConfig:
    """MeanFlow of the guided teacher's velocity: the student learns every jump, and is sampled as the others.

    soundstage train soundstage.recipes.world_distill:mean_flow4

    Not yet run whole.
    """
    law = LogitNormal(0.6, 1.4)
    objective = MeanFlow(Sorted(Joint(AV(law, law)), equal=0.25), guidance=Guidance(GUIDANCE), tasks=TASKS)
    return _run("mean_flow4", objective, validate=judged(MAPPED))


SAMPLINGS = {"consistency4": SAMPLING, "dmd4": SAMPLING, "rcm4": SAMPLING, "mean_flow4": MAPPED}
"""How the student of each recipe is asked: what `pack` needs."""
