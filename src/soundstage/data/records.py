"""What data is made of: one clip as tensors, its shape, and where clips come from."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.media.clip import Clip
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


@dataclass(frozen=True, eq=False)
class Sample:
    """One clip. media: video (3, F, H, W), audio (channels, samples), float32 in [-1, 1]. id: a name for reports."""

    media: AV[Tensor]
    caption: str
    id: str


class Source(Protocol):
    """Clips by index: pure, so that data order needs no state. `size` is None for an endless source.

    `key` names the content: two sources with the same key give the same clips.
    """

    size: int | None
    key: str

    def item(self, index: int) -> Sample: ...


class SourceConfig(Protocol):
    """A frozen dataclass that describes a source, and builds it for a shape of clip."""

    def build(self, shape: ClipShape) -> Source: ...


def to_media(clip: Clip, shape: ClipShape) -> AV[Tensor]:
    """Frames (F, H, W, 3) uint8 and wave of a clip as tensors of exactly `shape`; the end is cut or padded.

    Frames are padded with the last one, sound with silence. An absent stream stays absent.
    """
    video = audio = None
    if clip.frames is not None:
        kept = clip.frames[: shape.num_frames]
        short = shape.num_frames - len(kept)
        frames = np.concatenate([kept, np.repeat(kept[-1:], short, axis=0)]) if short else kept
        video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
    if clip.wave is not None:
        wave = clip.wave[:, : shape.samples]
        audio = torch.from_numpy(np.pad(wave, ((0, 0), (0, shape.samples - wave.shape[1])))).float()
    return AV(video, audio)
