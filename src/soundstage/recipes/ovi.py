"""Recipes that make Ovi few-step students: picture and sound together, from prompts alone.

    dmd4, dmd4_shared      students that make the clip at once
    self_forcing           a student that makes it second after second

soundstage train soundstage.recipes.ovi:dmd4 folder=weights/ovi prompts=prompts.txt
soundstage train soundstage.recipes.ovi:dmd4_shared folder=weights/ovi prompts=prompts.txt
soundstage train soundstage.recipes.ovi:self_forcing folder=weights/ovi prompts=prompts.txt
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from soundstage.core.av import AV
from soundstage.core.causal import Chunking
from soundstage.core.system import Sampling
from soundstage.data.prompts import Prompts
from soundstage.models.ovi import OVI_NEGATIVE
from soundstage.objectives.dmd import DMD, Guidance, score_times
from soundstage.objectives.regression import Regression
from soundstage.objectives.rollout import Rollout, warped
from soundstage.objectives.self_forcing import SelfForcing, Staggered
from soundstage.recipes.judging import Teacher, judged
from soundstage.recipes.published import Backbone, Negative, Texts, backbone_of, export_student, shape_of, shared
from soundstage.training.config import Optim, Role, Stage, TrainConfig
from soundstage.training.parallel import Parallel

MODEL = "ovi-720x720-5s"
SHIFT = AV(5.0, 5.0)
GUIDANCE = AV(4.0, 3.0)  # Ovi's own, cond + (scale - 1) (cond - negative)
STEPS = 4
AUDIO = r"(^|\.)audio\."
"""Names of the audio tower's parameters, whole network or adapter."""
TIMES = warped(STEPS, SHIFT["video"])
SAMPLING = Sampling(
    "renoise", STEPS, SHIFT, times=TIMES.map(lambda levels: (*levels, 0.0)), baked=GUIDANCE, tasks=("t2av",)
)
"""How the students are sampled: four calls at 1, 0.9375, 0.8333, 0.625, no guidance."""
CHUNKS = Chunking(Fraction(1))  # Hallo-Live's second: 6 latents of picture and 30 of sound
STREAMED = replace(SAMPLING, sampler="streamed")
"""How causal students are sampled: four such calls for each chunk, and one that remembers it."""


def _moving(lr: float) -> Optim:
    """Adam as published runs of DMD have it: no first moment, norm of 10. Audio learns more slowly: three times lr."""
    return Optim(lr=lr, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0, scale={AUDIO: 3.0})


def dmd4(folder: str = "weights/ovi", prompts: str = "prompts.txt", model: str = MODEL) -> TrainConfig:
    """DMD2 of whole copies: student, fake score and frozen teacher of 11.66 B parameters each.

    torchrun --nnodes 2 --nproc-per-node 8 -m soundstage train soundstage.recipes.ovi:dmd4 folder=weights/ovi
    soundstage train soundstage.recipes.ovi:dmd4 --dry-run      what it takes on 8, 16 and 64 GPUs

    Hardware: 16 GPUs of 80 GB or more (--dry-run: 41 GiB each beside the allocator's and NCCL's own; 64 GiB on 8).
    Work: 126 PFLOP per step, 505 EFLOP in all. Time and number reached: not yet run.

    folder: Ovi's files (`soundstage models fetch ovi DIR`). prompts: .txt, one a line, or .jsonl; each as the model
    wants it, with <S>speech<E> and its sound described. Set accumulate to 64 / GPUs.
    """
    texts = Texts(model, folder, also=(OVI_NEGATIVE["video"], OVI_NEGATIVE["audio"]))
    student = Backbone(model, folder)
    guidance = Guidance(GUIDANCE, Negative(OVI_NEGATIVE, texts))
    objective = DMD(
        Rollout(TIMES),
        guidance,
        score_times(SHIFT),
        {"t2av": 1.0},
        ratio=5,
    )
    return TrainConfig(
        name="ovi-dmd4",
        model=student,
        objective=objective,
        data=Prompts(prompts, texts, shape_of(model)),
        # Self-Forcing's and Hallo-Live's rates; runs of Wan2.2 5B stop at 4000 steps of 64
        steps=4000,
        batch_size=64,
        optim=_moving(2e-6),
        roles={"teacher": Role(Backbone(model, folder, "bf16")), "fake_score": Role(student, _moving(4e-7))},
        precision="bf16",
        parallel=Parallel(checkpointing=True),
        ema=0.99,
        save_every=200,
        validate=judged(model, folder, SAMPLING, Teacher(guidance, shift=SHIFT)),
        validate_every=500,
    )


