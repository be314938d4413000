"""Distillation in CPU seconds: exact mixture teachers, a small network, a training loop without files, and scores.

The problems are those of rings of Gaussian blobs: `ring()` is one modality, `rings()` two whose blobs are paired, so
that each modality alone says nothing about the pairing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.av import AV, spread
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.training.config import Optim
from soundstage.training.ema import Ema
from soundstage.training.engine import total
from soundstage.training.optim import Optimizer, rate


@dataclass(frozen=True)
class QuickRng(Rng):
    """`Rng` with one generator for the whole batch: far faster, but a sample's numbers depend on its place in it."""

    @classmethod
    def of(cls, seed: int, batch: int, start: int = 0) -> QuickRng:
        """A batch of a run with this seed; only its first sample's number counts."""
        first = Rng.of(seed, 1, start).seeds[0]
        return cls(tuple(range(first, first + batch)), run=seed)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """(B, *shape) standard normal."""
        return torch.randn(len(self), *shape, generator=self._generator("normal")).to(device=device, dtype=dtype)

    def uniform(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """(B, *shape) uniform in [0, 1)."""
        return torch.rand(len(self), *shape, generator=self._generator("uniform")).to(device=device, dtype=dtype)

    def integers(self, low: int, high: int, device: torch.device | str | None = None) -> Tensor:
        """(B,) int64 uniform in low, ..., high - 1."""
        return torch.randint(low, high, (len(self),), generator=self._generator("integers")).to(device=device)

    def _generator(self, kind: str) -> torch.Generator:
        first = Rng(self.seeds[:1], (*self.path, kind))
        return torch.Generator().manual_seed(int(first.integers(0, 2**62)))


@dataclass(frozen=True, eq=False)
class Blobs:
    """Denoiser, and data, of x0 ~ a mixture of equally likely Gaussians N(mean_k, std^2), in any dtype.

    means: per modality (K, C, F, H, W) or (K, C, A). Exact for any t per modality, (B,) or (B, F); a modality left out
    is marginalised. Unlike analytic.Mixture it needs no factorisation, so that it is fast enough to train against.
    """

    means: AV[Tensor]
    std: float

    def __call__(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,
    ) -> AV[Tensor]:
        """Exact velocity E[noise - x0 | x_t]; r must be None."""
        if r is not None:
            raise ConfigError("Blobs: has no closed-form flow map, r must be None")
        means = self.means.only(*x_t.modalities).map(lambda m, x: m.to(x), x_t)
        level = x_t.map(lambda x, s: spread(s.to(x.dtype), x), t)
        variance = level.map(lambda s: (1 - s).square() * self.std**2 + s.square())
        centred = x_t.map(lambda x, m, s: x[:, None] - (1 - s)[:, None] * m, means, level)
        distances = centred.map(lambda c, var: (c.square() / var[:, None]).flatten(2).sum(2), variance)
        share = (-0.5 * torch.stack(list(distances.values())).sum(0)).softmax(1)

        def velocity(c: Tensor, m: Tensor, s: Tensor, var: Tensor) -> Tensor:
            weight = share.reshape(*share.shape, *(1,) * (m.ndim - 1))
            mean, residual = (weight * m).sum(1), (weight * c).sum(1) / var
            return (s - (1 - s) * self.std**2) * residual - mean

        return centred.map(velocity, means, level, variance)

    def sample(self, rng: Rng) -> AV[Tensor]:
        """One x0 per seed."""
        k = rng.fold("blob").integers(0, len(next(self.means.values())))
        centres = self.means.map(lambda m: m[k])
        return centres + self.std * rng.fold("inside").normal_like(centres)

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch:
        """Training data: samples of step `step`, or one of `of` equal parts of them."""
        x0 = self.sample(QuickRng.of(step, size).fold("data"))
        return Batch(x0, Conditions(), ("",) * size).part(part, of)

    def build(self) -> Blobs:
        """Itself, both as data and as a teacher that needs no weights."""
        return self

    def nearest(self, x: AV[Tensor]) -> AV[Tensor]:
        """(B,) index of the nearest mean, each modality by itself."""
        means = self.means.only(*x.modalities)
        return x.map(lambda z, m: torch.cdist(z.flatten(1), m.to(z).flatten(1)).argmin(1), means)

    def product(self) -> Blobs:
        """The product of the marginals: every blob of one modality with every blob of the other."""
        one, two = self.means["video"], self.means["audio"]
        return Blobs(AV(one.repeat_interleave(len(two), 0), two.repeat(len(one), *(1,) * (two.ndim - 1))), self.std)


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.15) -> Blobs:
    """Blobs on a circle; video alone, latents (2, 1, 1, 1)."""
    return Blobs(AV(_circle(modes, radius)[:, :, None, None, None]), std)


