"""The path x_t = (1 - t) x0 + t noise (rectified flow, arXiv:2209.03003) and its conversions.

All take and return AV; t is per modality, per sample (B,) or per latent step (B, F).
"""

from __future__ import annotations

from torch import Tensor

from soundstage.core.av import AV


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
