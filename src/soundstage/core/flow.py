"""The path x_t = (1 - t) x0 + t noise (rectified flow, arXiv:2209.03003) and its conversions.

All take and return AV; t is per modality, per sample (B,) or per latent step (B, F).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser


def noised(x0: AV[Tensor], noise: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
    """x_t = (1 - t) x0 + t noise."""
    return x0 + t * (noise - x0)


def velocity(x0: AV[Tensor], noise: AV[Tensor]) -> AV[Tensor]:
    """v = noise - x0 = dx_t / dt."""
    return noise - x0


def to_x0(x_t: AV[Tensor], v: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
    """x0 = x_t - t v."""
    return x_t - t * v


def to_noise(x_t: AV[Tensor], v: AV[Tensor], t: AV[Tensor]) -> AV[Tensor]:
    """noise = x_t + (1 - t) v."""
    return x_t + (1.0 - t) * v


def from_x0(x_t: AV[Tensor], x0: AV[Tensor], t: AV[Tensor], floor: float = 1e-6) -> AV[Tensor]:
    """v = (x_t - x0) / t, with t held above `floor`."""
    return (x_t - x0) / t.map(lambda s: s.clamp_min(floor))


@dataclass(frozen=True, eq=False)
class ToData:
    """A flow map used as a few-step student: its velocity is the mean velocity from t down to clean data.

    So `renoise` samples it, and objectives that jump to x0 train it.
    """

    denoiser: Denoiser

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return self.denoiser(x_t, t, cond, r=t * 0.0 if r is None else r)