def rings(modes: int = 8, radius: float = 2.0, std: float = 0.15) -> Blobs:
    """Two rings: video (2, 1, 1, 1) in blob k goes with audio (2, 1) in blob 3 k + 1 (mod `modes`, coprime to 3)."""
    circle = _circle(modes, radius)
    partner = (3 * torch.arange(modes) + 1) % modes
    return Blobs(AV(circle[:, :, None, None, None], circle[partner][:, :, None]), std)


def _circle(modes: int, radius: float) -> Tensor:
    angle = 2 * math.pi * torch.arange(modes) / modes
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True)
class JointMLPConfig:
    """shape: latents per modality. octaves: the time features reach frequency 2^octaves pi / 2.

    Low frequencies keep d/dt tame, which every method with a derivative in t needs.
    """

    shape: AV[tuple[int, ...]] = field(default_factory=lambda: AV((2, 1, 1, 1)))
    width: int = 64
    depth: int = 3
    octaves: float = 1.0

    def build(self) -> JointMLP:
        """The network."""
        return JointMLP(self)


class JointMLP(nn.Module):
    """A Denoiser that reads all latents at once: (x, t, t - r) of both modalities in, velocity out.

    An absent modality enters as zeros at t = 0. With r = t the span adds exactly nothing. Hidden layers: blocks.0 ...
    """

    def __init__(self, config: JointMLPConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [math.prod(shape) for shape in config.shape.values()]
        steps = sum(shape[1] for shape in config.shape.values())
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.linspace(0, config.octaves, 5))
        self.enter = nn.Linear(sum(sizes) + 10 * steps, config.width)
        self.span = nn.Linear(10 * steps, config.width, bias=False)
        nn.init.zeros_(self.span.weight)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth - 1))
        self.out = nn.Linear(config.width, sum(sizes))

    def forward(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,
    ) -> AV[Tensor]:
        """Velocity of every modality present; t and r per modality (B,) or (B, F)."""
        h = self.enter(torch.cat([self._cells(x_t), self._waves(self._levels(x_t, t))], dim=1))
        if r is not None:
            lapse = self._levels(x_t, t) - self._levels(x_t, r)
            h = h + self.span(self._waves(lapse) - self._waves(torch.zeros_like(lapse)))
        for block in self.blocks:
            h = block(nn.functional.silu(h))
        parts = self.out(nn.functional.silu(h)).split([math.prod(s) for s in self.config.shape.values()], dim=1)
        flat = dict(zip(self.config.shape.modalities, parts, strict=True))
        return AV(**{name: flat[name].reshape(x.shape) for name, x in x_t.items()})

    def _cells(self, x_t: AV[Tensor]) -> Tensor:
        like = next(x_t.values())
        rows = {
            n: x_t[n].flatten(1) if n in x_t else like.new_zeros(len(like), math.prod(s))
            for n, s in self.config.shape.items()
        }
        return torch.cat(list(rows.values()), dim=1)

    def _levels(self, x_t: AV[Tensor], t: AV[Tensor]) -> Tensor:
        """(B, steps of all modalities)."""
        like = next(x_t.values())

        def one(name: str, steps: int) -> Tensor:
            if name not in x_t:
                return like.new_zeros(len(like), steps)
            level = t[name].to(like.dtype)
            return (level[:, None] if level.ndim == 1 else level).expand(-1, steps)

        return torch.cat([one(name, shape[1]) for name, shape in self.config.shape.items()], dim=1)

    def _waves(self, t: Tensor) -> Tensor:
        frequencies: Tensor = self.frequencies  # type: ignore[assignment]
        phase = t[..., None] * frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=-1).flatten(1)


