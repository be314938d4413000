"""Adversarial terms on the features of a denoiser: heads judge noised samples against noised data.

Diffusion GANs as in arXiv:2405.14867 (4.4) and arXiv:2403.12015; approximate R1 after arXiv:2501.08316 (3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.denoiser import Losses
from soundstage.core.errors import ConfigError
from soundstage.core.features import tap
from soundstage.core.flow import noised
from soundstage.core.rng import Rng
from soundstage.core.times import Joint, Uniform
from soundstage.objectives.base import Nets, mean_where
from soundstage.objectives.rollout import Given

__all__ = ["GAN", "approximate_r1", "non_saturating", "told_apart"]


def non_saturating(fake: Tensor) -> Tensor:
    """(B,) loss of the student, softplus(-D(fake)) (arXiv:1406.2661, section 3); fake: logits (B, N)."""
    return F.softplus(-fake).mean(1)


def told_apart(real: Tensor, fake: Tensor) -> Tensor:
    """(B,) loss of the heads, softplus(D(fake)) + softplus(-D(real)); real, fake: logits (B, N)."""
    return (F.softplus(fake) + F.softplus(-real)).mean(1)


def approximate_r1(real: Tensor, moved: Tensor, alpha: float) -> Tensor:
    """(B,) estimate of |grad D|^2: squared change of the logits (B, N) by noise of size alpha, over alpha^2."""
    return ((moved - real) / alpha).square().mean(1)


@dataclass(frozen=True)
class GAN:
    """Terms "gan/video" of the student, "discriminator/video" and "r1/video" of the heads; the same for audio.

    taps: submodules of the features' network the heads read. nets["discriminator"](features, weights) -> logits:
        features by name of tap, weights per modality (B, R, F, H, W) or (B, R, A), how much each latent cell counts in
        each of R regions; logits per modality (B, N).
    features: whose they are: the frozen "teacher", or the "fake_score", which then learns the judgement too.
    times: levels at which samples are judged; a fake and a real sample share theirs. alpha: size of the noise added to
        the noised real sample for R1; 0 leaves R1 out. regions: inside and outside the conditions' mask are judged
        apart.
    """

    taps: tuple[str, ...]
    features: Literal["teacher", "fake_score"] = "teacher"
    times: Joint = field(default_factory=lambda: Joint(AV(Uniform(0.02, 0.98), Uniform(0.02, 0.98)), shared=True))
    alpha: float = 0.0
    regions: bool = False

    def __post_init__(self) -> None:
        if not self.taps:
            raise ConfigError("GAN.taps: name at least one block whose output the heads read")
        if self.features not in ("teacher", "fake_score"):
            raise ConfigError(f"GAN.features: {self.features!r} is not one of teacher, fake_score")
        if self.alpha < 0:
            raise ConfigError(f"GAN.alpha: {self.alpha} is below 0")

    def student(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Losses:
        """How far the samples x are from passing for data."""
        t = self.times(rng, x)
        fake = self.logits(nets, noised(x, rng.fold("noise").normal_like(x), t), t, given)
        return _terms("gan", fake.map(non_saturating), given)

    def judge(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Losses:
        """How badly samples x are told from the data of the batch."""
        _t, _, fake, real = self._both(nets, x, given, rng)
        return _terms("discriminator", real.map(told_apart, fake), given)

    def discriminator(self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng) -> Losses:
        """`judge`, and the penalty on how fast the heads change at the real samples."""
        t, real_t, fake, real = self._both(nets, x, given, rng)
        terms = _terms("discriminator", real.map(told_apart, fake), given)
        if not self.alpha:
            return terms
        # moved from the already noised sample, so that the change is the heads' and not the noise level's
        moved = self.logits(nets, real_t + self.alpha * rng.fold("r1").normal_like(real_t), t, given)
        return terms | _terms("r1", real.map(approximate_r1, moved, self.alpha), given)

    def logits(self, nets: Nets, x_t: AV[Tensor], t: AV[Tensor], given: Given) -> AV[Tensor]:
        """What the heads say of noised samples, per modality (B, N)."""
        network: Any = nets[self.features]
        with tap(network, self.taps) as features:
            given.around(network)(x_t, t, given.cond)
        return nets["discriminator"](features, self._weights(given))

    def _both(
        self, nets: Nets, x: AV[Tensor], given: Given, rng: Rng
    ) -> tuple[AV[Tensor], AV[Tensor], AV[Tensor], AV[Tensor]]:
        """t, the noised data, and the logits of noised samples and data."""
        t = self.times(rng, x)
        fake_t = noised(x, rng.fold("noise").normal_like(x), t)
        real_t = noised(given.x0, rng.fold("real").normal_like(x), t)
        return t, real_t, self.logits(nets, fake_t, t, given), self.logits(nets, real_t, t, given)

    def _weights(self, given: Given) -> AV[Tensor]:
        """Where samples are generated, (B, 1, F, ...); with regions cut by the conditions' mask into (B, 2, F, ...)."""

        def cut(name: str, keep: Tensor) -> Tensor:
            keep = keep[:, :1]
            mask = given.cond.mask if self.regions else None
            if mask is None or name not in mask:
                return keep
            inside = keep * spread(mask[name].to(keep), keep).amax(1, keepdim=True)
            return torch.cat([inside, keep - inside], dim=1)

        return AV(**{name: cut(name, keep) for name, keep in given.cells().items()})


def _terms(name: str, losses: AV[Tensor], given: Given) -> Losses:
    """Means over the samples that generate the modality."""
    generated = given.generated()
    return {f"{name}/{modality}": mean_where(loss, generated[modality]) for modality, loss in losses.items()}
