"""Media batches straight from a source, for training codecs, and whatever encodes as it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soundstage.core.av import AV, collate
from soundstage.core.batch import Batch, share
from soundstage.core.conditions import Conditions
from soundstage.data.batches import Batches, phases_of
from soundstage.data.mixture import Mixture, Phase
from soundstage.data.prompts import ready
from soundstage.data.reading import source_of
from soundstage.data.records import ClipShape, Source, SourceConfig
from soundstage.data.workers import MEMORY, Ahead

EXPECTED = 4
"""Batches that are read ahead, as far as memory reaches."""


@dataclass(frozen=True)
class Clips:
    """Batches of media, video (B, 3, F, H, W) and audio (B, channels, samples), without conditions.

    num: clips used (None = all of a finite source; an endless one gives new clips for ever). modalities: what is kept.
    hold: clips kept in memory as 8-bit pixels and 16-bit sound, for sources that are slow to read.
    workers: processes that decode the next batches meanwhile, into `memory` bytes at most.
    mixture, curriculum: shares of categories and lengths, as in data.latents.Latents.
    """

    source: SourceConfig
    shape: ClipShape = field(default_factory=ClipShape)
    num: int | None = None
    seed: int = 0
    modalities: tuple[str, ...] = ("video", "audio")
    hold: int = 0
    tokenize: Callable[[Sequence[str]], Conditions] | None = None
    workers: int = 0
    memory: int = MEMORY
    mixture: Mixture | None = None
    curriculum: tuple[Phase, ...] = ()

    def parse(self, text: str) -> Clips:
        """The same on another source: "folder:PATH" or "shards:URL"."""
        return replace(self, source=source_of(text, self.modalities), num=None)

    def build(self) -> ClipStream:
        """The stream."""
        return ClipStream(self, self.source.build(self.shape))


class ClipStream:
    """Batches by step: an endless source in its own order, a finite one shuffled every epoch."""

    def __init__(self, config: Clips, source: Source) -> None:
        self._config, self._source = config, source
        sizes = [size for size in (config.num, source.size) if size is not None]
        labels, buckets = getattr(source, "labels", None), getattr(config.source, "buckets", None)
        told = labels() if labels and (buckets or config.mixture or config.curriculum) else None
        phases = phases_of(config.mixture, config.curriculum)
        sizing = buckets.batch_size if buckets else None
        self._batches = Batches(min(sizes), config.seed, told, phases, sizing, config.shape) if sizes else None
        self._reading = Ahead(source, told.shapes if told else (config.shape,), config.workers, config.memory)
        self._held: dict[int, tuple[AV[Tensor], str, str]] = {}
        words = getattr(source, "words", None)
        if config.tokenize and words and sizes:
            ready(config.tokenize, list(dict.fromkeys(words(index)[0] for index in range(min(sizes)))), None)

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch:
        """The samples of a step, or one of `of` equal parts of them: no other is decoded."""
        if self._config.workers:
            for ahead in range(step, step + EXPECTED):
                self._reading.expect(i for i in self._indices(ahead, size, part, of) if i not in self._held)
        media, captions, names = self._read(self._indices(step, size, part, of))
        cond = self._config.tokenize(captions) if self._config.tokenize else Conditions()
        return Batch(media, cond, tuple(names))

    def close(self) -> None:
        """End the workers."""
        self._reading.close()

    def _indices(self, step: int, size: int, part: int, of: int) -> list[int]:
        if self._batches:
            return self._batches.take(step, size, part, of).tolist()
        return list(range(step * size, (step + 1) * size)[share(size, part, of)])

    def _read(self, indices: list[int]) -> tuple[AV[Tensor], list[str], list[str]]:
        """Media, captions and names; from memory, where it holds them."""
        if not self._config.hold:
            media, captions, names = self._reading.batch(indices)
            return media.only(*self._config.modalities), captions, names
        found = [self._kept(index) for index in indices]
        return collate([media for media, _, _ in found]), [words for _, words, _ in found], [n for _, _, n in found]

    def _kept(self, index: int) -> tuple[AV[Tensor], str, str]:
        """One sample, kept for the next time where there is room."""
        if index not in self._held:
            media, (caption,), (name,) = self._reading.batch([index])
            media = media.map(lambda x: x[0]).only(*self._config.modalities)
            if len(self._held) >= self._config.hold:
                return media, caption, name
            self._held[index] = media.map(_pack), caption, name
        # what is read first is what is read again: the same numbers on every pass
        media, caption, name = self._held[index]
        return media.map(_unpack), caption, name


def _pack(x: Tensor) -> Tensor:
    """8 bits for pixels (3, F, H, W), 16 for sound (channels, samples)."""
    if x.ndim == 4:
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return (x * 32767).round().clamp(-32768, 32767).to(torch.int16)


def _unpack(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float() / 32767
