"""Wan's rotary positions (arXiv:2104.09864): neighbouring elements are a pair, positions are latent steps.

Shape letters: B batch, L tokens, N heads, K head width, P axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

THETA = 10000.0


def axis_pairs(head_width: int) -> tuple[int, int, int]:
    """Pairs of a head that carry time, height and width; time takes what the others leave."""
    side = head_width // 6
    return head_width // 2 - 2 * side, side, side


def rotations(
    grid: tuple[int, ...],
    head_width: int,
    scale: float = 1.0,
    device: torch.device | str | None = None,
    start: int = 0,
) -> Tensor:
    """Cosine and sine (L, K/2, 2) of every token of a grid (F, H, W) or (A,), in float64.

    Pair j of an axis of n pairs turns by position * 10000^(-j/n). scale: of the position in time. start: position of
    the first step. A grid without height and width leaves their pairs as they are.
    """
    count = math.prod(grid)
    parts = []
    for axis, pairs in enumerate(axis_pairs(head_width)):
        if axis >= len(grid):
            parts.append(unturned(*grid, pairs, device=device))
            continue
        frequencies = THETA ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        first = start if axis == 0 else 0
        positions = torch.arange(first, first + grid[axis], dtype=torch.float64, device=device)
        angles = (positions * (scale if axis == 0 else 1.0))[:, None] * frequencies
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
        shape = [n if i == axis else 1 for i, n in enumerate(grid)]
        parts.append(table.reshape(*shape, pairs, 2).expand(*grid, pairs, 2))
    return torch.cat(parts, dim=-2).reshape(count, head_width // 2, 2)


def unturned(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """Cosine 1 and sine 0 (*shape, 2) in float64, made on the device so that nothing waits for it."""
    ones = torch.ones(shape, dtype=torch.float64, device=device)
    return torch.stack([ones, torch.zeros_like(ones)], dim=-1)


def rotate(x_BLNK: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of x by its angle; rotation (1 or B, L, 1, K/2, 2) as cosine and sine, of the type of x."""
    pairs = x_BLNK.unflatten(-1, (-1, 2))
    if x_BLNK.dtype == rotation.dtype == torch.float32 and not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotation)  # one kernel; compilers know no complex
        return torch.view_as_real(turned).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
