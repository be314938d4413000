"""Rotary positions on several axes in physical units (arXiv:2104.09864), so that both modalities share seconds.

Shape letters: B batch, L tokens, N heads, K head width, P axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def axis_widths(head_width: int, axes: int) -> tuple[int, ...]:
    """Even widths per axis that add up to `head_width`: the first axis (time) takes what the others leave."""
    other = 2 * (head_width // (2 * (axes + 1)))
    return (head_width - other * (axes - 1), *(other,) * (axes - 1))


def angles(position_BLP: Tensor, head_width: int, shortest: tuple[float, ...], longest: tuple[float, ...]) -> Tensor:
    """Rotation angles (B, L, K/2) of positions on P axes.

    Wavelengths run geometrically from `shortest` to `longest` per axis, in that axis's unit (seconds, frame heights).
    """
    parts = []
    for axis, width in enumerate(axis_widths(head_width, position_BLP.shape[-1])):
        wavelengths = torch.logspace(
            math.log10(shortest[axis]), math.log10(longest[axis]), width // 2, device=position_BLP.device
        )
        parts.append(position_BLP[..., axis, None].float() * (2 * math.pi / wavelengths))
    return torch.cat(parts, dim=-1)


def rotate(x_BNLK: Tensor, angles_BLK: Tensor) -> Tensor:
    """Rotate the two halves of each head by the angles (B, L, K/2), in float32."""
    cos, sin = angles_BLK.cos()[:, None], angles_BLK.sin()[:, None]
    a, b = x_BNLK.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BNLK.dtype)
