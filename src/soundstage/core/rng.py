"""Random numbers per sample: the same alone and in a batch, on every device, in any order of drawing.

Nothing is consumed: a draw is a function of (seed of the sample, path, kind), so what one part of a program draws
never moves the numbers of another. Two draws of the same kind on the same path are the same numbers; `fold` a name
or a step to get others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.errors import ShapeError


@dataclass(frozen=True)
class Rng:
    """One seed per sample and a path of names; every draw has a leading axis B = len(seeds). run: seed of them all."""

    seeds: tuple[int, ...]
    path: tuple[str | int, ...] = ()
    run: int = 0

    @classmethod
    def of(cls, seed: int, batch: int, start: int = 0) -> Rng:
        """Samples start, ..., start + batch - 1 of a run with this seed."""
        return cls(tuple(_digest(seed, start + i) for i in range(batch)), run=seed)

    def everywhere(self) -> Rng:
        """One stream for the whole run: the same in every micro-batch and on every process, along the same path."""
        return replace(self, seeds=(_digest(self.run, "everywhere"),))

    def fold(self, *names: str | int) -> Rng:
        """Independent numbers for a purpose or a step: rng.fold("noise"), rng.fold("step", 3)."""
        return replace(self, path=self.path + tuple(name if isinstance(name, str) else int(name) for name in names))

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """(B, *shape) standard normal, drawn on the CPU in float32, then converted and moved."""
        return self._draw("normal", lambda g: torch.randn(shape, generator=g)).to(device=device, dtype=dtype)

    def uniform(
        self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """(B, *shape) uniform in [0, 1), drawn on the CPU in float32, then converted and moved."""
        return self._draw("uniform", lambda g: torch.rand(shape, generator=g)).to(device=device, dtype=dtype)

    def integers(self, low: int, high: int, device: torch.device | str | None = None) -> Tensor:
        """(B,) int64 uniform in low, ..., high - 1."""
        return self._draw("integers", lambda g: torch.randint(low, high, (), generator=g)).to(device=device)

    def normal_like(self, x: AV[Tensor]) -> AV[Tensor]:
        """Standard normal of the shape, type and device of x, independent between modalities.

        Raises ShapeError when x has another number of samples.
        """
        if x.batch != len(self):
            raise ShapeError(f"{len(self)} seeds do not fit a batch of {x.batch}: use Rng.of(seed, {x.batch})")
        return AV(**{n: self.fold(n).normal(*z.shape[1:], dtype=z.dtype, device=z.device) for n, z in x.items()})

    def _draw(self, kind: str, fn: Callable[[torch.Generator], Tensor]) -> Tensor:
        generators = (torch.Generator().manual_seed(_digest(seed, *self.path, kind)) for seed in self.seeds)
        return torch.stack([fn(generator) for generator in generators])


def _digest(*parts: str | int) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
