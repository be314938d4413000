"""What data is made of: one clip as tensors, its shape, and where clips come from."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
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

LARGE = 2**23
"""Bytes from which a batch is worth huge pages."""


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
    return Sample(media_of([raw], 1).map(lambda x: x[0]), raw.caption, raw.id)


def media_of(raws: Iterable[Raw], num: int) -> AV[Tensor]:
    """`num` decoded clips of one shape as a batch: video (B, 3, F, H, W) and audio (B, channels, samples).

    They are taken one at a time, and nothing of one is needed once the next is asked for.
    """
    video = audio = None
    for place, raw in enumerate(raws):
        if raw.frames is not None:
            # bytes are turned round before they become four times as many
            pixels = np.ascontiguousarray(raw.frames.transpose(3, 0, 1, 2))
            video = _room(num, *pixels.shape) if video is None else video
            video[place].copy_(torch.from_numpy(pixels)).div_(127.5).sub_(1)
        if raw.wave is not None:
            audio = torch.empty(num, *raw.wave.shape) if audio is None else audio
            audio[place].copy_(torch.from_numpy(np.ascontiguousarray(raw.wave)))
    return AV(video, audio)


def _room(*shape: int) -> Tensor:
    """An empty float32 tensor. A large one is made of huge pages where the system has them, which fill faster.

    It takes the memory of one that is gone, where there is such: pages that were never touched are slow to come by.
    """
    size = 4 * math.prod(shape)
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape)
    memory = None
    with suppress(IndexError):
        memory = _spare.pop()
    if memory is None or len(memory) != size:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system that has them may still refuse them
            memory.madvise(mmap.MADV_HUGEPAGE)
    held = np.frombuffer(memory, np.float32)
    weakref.finalize(held, _spare.append, memory).atexit = False
    return torch.from_numpy(held).view(shape)


_spare: deque[mmap.mmap] = deque(maxlen=1)
"""Memory of the large tensor that went last."""


def raw_of(sample: Sample, sample_rate: int) -> Raw:
    """Tensors as a decoded clip: 8-bit pixels, and sound as it is."""
    frames = wave = None
    if "video" in sample.media:
        pixels = ((sample.media["video"] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        frames = pixels.permute(1, 2, 3, 0).contiguous().numpy()
    if "audio" in sample.media:
        wave = sample.media["audio"].float().numpy()
    return Raw(frames, wave, sample.caption, sample.id, sample_rate)
