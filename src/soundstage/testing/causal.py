"""A causal toy: Gaussian chains, one step per chunk, with an exact teacher and a student that reads one chunk back.

What a student gets wrong in one chunk is what it reads in the next, so that errors add up along a clip, or do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.batch import Batch
from soundstage.core.causal import Cache, chunked
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.rng import Rng
from soundstage.testing.toy import QuickRng

GEOMETRY = AV(StreamGeometry(Fraction(1), 1, 1))
"""One latent step of one number in a second."""


@dataclass(frozen=True)
class Chain:
    """Denoiser, and data, of x_1 ~ N(0, 1), x_k = keep x_(k-1) + sqrt(1 - keep^2) N(0, 1).

    Video alone, latents (1, steps, 1, 1). The correlation of steps i and j is keep^|i - j|, and every step alone is
    standard normal. Exact for t (B,), one level for the whole clip.
    """

    steps: int = 6
    keep: float = 0.9

    def covariance(self) -> Tensor:
        """(steps, steps), in float64."""
        place = torch.arange(self.steps, dtype=torch.float64)
        return self.keep ** (place[:, None] - place).abs()

    def __call__(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,  # noqa: ARG002
    ) -> AV[Tensor]:
        """Exact velocity E[noise - x0 | x_t]: along each principal axis of the chain a number times x_t."""
        variance, axes = torch.linalg.eigh(self.covariance())
        x, level = x_t["video"].flatten(1), t["video"][:, None]
        variance, axes = variance.to(x), axes.to(x)
        gain = (level - (1 - level) * variance) / ((1 - level).square() * variance + level.square())
        return AV(((x @ axes * gain) @ axes.T).reshape(x_t["video"].shape))

    def sample(self, rng: Rng) -> AV[Tensor]:
        """One x0 per seed."""
        root = torch.linalg.cholesky(self.covariance()).float()
        return AV((rng.fold("chain").normal(self.steps) @ root.T)[:, None, :, None, None])

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch:
        """Training data: samples of step `step`, or one of `of` equal parts of them."""
        x0 = self.sample(QuickRng.of(step, size).fold("data"))
        return Batch(x0, Conditions(), ("",) * size).part(part, of)

    def distance(self, x: AV[Tensor]) -> float:
        """2-Wasserstein distance of the Gaussian with mean and covariance of x to the chain, per square root of a step.

        |mean|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the formula of the Fréchet distance.
        """
        flat = x["video"].detach().flatten(1).double()
        truth, found = self.covariance(), torch.cov(flat.T)
        root = _root(truth)
        apart = (truth + found - 2 * _root(root @ found @ root)).trace() + flat.mean(0).square().sum()
        return math.sqrt(max(0.0, float(apart) / self.steps))


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric matrix without negative eigenvalues."""
    values, axes = torch.linalg.eigh(matrix)
    return axes * values.clamp_min(0).sqrt() @ axes.T


@dataclass(frozen=True)
class CausalMLPConfig:
    """width, depth: of its hidden layers."""

    width: int = 64
    depth: int = 2

    def build(self) -> CausalMLP:
        """The network."""
        return CausalMLP(self)


class CausalMLP(nn.Module):
    """A Causal Denoiser of chains: (x, t) of a chunk and of the one before in, velocity out; a chunk is a step.

    The cache is the last chunk's (x, t) features, which are zeros before the first.
    """

    def __init__(self, config: CausalMLPConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.linspace(0, 1, 5))
        sizes = [2 * 12, *[config.width] * config.depth]
        self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(config.width, 1)

    def forward(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,  # noqa: ARG002
    ) -> AV[Tensor]:
        """Velocity of a whole clip, each chunk reading the one before as it is in x_t."""
        own = self._features(x_t, t)
        return self._velocity(own, torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1))

    def chunks(self, steps: AV[int]) -> tuple[AV[slice], ...]:
        """A chunk per step."""
        return chunked(GEOMETRY, steps, Fraction(1))

    def extend(
        self,
        cache: Cache,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,  # noqa: ARG002
    ) -> tuple[AV[Tensor], Cache]:
        """Velocity of the next chunk, and the cache with it."""
        own = self._features(x_t, t)
        before = cache.layers[0] if cache.layers else torch.zeros_like(own)
        done = cache.steps["video"] if cache.layers else 0
        return self._velocity(own, before), Cache(AV(done + 1), (own,))

    def _features(self, x_t: AV[Tensor], t: AV[Tensor]) -> Tensor:
        """(B, F, 12): the number, waves of t, and a one that tells a chunk from nothing."""
        x, level = x_t["video"].flatten(1), t["video"]
        level = (level[:, None] if level.ndim == 1 else level).expand_as(x).to(x.dtype)[..., None]
        frequencies: Tensor = self.frequencies  # type: ignore[assignment]
        phase = level * frequencies
        return torch.cat([x[..., None], phase.cos(), phase.sin(), torch.ones_like(level)], dim=-1)

    def _velocity(self, own: Tensor, before: Tensor) -> AV[Tensor]:
        h = torch.cat([own, before], dim=-1)
        for block in self.blocks:
            h = nn.functional.silu(block(h))
        return AV(self.out(h).mT[..., None, None])
