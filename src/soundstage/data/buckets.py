"""Clips of several shapes: which a clip is shown in, and how many of each make a batch of one cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import sqrt

import numpy as np

from soundstage.core.errors import ConfigError
from soundstage.data.shapes import ClipShape

__all__ = ["Buckets"]


@dataclass(frozen=True)
class Buckets:
    """Shapes by aspect and length, of one area.

    area: pixels of a frame (None = those of the model's shape). aspects: width by height, "16:9". seconds: lengths; a
    clip is shown in windows of the longest that it holds. spatial, temporal: sides are multiples of `spatial` pixels
    and frames 1 + k x `temporal`, as the codec and the patches need. audio_tokens: per second, counted with the rest.
    multiple: batches hold a multiple of so many samples (processes x accumulate).
    """

    aspects: tuple[str, ...] = ("16:9", "4:3", "1:1", "3:4", "9:16")
    seconds: tuple[float, ...] = (2.0, 5.0, 10.0)
    area: int | None = None
    spatial: int = 16
    temporal: int = 4
    audio_tokens: float = 0.0
    multiple: int = 1

    def __post_init__(self) -> None:
        if not self.aspects or not self.seconds or min(self.seconds) <= 0:
            raise ConfigError("buckets: give at least one aspect and one length above 0 seconds")
        for aspect in self.aspects:
            _ratio(aspect)

    def shapes(self, like: ClipShape) -> tuple[ClipShape, ...]:
        """Every shape, shorter ones first; rates and channels are those of `like`. Two that come out alike are one."""
        area = self.area or like.size[0] * like.size[1]
        found = []
        for seconds in sorted(set(self.seconds)):
            steps = round(Fraction(str(seconds)) * like.rate) - 1
            frames = 1 + max(0, round(steps / self.temporal)) * self.temporal
            for aspect in self.aspects:
                found.append(replace(like, size=self._size(area, _ratio(aspect)), num_frames=frames, num_samples=None))
        return tuple(dict.fromkeys(found))

    def assign(
        self, shapes: Sequence[ClipShape], width: np.ndarray, height: np.ndarray, seconds: np.ndarray
    ) -> np.ndarray:
        """(N,) int64 number of the shape for each clip: the longest that fits, then the nearest aspect; -1 = none.

        seconds: what picture and sound both have. A stream may end half a frame early.
        """
        lengths = np.array([float(shape.seconds) for shape in shapes])
        aspect = np.log(np.array([shape.size[1] / shape.size[0] for shape in shapes]))
        slack = float(1 / shapes[0].rate) / 2
        fits = lengths[None] <= seconds[:, None] + slack
        longest = np.where(fits, lengths[None], -1.0).max(axis=1, initial=-1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            far = np.abs(np.log(width / height)[:, None] - aspect[None])
        far = np.where(np.isnan(far), 0.0, far)
        far[lengths[None] != longest[:, None]] = np.inf
        return np.where(longest > 0, far.argmin(axis=1), -1).astype(np.int64)

    def tokens(self, shape: ClipShape) -> float:
        """What a clip of this shape costs: latent steps x patches of the picture, and the steps of its sound."""
        steps = 1 + (shape.num_frames - 1) // self.temporal
        return steps * (shape.size[0] * shape.size[1]) / self.spatial**2 + float(shape.seconds) * self.audio_tokens

    def batch_size(self, shape: ClipShape, like: ClipShape, size: int) -> int:
        """How many clips of this shape cost no more than `size` of the shape `like`; at least `multiple`."""
        num = int(size * self.tokens(like) / self.tokens(shape) + 1e-9)
        return max(self.multiple, num // self.multiple * self.multiple)

    def _size(self, area: int, ratio: float) -> tuple[int, int]:
        """The multiples nearest to this area and ratio."""
        height, width = sqrt(area / ratio), sqrt(area * ratio)
        return tuple(max(1, round(side / self.spatial)) * self.spatial for side in (height, width))  # type: ignore[return-value]


def _ratio(aspect: str) -> float:
    width, _, height = aspect.partition(":")
    try:
        return float(width) / float(height or 1)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"aspects: {aspect!r} is not width:height, such as 16:9") from None
