"""What data is made of: one clip as tensors, its shape, and where clips come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.data.reading import Raw
from soundstage.data.shapes import ClipShape
from soundstage.media.clip import Clip

__all__ = ["ClipShape", "Sample", "Source", "SourceConfig", "media_of", "raw_of", "sample_of", "to_media"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One clip. media: video (3, F, H, W), audio (channels, samples), float32 in [-1, 1]. id: a name for reports."""

    media: AV[Tensor]
    caption: str
    id: str


class Source(Protocol):
    """Clips by index: pure, so that data order needs no state. `size` is None for an endless source.

    `key` names the content: two sources with the same key give the same clips.

    A source may offer more. `window(index)`, which has `read() -> Raw` and can be sent to a worker; `words(index)`, the
    caption and name of a sample without decoding it; `digest(index)`, a text that its media follow from, so that what
    is made of them is kept by it; `labels()`, a data.batches.Labels of shapes, categories and lengths.
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


def sample_of(raw: Raw) -> Sample:
    """A decoded clip as tensors."""
    return Sample(media_of([raw]).map(lambda x: x[0]), raw.caption, raw.id)


def media_of(raws: Sequence[Raw]) -> AV[Tensor]:
    """Decoded clips of one shape as a batch: video (B, 3, F, H, W) and audio (B, channels, samples)."""
    video = audio = None
    first = raws[0]
    if first.frames is not None:
        frames, height, width, colours = first.frames.shape
        video = torch.empty(len(raws), colours, frames, height, width)
        for row, raw in zip(video, raws, strict=True):
            assert raw.frames is not None
            # bytes are turned round before they become four times as many
            pixels = np.ascontiguousarray(raw.frames.transpose(3, 0, 1, 2))
            row.copy_(torch.from_numpy(pixels)).div_(127.5).sub_(1)
    if first.wave is not None:
        audio = torch.from_numpy(np.stack([raw.wave for raw in raws]))
    return AV(video, audio)


def raw_of(sample: Sample, sample_rate: int) -> Raw:
    """Tensors as a decoded clip: 8-bit pixels, and sound as it is."""
    frames = wave = None
    if "video" in sample.media:
        pixels = ((sample.media["video"] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        frames = pixels.permute(1, 2, 3, 0).contiguous().numpy()
    if "audio" in sample.media:
        wave = sample.media["audio"].float().numpy()
    return Raw(frames, wave, sample.caption, sample.id, sample_rate)
