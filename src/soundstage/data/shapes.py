"""The shape of the clips that a model takes; free of torch, so that workers which only decode start quickly."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from soundstage.media.geometry import frame_rate


@dataclass(frozen=True)
class ClipShape:
    """The clips a model takes. size: (height, width) in pixels; fps as a number or text, exact as a Fraction.

    num_samples: None = as many as sound while num_frames frames are shown.
    """

    fps: Fraction | float | str = 16
    size: tuple[int, int] = (64, 64)
    num_frames: int = 33
    sample_rate: int = 16000
    channels: int = 1
    num_samples: int | None = None

    @property
    def rate(self) -> Fraction:
        """Frames per second, exact."""
        return frame_rate(self.fps)

    @property
    def seconds(self) -> Fraction:
        """Length of the picture, exact."""
        return self.num_frames / self.rate

    @property
    def samples(self) -> int:
        """Samples of sound per channel."""
        return self.num_samples or round(self.seconds * self.sample_rate)
