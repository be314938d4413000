"""Toy parts for tests: a network that is a Denoiser in milliseconds, and any recipe cut down to CPU seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.av import AV, spread
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.rng import Rng
from soundstage.training.config import TrainConfig


class ToyDenoiser(nn.Module):
    """A per-cell residual network in (x_t, t); it reads no conditions. Works for any modality and length."""

    def __init__(self, channels: AV[int], width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict({name: nn.Linear(c + 1, width) for name, c in channels.items()})
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outputs = nn.ModuleDict({name: nn.Linear(width, c) for name, c in channels.items()})
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,  # noqa: ARG002
        *,
        r: AV[Tensor] | None = None,  # noqa: ARG002
    ) -> AV[Tensor]:
        """Velocity of every modality present."""
        return AV(**{name: self._one(name, x, t[name]) for name, x in x_t.items()})

    def _one(self, name: str, x: Tensor, t: Tensor) -> Tensor:
        times = spread(t.to(x.dtype), x).expand(x.shape[0], 1, *x.shape[2:])
        h = self.inputs[name](torch.cat([x, times], dim=1).movedim(1, -1))
        for block in self.blocks:
            h = h + self.dropout(torch.tanh(block(h)))
        return self.outputs[name](h).movedim(-1, 1)


@dataclass(frozen=True)
class ToyConfig:
    """Size of a ToyDenoiser."""

    channels: AV[int] = field(default_factory=lambda: AV(2, 3))
    width: int = 16
    depth: int = 2
    dropout: float = 0.0

    def build(self) -> ToyDenoiser:
        """The network."""
        return ToyDenoiser(self.channels, self.width, self.depth, self.dropout)


@dataclass(frozen=True)
class GaussianLatents:
    """Data whose latents are N(mean, std^2) in every element: flow matching on it has a closed form."""

    shape: AV[tuple[int, ...]] = field(default_factory=lambda: AV((2, 3, 2, 2), (3, 5)))
    mean: float = 0.0
    std: float = 1.0
    seed: int = 0

    def build(self) -> GaussianLatents:
        """Itself: there is nothing to allocate."""
        return self

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch:
        """Samples step * size onwards, or one of `of` equal parts of them."""
        rng = Rng.of(self.seed, size, start=step * size).fold("latents")
        x0 = self.shape.map(lambda shape: torch.zeros(size, *shape))
        noise = rng.normal_like(x0)
        ids = tuple(str(step * size + i) for i in range(size))
        return Batch(noise * self.std + self.mean, Conditions(), ids).part(part, of)


def tiny(config: TrainConfig, out: Path, steps: int = 2, **changes: Any) -> TrainConfig:  # noqa: ANN401
    """Any recipe with `steps` steps, batches of 2 and no validation, writing to `out`; more by `changes`."""
    small = {"batch_size": 2, "accumulate": 1, "log_every": 1, "save_every": steps, "validate": None, "stages": ()}
    return replace(config, steps=steps, **{**small, "out": str(out), **changes})
