"""`Batch`: what data hands to an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ShapeError


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
        """The `index`-th of `of` equal parts along B; raises ShapeError where B is no multiple of `of`."""
        where = share(len(self), index, of)
        return Batch(self.x0.map(lambda x: x[where]), self.cond.map(lambda x: x[where]), self.ids[where])


def share(num: int, part: int, of: int) -> slice:
    """Where the `part`-th of `of` equal parts of `num` samples is; raises ShapeError where they are not equal."""
    if num % of:
        raise ShapeError(
            f"batch: {num} samples do not divide into {of} equal parts, for processes and accumulate; make batch_size, "
            f"and multiple= of buckets, a multiple of {of}"
        )
    return slice(part * num // of, (part + 1) * num // of)
