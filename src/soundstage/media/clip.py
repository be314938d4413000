"""A clip: frames, sound and the clock they share, decoded and in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class Clip:
    """Decoded frames and sound; either may be absent.

    frames: (F, H, W, 3) uint8 RGB, or None.
    fps: frames per second, exact; required with frames.
    wave: (channels, samples) float32 in [-1, 1], or None.
    sample_rate: samples per second; required with wave.
    times: (F,) float64 seconds at which each frame is shown, only where the source has a variable frame rate;
        None means frame i is shown at i / fps. Sound starts at 0 s.
    metadata: container tags (title, comment, ...).
    """

    frames: np.ndarray | None = None
    fps: Fraction | None = None
    wave: np.ndarray | None = None
    sample_rate: int | None = None
    times: np.ndarray | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.frames is None and self.wave is None:
            raise ValueError("Clip: needs frames, a wave, or both")
        if self.frames is not None:
            if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
                raise ValueError(f"Clip.frames: {self.frames.dtype} {self.frames.shape} is not (F, H, W, 3) uint8")
            if self.fps is None:
                raise ValueError("Clip.fps: required with frames, as a Fraction")
        if self.wave is not None:
            if self.wave.ndim != 2 or self.wave.dtype != np.float32:
                raise ValueError(f"Clip.wave: {self.wave.dtype} {self.wave.shape} is not (channels, samples) float32")
            if self.sample_rate is None:
                raise ValueError("Clip.sample_rate: required with a wave")

    @property
    def frame_times(self) -> np.ndarray:
        """(F,) float64 seconds at which each frame is shown."""
        if self.frames is None:
            raise ValueError("Clip.frame_times: the clip has no frames")
        if self.times is not None:
            return self.times
        assert self.fps is not None
        return np.arange(len(self.frames)) * float(1 / self.fps)

    @property
    def video_duration(self) -> float:
        """Seconds of picture (0.0 without frames)."""
        if self.frames is None or not len(self.frames):
            return 0.0
        assert self.fps is not None
        return float(self.frame_times[-1]) + float(1 / self.fps)

    @property
    def audio_duration(self) -> float:
        """Seconds of sound (0.0 without a wave)."""
        return 0.0 if self.wave is None or self.sample_rate is None else self.wave.shape[1] / self.sample_rate

    @property
    def duration(self) -> float:
        """Seconds of the longer of picture and sound."""
        return max(self.video_duration, self.audio_duration)

    def without(self, modality: str) -> Clip:
        """The clip with its "video" or its "audio" removed."""
        if modality == "video":
            return replace(self, frames=None, fps=None, times=None)
        if modality == "audio":
            return replace(self, wave=None, sample_rate=None)
        raise ValueError(f"Clip.without: {modality!r} is not one of video, audio")

    def save(self, path: str | Path, **options: object) -> Path:
        """Write the clip (mp4, webm, gif, wav, flac or an image folder by suffix); see media.encode.write."""
        from soundstage.media.encode import write

        return write(self, path, **options)
