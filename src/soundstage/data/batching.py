"""The order of data: a pure function of the seed and the position, so that resume needs only the step."""

from __future__ import annotations

import torch
from torch import Tensor


class Order:
    """Every index below `num` once per epoch, each epoch shuffled by (seed, epoch)."""

    def __init__(self, num: int, seed: int = 0) -> None:
        self._num, self._seed = num, seed
        self._epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self._num

    def take(self, position: int, size: int) -> Tensor:
        """(size,) int64 indices at `position` and after, counted over all epochs."""
        parts = []
        while size > 0:
            epoch, offset = divmod(position, self._num)
            part = self._shuffled(epoch)[offset : offset + size]
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return torch.cat(parts)

    def _shuffled(self, epoch: int) -> Tensor:
        held = self._epoch
        if held[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            held = self._epoch = (epoch, torch.randperm(self._num, generator=generator))
        return held[1]
