"""How the recipes judge what a student makes: clips of fixed prompts and seeds, and whether their sound is in step."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soundstage.core.av import AV, collate
from soundstage.core.causal import WAYS
from soundstage.core.flow import ToData
from soundstage.core.rng import Rng
from soundstage.core.schedule import explicit, shifted
from soundstage.core.system import Sampling
from soundstage.media.clip import Clip
from soundstage.media.sync import clip_offset
from soundstage.recipes.published import Codec, frame_rate
from soundstage.training.state import Validation
from soundstage.training.vitals import Vitals

ACCEPTED = 90.0
"""Milliseconds of offset that viewers accept, sound early (ITU-R BT.1359)."""


@dataclass(frozen=True)
class InStep:
    """Mean confidence that a clip's sound and picture are within 90 ms of each other, 0 to 1; see media.sync."""

    fps: Fraction
    sample_rate: int = 16000

    def __call__(self, media: AV[Tensor]) -> float:
        """media: video (B, 3, F, H, W), audio (B, channels, N) in [-1, 1]; 0 for clips of one modality."""
        if set(media.modalities) != {"video", "audio"}:
            return 0.0
        return float(np.mean([self._one(*pair) for pair in zip(media["video"], media["audio"], strict=True)]))

    def _one(self, video: Tensor, wave: Tensor) -> float:
        pictures = ((video.float().permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        clip = Clip(pictures.cpu().numpy(), self.fps, wave.float().cpu().numpy(), self.sample_rate)
        found = clip_offset(clip)
        return found.confidence if abs(found.ms) <= ACCEPTED else 0.0


@dataclass(frozen=True)
class Shown:
    """Media of the first samples of a run's data, decoded by a published model's codec. role: who makes them.

    sampling: how that role is asked; guidance: of a teacher, (teacher, conditions) -> Denoiser.
    """

    role: str
    model: str
    folder: str
    sampling: Sampling
    guidance: Any = None
    samples: int = 8

    @torch.no_grad()
    def __call__(self, validation: Validation) -> AV[Tensor]:
        """One sample at a time, as memory may want it; on the CPU."""
        data = validation.config.data.build()
        codec = Codec(self.model, self.folder).build().to(validation.device)
        network: Any = validation.student if self.role == "student" else validation.nets[self.role]
        made = []
        for index in range(self.samples):
            batch = data.batch(index, 1).to(validation.device)
            rng = Rng.of(index, 1).fold("shown")
            noise = rng.fold("start").normal_like(batch.x0)
            denoiser = ToData(network) if self.sampling.flow_map else network
            if self.guidance is not None:
                denoiser = self.guidance(denoiser, batch.cond)
            sample = WAYS[self.sampling.sampler]
            x0 = sample(denoiser, noise, self._times(noise), batch.cond, rng=rng.fold("sampler"))
            media = codec.decode(x0)
            made.append(media.map(lambda x: x[0].float().cpu()))
        return collate(made)

    def _times(self, noise: AV[Tensor]) -> AV[Tensor]:
        told = self.sampling
        grid = shifted(told.steps, told.shift) if told.times is None else explicit(told.times)
        return grid.only(*noise.modalities)


@dataclass(frozen=True)
class Teacher:
    """How a published teacher is sampled to be compared with."""

    guidance: Any
    steps: int = 50
    shift: AV[float] = field(default_factory=lambda: AV(5.0, 5.0))


def judged(model: str, folder: str, sampling: Sampling, teacher: Teacher, samples: int = 8) -> Vitals:
    """The validation of a published model's student: vital signs beside its teacher's, and whether sound is in step.

    Raises ConfigError for a model that is not known.
    """
    many = Sampling("unipc", teacher.steps, teacher.shift)
    return Vitals(
        Shown("student", model, folder, sampling, samples=samples),
        Shown("teacher", model, folder, many, teacher.guidance, samples),
        sync=InStep(frame_rate(model)),
    )
