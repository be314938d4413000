"""Recipes that make Wan few-step students, by four methods; picture only.

soundstage train soundstage.recipes.wan:dmd4 folder=weights/wan prompts=prompts.txt
soundstage train soundstage.recipes.wan:rcm4 folder=weights/wan clips=clips
soundstage train soundstage.recipes.wan:meanflow folder=weights/wan clips=clips
soundstage train soundstage.recipes.wan:progressive_16_8_4 folder=weights/wan clips=clips
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from soundstage.core.av import AV
from soundstage.core.schedule import shifted
from soundstage.core.system import Sampling
from soundstage.core.times import Joint, LogitNormal
from soundstage.data.folder import Folder
from soundstage.data.latents import Latents
from soundstage.data.prompts import Prompts
from soundstage.data.records import ClipShape
from soundstage.models.ovi import WAN_NEGATIVE, WAN_RULES
from soundstage.objectives.consistency import ContinuousConsistency
from soundstage.objectives.dmd import DMD, Guidance, score_times
from soundstage.objectives.flow_map import Derivative, Grid, Sorted
from soundstage.objectives.mean_flow import MeanFlow
from soundstage.objectives.progressive import Gate, Progressive
from soundstage.objectives.rcm import RCM, Wandering
from soundstage.objectives.rollout import Rollout, warped
from soundstage.recipes.published import (
    Agreement,
    Backbone,
    Codec,
    Negative,
    Texts,
    export_student,
    frame_rate,
    shape_of,
)
from soundstage.training.chain import Chain
from soundstage.training.config import Optim, Role, Stage, TrainConfig
from soundstage.training.parallel import Parallel

MODEL = "wan2.1-t2v-1.3b"
SHIFT = AV(5.0, 5.0)
STEPS = 4
TASKS = {"t2v": 1.0}
DMD_SCALE, RCM_SCALE, MEAN_FLOW_SCALE, PROGRESSIVE_SCALE = 4.0, 5.0, 3.0, 5.0
"""Guidance that is built in, as cond + (scale - 1) (cond - negative): Self-Forcing's, rCM's, FastGen's and Wan's."""


def renoising(scale: float) -> Sampling:
    """How students of DMD, rCM and MeanFlow are sampled: four calls at 1, 0.9375, 0.8333, 0.625, no guidance."""
    times = AV(video=(*warped(STEPS, SHIFT["video"])["video"], 0.0))
    return Sampling("renoise", STEPS, SHIFT, times=times, baked=AV(video=scale), tasks=("t2av", "t2v"))


def walking(steps: int = STEPS, scale: float = PROGRESSIVE_SCALE) -> Sampling:
    """How students of progressive distillation are sampled: the Euler steps that they were taught."""
    times = AV(video=tuple(shifted(steps, SHIFT)["video"].tolist()))
    return Sampling("euler", steps, SHIFT, times=times, baked=AV(video=scale), tasks=("t2av", "t2v"))


def _texts(model: str, folder: str) -> Texts:
    return Texts(model, folder, also=(WAN_NEGATIVE,))


def _guidance(model: str, folder: str, scale: float) -> Guidance:
    return Guidance(AV(scale, scale), Negative(AV(video=WAN_NEGATIVE), _texts(model, folder)))


def _clips(model: str, folder: str, clips: str) -> Latents:
    """The clips of a folder at the model's own size and length, encoded once."""
    rules, rate = WAN_RULES[model], frame_rate(model)
    shape = ClipShape(fps=rate, size=rules.size, num_frames=rules.frames)
    source = Folder(clips, modalities=("video",))
    return Latents(source, Codec(model, folder), _texts(model, folder), shape, batch_size=1)


def _run(name: str, model: str, folder: str, objective: Any, data: Any, **changes: Any) -> TrainConfig:  # noqa: ANN401
    """What the recipes share."""
    settings = {
        "name": f"wan-{name}",
        "model": Backbone(model, folder),
        "objective": objective,
        "data": data,
        "steps": 4000,
        "batch_size": 64,
        "roles": {"teacher": Role(Backbone(model, folder, "bf16"))},
        "precision": "bf16",
        "parallel": Parallel(checkpointing=True),
        "ema": 0.99,
        "save_every": 200,
    }
    return TrainConfig(**{**settings, **changes})


def _moving(lr: float) -> Optim:
    """Adam as published runs of DMD and rCM have it."""
    return Optim(lr=lr, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)


def _roles(model: str, folder: str, lr: float) -> dict[str, Role]:
    """Frozen teacher and fake score."""
    teacher = Role(Backbone(model, folder, "bf16"))
    return {"teacher": teacher, "fake_score": Role(Backbone(model, folder), _moving(lr))}


def dmd4(folder: str = "weights/wan", prompts: str = "prompts.txt", model: str = MODEL) -> TrainConfig:
    """DMD2 with backward simulation, from prompts alone.

    torchrun --nproc-per-node 8 -m soundstage train soundstage.recipes.wan:dmd4 folder=weights/wan accumulate=8
    soundstage train soundstage.recipes.wan:dmd4 --dry-run      what it takes

    Hardware: 8 GPUs of 24 GB or more (--dry-run: 17 GiB each beside the allocator's and NCCL's own). Work: 150 PFLOP
    per step, 601 EFLOP in all. Time and number reached: not yet run.
    """
    objective = DMD(
        Rollout(warped(STEPS, SHIFT["video"])), _guidance(model, folder, DMD_SCALE), score_times(SHIFT), TASKS
    )
    data = Prompts(prompts, _texts(model, folder), shape_of(model))
    # Self-Forcing's rates for 1.3 B
    return _run("dmd4", model, folder, objective, data, optim=_moving(2e-6), roles=_roles(model, folder, 4e-7))


