"""`Batch`: what data hands to an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples. x0: latents, or media where a codec is trained. ids: one name per sample, for reports."""

    x0: AV[Tensor]
    cond: Conditions
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return self.x0.batch

    def to(self, *args: Any, **kwargs: Any) -> Batch:  # noqa: ANN401
        """Tensor.to on latents and conditions. Give a device, not a dtype: token ids keep theirs."""
        return Batch(self.x0.to(*args, **kwargs), self.cond.to(*args, **kwargs), self.ids)

    def part(self, index: int, of: int) -> Batch:
        """The `index`-th of `of` equal parts along B; B must be a multiple of `of`."""
        size = len(self) // of
        where = slice(index * size, (index + 1) * size)
        return Batch(self.x0.map(lambda x: x[where]), self.cond.map(lambda x: x[where]), self.ids[where])
