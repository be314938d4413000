"""Training-time laws: which noise levels t a loss sees, per modality.

A law is a quantile function: uniform numbers u in (0, 1) to t in [0, 1]. So modalities that share their u share
their noise level in rank even where their laws differ, and every law has the same random input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.core.schedule import shift


class TimeLaw(Protocol):
    """u: any shape, in (0, 1); tokens: latent cells of one sample (F H W, or A). Returns t of the shape of u."""

    def __call__(self, u: Tensor, tokens: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """Uniform between low and high."""

    low: float = 0.0
    high: float = 1.0

    def __call__(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class LogitNormal:
    """sigmoid of a normal number (arXiv:2403.03206, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Mode:
    """Heavy tails and a mode in the middle (arXiv:2403.03206, eq. 20); scale in [-1, 2 / (pi - 2)], 0 = uniform."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ConfigError(f"Mode.scale: {self.scale} is not in [-1, {2 / (math.pi - 2):.3f}]")

    def __call__(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        return u - self.scale * (torch.sin(math.pi / 2 * u).square() - u)


@dataclass(frozen=True)
class Listed:
    """One of a list of levels, each as likely: the steps of a few-step student."""

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ConfigError(f"Listed.times: {self.times} must be at least one level in [0, 1]")

    def __call__(self, u: Tensor, tokens: int = 0) -> Tensor:  # noqa: ARG002
        levels = torch.tensor(sorted(self.times), dtype=u.dtype, device=u.device)
        return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]


@dataclass(frozen=True)
class TokenShift:
    """Shift factor exp(m), m linear in the token count: more tokens, more noise. The defaults are LTX-Video's.

    cells_per_token: latent cells in one token of the network (4 for a patch of 1 x 2 x 2).
    """

    low: tuple[int, float] = (1024, 0.95)
    high: tuple[int, float] = (4096, 2.05)
    cells_per_token: int = 1

    def __call__(self, cells: int) -> float:
        (n0, m0), (n1, m1) = self.low, self.high
        return math.exp(m0 + (m1 - m0) * (cells / self.cells_per_token - n0) / (n1 - n0))


@dataclass(frozen=True)
class Shifted:
    """Another law moved towards noise by a factor, fixed or from the token count."""

    law: TimeLaw
    by: float | TokenShift

    def __call__(self, u: Tensor, tokens: int = 0) -> Tensor:
        factor = self.by(tokens) if isinstance(self.by, TokenShift) else self.by
        return shift(self.law(u, tokens), factor)


@dataclass(frozen=True)
class Joint:
    """A law per modality; shared = one random number for both, so that they are noised alike."""

    laws: AV[TimeLaw]
    shared: bool = False

    def __call__(self, rng: Rng, x: AV[Tensor]) -> AV[Tensor]:
        """t per modality of x (B, C, ...): (B,) float32 on its device."""

        def draw(name: str, z: Tensor) -> Tensor:
            numbers = rng.fold("t") if self.shared else rng.fold("t", name)
            # uniform() has 24 bits: half a step up keeps u off 0, where a logit-normal would give exactly t = 0.
            u = numbers.uniform(dtype=torch.float64) + 2.0**-25
            return self.laws[name](u, math.prod(z.shape[2:])).to(device=z.device, dtype=torch.float32)

        return AV(**{name: draw(name, z) for name, z in x.items()})
