"""Media batches straight from a source, for training codecs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soundstage.core.av import AV, collate
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.data.batching import Order
from soundstage.data.folder import Folder
from soundstage.data.records import ClipShape, Sample, Source, SourceConfig


@dataclass(frozen=True)
class Clips:
    """Batches of media, video (B, 3, F, H, W) and audio (B, channels, samples), without conditions.

    num: clips used (None = all of a finite source; an endless one gives new clips for ever). modalities: what is kept.
    hold: clips kept in memory as 8-bit pixels and 16-bit sound, for sources that are slow to read.
    """

    source: SourceConfig
    shape: ClipShape = field(default_factory=ClipShape)
    num: int | None = None
    seed: int = 0
    modalities: tuple[str, ...] = ("video", "audio")
    hold: int = 0
    tokenize: Callable[[Sequence[str]], Conditions] | None = None

    def parse(self, text: str) -> Clips:
        """The same on another source: "folder:PATH"."""
        kind, _, rest = text.partition(":")
        if kind != "folder" or not rest:
            raise ConfigError(f"data: {text!r} is not folder:PATH, a folder of clips")
        return replace(self, source=Folder(rest, modalities=self.modalities), num=None)

    def build(self) -> ClipStream:
        """The stream."""
        return ClipStream(self, self.source.build(self.shape))


class ClipStream:
    """Batches by step: an endless source in its own order, a finite one shuffled every epoch."""

    def __init__(self, config: Clips, source: Source) -> None:
        self._config, self._source = config, source
        sizes = [size for size in (config.num, source.size) if size is not None]
        self._order = Order(min(sizes), config.seed) if sizes else None
        self._held: dict[int, tuple[AV[Tensor], str, str]] = {}

    def batch(self, step: int, size: int) -> Batch:
        """Samples step * size onwards."""
        first = step * size
        indices = self._order.take(first, size).tolist() if self._order else range(first, first + size)
        samples = [self._sample(index) for index in indices]
        cond = self._config.tokenize([sample.caption for sample in samples]) if self._config.tokenize else Conditions()
        return Batch(collate([sample.media for sample in samples]), cond, tuple(sample.id for sample in samples))

    def _sample(self, index: int) -> Sample:
        if index in self._held:
            media, caption, name = self._held[index]
            return Sample(media.map(_unpack), caption, name)
        sample = self._source.item(index)
        sample = replace(sample, media=sample.media.only(*self._config.modalities))
        if len(self._held) < self._config.hold:
            self._held[index] = (sample.media.map(_pack), sample.caption, sample.id)
            # what is read first is what is read again: the same numbers on every pass
            return replace(sample, media=self._held[index][0].map(_unpack))
        return sample


def _pack(x: Tensor) -> Tensor:
    """8 bits for pixels (3, F, H, W), 16 for sound (channels, samples)."""
    if x.ndim == 4:
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return (x * 32767).round().clamp(-32768, 32767).to(torch.int16)


def _unpack(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float() / 32767