class Heads(nn.Module):
    """A discriminator for a JointMLP: two layers per modality and tap on hidden values (B, width)."""

    def __init__(self, names: tuple[str, ...] = ("video",), taps: int = 1, width: int = 64) -> None:
        super().__init__()

        def head() -> nn.Module:
            return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

        self.heads = nn.ModuleDict({name: nn.ModuleList(head() for _ in range(taps)) for name in names})

    def forward(self, features: Mapping[str, Tensor], weights: AV[Tensor]) -> AV[Tensor]:
        """Logits per modality (B, taps); a toy has one cell, so its weights say nothing."""
        parts = {name: zip(self.heads[name], features.values(), strict=True) for name in weights.modalities}  # type: ignore[call-overload]
        return AV(**{name: torch.cat([head(h) for head, h in pairs], dim=1) for name, pairs in parts.items()})


def fit(
    objective: Any,  # noqa: ANN401
    nets: Mapping[str, Any],
    optims: Mapping[str, Optim],
    data: Any,  # noqa: ANN401
    steps: int,
    *,
    batch: int = 256,
    weights: Mapping[str, float] | None = None,
    ema: float | None = 0.99,
    seed: int = 0,
) -> Any:  # noqa: ANN401
    """The body of the engine's loop without its files: trains `nets` in place, returns the (averaged) student.

    nets: role to network; optims: of the roles that move. The average is folded in after each of the student's steps.
    """
    torch.manual_seed(seed)
    for role in optims:
        nets[role].requires_grad_(True)
    optimizers = {role: Optimizer(nets[role], optim) for role, optim in optims.items()}
    average = Ema(nets["student"], ema) if ema is not None else None
    moved = 0
    for step in range(steps):
        for role in objective.turn(step):
            for name, optimizer in optimizers.items():
                for parameter in optimizer.parameters:
                    parameter.requires_grad_(name == role)
            rng = QuickRng.of(seed, batch).fold("step", step, role)
            total(objective.loss(role, nets, data.batch(step, batch), rng), weights or {}).backward()
            optimizers[role].clip()
            optimizers[role].step(rate(optims[role], step, steps))
            if role == "student" and average is not None:
                average.update(nets["student"], moved)
                moved += 1
    return average.module if average else nets["student"]


def sliced_wasserstein(a: AV[Tensor], b: AV[Tensor], projections: int = 64) -> float:
    """Sliced 2-Wasserstein distance of two samples of the same size, over all modalities together.

    Root mean square, over fixed random directions, of the distance between the sorted projections.
    """
    x, y = (torch.cat([z.detach().flatten(1).double() for z in side.values()], dim=1) for side in (a, b))
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(
        torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64), dim=0
    )
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).square().mean().sqrt())


def agreement(x: AV[Tensor], truth: Blobs) -> float:
    """Share of samples whose video and audio lie nearest to blobs that belong together; chance is 1 / their number."""
    nearest = truth.nearest(x)
    return float((nearest["video"] == nearest["audio"]).float().mean())


def imbalance(x: AV[Tensor], truth: Blobs) -> float:
    """Total variation between the shares of the blobs and equal shares, worst modality; 1 - 1/K = one blob alone."""
    count = len(next(truth.means.values()))
    shares = [k.bincount(minlength=count).double() / len(k) for k in truth.nearest(x).values()]
    return max(float((share - 1 / count).abs().sum() / 2) for share in shares)
