"""The order of data: a pure function of the seed and the position, so that resume needs only the position."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

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

    def at(self, positions: Tensor) -> Tensor:
        """(N,) int64 indices at these positions, in any order."""
        epochs = positions // self._num
        found = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            found[here] = self._shuffled(epoch)[positions[here] % self._num]
        return found

    def _shuffled(self, epoch: int) -> Tensor:
        held = self._epoch
        if held[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            held = self._epoch = (epoch, torch.randperm(self._num, generator=generator))
        return held[1]


class Interleaved:
    """Several endless streams as one, each by its share.

    A block holds the next units of every stream, of stream i floor((b + 1) rate_i) - floor(b rate_i) in block b, spread
    over it at random places by (seed, block) but evenly, each stream in its own order. So after any number of blocks
    stream i has given floor(blocks x rate_i), and what comes at a position is known without what came before.
    rates: exact; their sum, the size of a block, is at least 1.
    """

    def __init__(self, rates: Sequence[Fraction], seed: int = 0) -> None:
        self._rates, self._seed = tuple(rates), seed
        self._sum = sum(self._rates, Fraction(0))
        if min(self._rates) < 0 or self._sum < 1:
            raise ValueError(f"Interleaved: rates {[float(rate) for rate in rates]} do not make a block")
        self._block: tuple[int, Tensor, Tensor] = (-1, torch.empty(0), torch.empty(0))

    def take(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """(size,) streams and (size,) units within them, both int64, at `position` and after."""
        block, streams, units = self._at(position), [], []
        offset = position - self._before(block)
        while size > 0:
            which, unit = self._shuffled(block)
            streams.append(which[offset : offset + size])
            units.append(unit[offset : offset + size])
            size -= len(streams[-1])
            block, offset = block + 1, 0
        return torch.cat(streams), torch.cat(units)

    def counts(self, position: int) -> list[int]:
        """Units that each stream has given before `position`."""
        block = self._at(position)
        which, _ = self._shuffled(block)
        begun = torch.bincount(which[: position - self._before(block)], minlength=len(self._rates)).tolist()
        return [int(block * rate) + more for rate, more in zip(self._rates, begun, strict=True)]

    def _before(self, block: int) -> int:
        return sum(int(block * rate) for rate in self._rates)

    def _at(self, position: int) -> int:
        """The block that holds a position."""
        block = int(position / self._sum)  # no block before it does, since floors only lessen
        while self._before(block + 1) <= position:
            block += 1
        return block

    def _shuffled(self, block: int) -> tuple[Tensor, Tensor]:
        held = self._block
        if held[0] != block:
            spans = [torch.arange(int(block * rate), int((block + 1) * rate)) for rate in self._rates]
            which = torch.cat([torch.full((len(span),), i) for i, span in enumerate(spans)])
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + block) % 2**63)
            jitter = torch.rand(len(which), generator=generator, dtype=torch.float64)
            # the j-th of n units comes somewhere in the j-th of n parts of the block
            begin = torch.cat([torch.arange(len(span)) / max(1, len(span)) for span in spans]).double()
            width = torch.cat([torch.full((len(span),), 1 / max(1, len(span))) for span in spans]).double()
            mixed = torch.argsort(begin + jitter * width, stable=True)
            held = self._block = (block, which[mixed], torch.cat(spans)[mixed])
        return held[1], held[2]
