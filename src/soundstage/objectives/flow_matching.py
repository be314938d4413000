"""Flow matching on every task at once: velocity regression where a clip is generated, the rest given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Losses
from soundstage.core.flow import noised, velocity
from soundstage.core.rng import Rng
from soundstage.core.times import Joint, LogitNormal
from soundstage.objectives.base import Batch, Nets, mean_where, report
from soundstage.objectives.tasks import draw


@dataclass(frozen=True)
class FlowMatching:
    """Mean squared error of the student's velocity (arXiv:2210.02747), terms "flow/video" and "flow/audio".

    times: law of the noise levels, per modality. tasks: names in objectives.tasks.TASKS to probabilities.
    drop_text: probability that a sample's text is dropped, for guidance. given_noise: what is given carries noise of a
    level t ~ U(0, given_noise), and says so, so that a2v and v2a neither freeze nor copy artefacts of the codec.
    bins: noise-level bins of the reports "flow/video/t0.00-0.25".

    A given latent step has its own t; given cells inside a generated step stay on the path at the step's t, as
    `Known` leaves them. The loss of a sample is its mean over what is generated; a term is the mean over the samples
    that generate its modality.
    """

    times: Joint = field(default_factory=lambda: Joint(AV(LogitNormal(), LogitNormal())))
    tasks: Mapping[str, float] = field(default_factory=lambda: {"t2av": 1.0})
    drop_text: float = 0.1
    given_noise: float = 0.1
    bins: int = 4

    def turn(self, step: int) -> tuple[str, ...]:  # noqa: ARG002
        """Only the student moves."""
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms and reports by noise level of one batch; pure given rng."""
        masks, _ = draw(self.tasks, batch.x0, rng.fold("tasks"))
        x0 = batch.x0.only(*masks.modalities)
        device = next(x0.values()).device
        masks = masks.map(lambda mask: mask.to(device))
        level = self.times(rng.fold("times"), x0).to(device)
        given = masks.map(lambda _, t: torch.zeros_like(t), level) if not self.given_noise else self._given(x0, rng)
        t = masks.map(_per_step, level, given)
        noise = rng.fold("noise").normal_like(x0)
        cond = self._condition(batch.cond, x0, rng)
        v = nets[role](noised(x0, noise, t), t, cond)
        return self._terms((v - velocity(x0, noise)).map(lambda error: error.float() ** 2), masks, level)

    def _given(self, x0: AV[Tensor], rng: Rng) -> AV[Tensor]:
        draws = rng.fold("given")
        return AV(**{name: (draws.fold(name).uniform() * self.given_noise).to(x.device) for name, x in x0.items()})

    def _condition(self, cond: Conditions, x0: AV[Tensor], rng: Rng) -> Conditions:
        """The conditions of the modalities present, text dropped from some samples."""
        cond = cond.only(*x0.modalities)
        if not self.drop_text or cond.text is None:
            return cond
        return cond.drop("text", rng.fold("drop_text").uniform() < self.drop_text)

    def _terms(self, errors: AV[Tensor], masks: AV[Tensor], level: AV[Tensor]) -> Losses:
        terms: Losses = {}
        reports: Losses = {}
        edges = torch.linspace(0, 1, self.bins + 1).tolist()
        for name, error in errors.items():
            keep = spread(masks[name], error).expand_as(error).to(error.dtype).flatten(1)
            count = keep.sum(1)
            values = (error.flatten(1) * keep).sum(1) / count.clamp_min(1)
            generated, t = count > 0, level[name]
            terms[f"flow/{name}"] = mean_where(values, generated)
            for low, high in pairwise(edges):
                inside = generated & (t >= low) & ((t < high) if high < 1 else (t <= high))
                reports[f"flow/{name}/t{low:.2f}-{high:.2f}"] = report(values, inside)
        return terms | reports


def _per_step(mask: Tensor, level: Tensor, given: Tensor) -> Tensor:
    """(B,) noise levels where the mask covers a modality whole, else (B, F): the given level where a step is given."""
    if mask.ndim > 2:
        mask = mask.any(dim=(1, 3, 4) if mask.ndim == 5 else 1)
    t = torch.where(mask, level[:, None], given[:, None])
    return t[:, 0] if t.shape[1] == 1 else t