def rcm4(folder: str = "weights/wan", clips: str = "clips", model: str = MODEL) -> TrainConfig:
    """rCM: continuous consistency and distribution matching, on encoded clips.

    torchrun --nproc-per-node 8 -m soundstage train soundstage.recipes.wan:rcm4 folder=weights/wan accumulate=8

    The derivative is a central difference in float32: forward mode would need attention of every pair of tokens in
    memory. Hardware: 8 GPUs of 40 GB or more (--dry-run: 17 GiB each without the float32 calls of the derivative).
    Work: 182 PFLOP per step, 728 EFLOP in all. Time and number reached: not yet run.
    """
    guidance = _guidance(model, folder, RCM_SCALE)
    law = LogitNormal(0.7, 1.6)  # rCM's p_G for 1.3 B, of tan(tau) = t / (1 - t)
    consistency = ContinuousConsistency(
        Joint(AV(law, law)), ramp=0.0, derivative=Derivative("difference"), guidance=guidance, tasks=TASKS
    )
    objective = RCM(consistency, DMD(Wandering(STEPS, SHIFT), guidance, score_times(SHIFT), TASKS))
    return _run(
        "rcm4",
        model,
        folder,
        objective,
        _clips(model, folder, clips),
        optim=_moving(2e-6),
        roles=_roles(model, folder, 4e-7),
        weights={"scm/video": 100.0},  # rCM's loss scale, beside 1 for distribution matching
        parallel=Parallel(checkpointing=True, gather="fp32"),
        stages=_ramp("objective.consistency.ramp", 1000),
    )


def meanflow(folder: str = "weights/wan", clips: str = "clips", model: str = MODEL) -> TrainConfig:
    """MeanFlow from the guided teacher: the student learns an embedding of t - r besides, and makes any jump.

    torchrun --nproc-per-node 8 -m soundstage train soundstage.recipes.wan:meanflow folder=weights/wan accumulate=8

    Hardware: 8 GPUs of 40 GB or more, as rcm4. Time and number reached: not yet run.
    """
    law = LogitNormal(-0.8, 1.6)  # with the rate, the step of the difference and the ramp: FastGen's for Wan
    objective = MeanFlow(
        Sorted(Joint(AV(law, law))),
        ramp=0.0,
        derivative=Derivative("difference", 5e-3),
        guidance=_guidance(model, folder, MEAN_FLOW_SCALE),
        tasks=TASKS,
    )
    config = _run(
        "meanflow",
        model,
        folder,
        objective,
        _clips(model, folder, clips),
        optim=Optim(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=1.0),
        parallel=Parallel(checkpointing=True, gather="fp32"),
        stages=_ramp("objective.ramp", 2000),
    )
    return replace(config, model=Backbone(model, folder, two_times=True))


def _ramp(setting: str, end: int, parts: int = 4) -> tuple[Stage, ...]:
    """The share of the derivative, raised from 0 to 1 in equal steps."""
    return tuple(Stage(end * i // parts, {setting: i / parts}) for i in range(1, parts + 1))


def progressive_16_8_4(folder: str = "weights/wan", clips: str = "clips", model: str = MODEL) -> Chain:
    """Progressive distillation in three links, 48 -> 16 -> 8 -> 4 steps; the teacher of each is the student before.

    torchrun --nproc-per-node 8 -m soundstage train soundstage.recipes.wan:progressive_16_8_4 folder=weights/wan

    Gate between the links: samples at the student's steps differ from the teacher's, from the same noise, by at most
    35 % of their root mean square; else the link goes on for half its steps, once, and then the chain stops and says
    so. The bound is a guess. Hardware: 8 GPUs of 24 GB or more, as dmd4. Time and number reached: not yet run.
    """
    guidance = _guidance(model, folder, PROGRESSIVE_SCALE)
    first = Progressive(Grid(16, SHIFT), 3, guidance=guidance, tasks=TASKS)
    run = _run(
        "progressive",
        model,
        folder,
        first,
        _clips(model, folder, clips),
        steps=2000,
        optim=Optim(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup=100, clip=1.0),
        validate=Agreement(16, 3, SHIFT, guidance),
        validate_every=500,
    )
    halved = {
        str(steps): {
            "objective": Progressive(Grid(steps, SHIFT), 2, tasks=TASKS),
            "validate": Agreement(steps, 2, SHIFT),
        }
        for steps in (8, 4)
    }
    return Chain(run, {"16": {}, **halved}, Gate("gap", at_most=0.35))


def pack(run: str | Path, folder: str | Path, recipe: TrainConfig, sampling: Sampling) -> Path:
    """Write the averaged student of a run as Wan is published; `generate --model NAME --weights FOLDER` runs it.

    recipe: what was run, or the last link of a chain. sampling: `renoising(scale)` or `walking()`.
    """
    return export_student(recipe, run, folder, sampling)