def dmd4_shared(folder: str = "weights/ovi", prompts: str = "prompts.txt", model: str = MODEL) -> TrainConfig:
    """The same on one frozen base: student and fake score are adapters of 3.2 % and 1.6 % of its size.

    torchrun --nproc-per-node 8 -m soundstage train soundstage.recipes.ovi:dmd4_shared folder=weights/ovi accumulate=8

    Hardware: 8 GPUs of 40 GB or more (--dry-run: 24 GiB each beside the allocator's and NCCL's own). Work: as dmd4.
    Time and number reached: not yet run.
    """
    # LightX2V's rates of adapters for joint audio-video DMD
    config = shared(dmd4(folder, prompts, model), optim=_moving(1e-4))
    critic = config.roles["fake_score"]
    roles = {**config.roles, "fake_score": Role(critic.model, _moving(2e-5))}
    return replace(config, roles=roles)


def self_forcing(
    folder: str = "weights/ovi", prompts: str = "prompts.txt", model: str = MODEL, begin: int | str = 1000
) -> TrainConfig:
    """Self-Forcing: a causal student makes the clip second after second, teacher and fake score see it whole (CausVid).

    torchrun --nnodes 2 --nproc-per-node 8 -m soundstage train soundstage.recipes.ovi:self_forcing folder=weights/ovi
    soundstage train soundstage.recipes.ovi:self_forcing --dry-run      what it takes

    Hardware: 16 GPUs of 80 GB or more (--dry-run: 41 GiB each beside the allocator's and NCCL's own; to this come 10.4
    GiB of keys and values of the clip so far, which it does not count). Work: 548 PFLOP per step of the first stage,
    141 of the second, 1.1 ZFLOP in all. Time and number reached: not yet run.

    begin: steps of the first stage, in which the student, begun with the teacher's weights, regresses the ends of the
    teacher's trajectories with every chunk at a level of its own; then distribution matching on what it makes itself.
    folder, prompts: as in dmd4. A causal student cannot share its teacher's base.
    """
    config = dmd4(folder, prompts, model)
    dmd: Any = config.objective
    pairs = Staggered(TIMES, substeps=4, sampler="dpmpp_2m", guidance=dmd.guidance)
    forcing = replace(dmd, rollout=SelfForcing(Rollout(TIMES)))
    first = int(begin)
    return replace(
        config,
        name="ovi-self-forcing",
        model=Backbone(model, folder, causal=CHUNKS),
        objective=Regression(pairs, dmd.tasks),
        steps=first + config.steps,
        stages=(Stage(first, {"objective": forcing}),),
        validate=judged(model, folder, STREAMED, Teacher(dmd.guidance, shift=SHIFT)),
    )


def pack(
    run: str | Path, folder: str | Path, recipe: TrainConfig | None = None, sampling: Sampling | None = None
) -> Path:
    """Write the averaged student of a run as Ovi is published; `generate --model ovi --weights FOLDER` runs it.

    sampling: SAMPLING, or STREAMED of a causal student, where it is not given.
    """
    recipe = dmd4() if recipe is None else recipe
    own = SAMPLING if backbone_of(recipe).causal is None else STREAMED
    return export_student(recipe, run, folder, own if sampling is None else sampling)
