"""Latents as training data: each clip of a source is encoded once, then batches are read by (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from soundstage.core.av import AV, collate
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.data.batches import Batches, phases_of
from soundstage.data.latent_cache import LatentCache
from soundstage.data.mixture import Mixture, Phase
from soundstage.data.prompts import ready
from soundstage.data.reading import source_of
from soundstage.data.records import ClipShape, Source, SourceConfig
from soundstage.data.workers import MEMORY, Ahead

SHARD = 256
"""Clips per file of the cache."""

OnProgress = Callable[[int, int], None]
"""Called with (clips encoded, clips wanted)."""


class CodecConfig(Protocol):
    def build(self) -> Any: ...  # noqa: ANN401


@dataclass(frozen=True)
class Latents:
    """Training data of a latent model: clips of `source`, encoded by `codec`, told by `tokenize`.

    tokenize: captions to Conditions of one row each; see data.prompts.ready. num: clips used, the first of the source
        (None = all of them).
    cache: folder of the encoded clips, known by the codec's weights and by what each clip was made from, so that it
        grows by what is new, and one folder serves many sources and codecs.
    batch_size, device: of the encoding. workers: processes that decode for it.
    mixture, curriculum: shares of categories and lengths, from the first step and from later ones on, for a source that
        tells them, such as Shards.
    hold: bytes of latents kept in memory; where there are more, each batch is read from the disk.
    """

    source: SourceConfig
    codec: CodecConfig
    tokenize: Callable[[Sequence[str]], Conditions]
    shape: ClipShape = field(default_factory=ClipShape)
    num: int | None = None
    seed: int = 0
    cache: str = "runs/latents"
    batch_size: int = 16
    device: str = "cpu"
    workers: int = 0
    mixture: Mixture | None = None
    curriculum: tuple[Phase, ...] = ()
    hold: int = 2**32

    def parse(self, text: str) -> Latents:
        """The same codec and captions on another source: "folder:PATH", every clip of a folder, or "shards:URL"."""
        return replace(self, source=source_of(text), num=None)

    def prepare(self, progress: OnProgress | None = None) -> tuple[LatentCache, list[str]]:
        """Encode what the cache lacks; returns it with the keys of the clips. Killed, it goes on where it was."""
        cache, keys, _ = self._prepared(progress)
        return cache, keys

    def build(self) -> LatentPool:
        """The pool; encodes first what the cache lacks."""
        cache, keys, source = self._prepared(None)
        labels, buckets = getattr(source, "labels", None), getattr(self.source, "buckets", None)
        phases = phases_of(self.mixture, self.curriculum)
        batches = Batches(
            len(keys),
            self.seed,
            labels() if labels and (buckets or phases) else None,
            phases,
            buckets.batch_size if buckets else None,
            self.shape,
        )
        told = getattr(source, "words", None)
        words = [told(i) if told else (entry.caption, entry.id) for i, entry in enumerate(map(cache.entries.get, keys))]
        pool = LatentPool(cache, keys, words, self.tokenize, batches, self.hold)
        ready(self.tokenize, pool.captions, None)
        return pool

    def _prepared(self, progress: OnProgress | None) -> tuple[LatentCache, list[str], Source]:
        source, codec = self.source.build(self.shape), self.codec.build()
        num = self.num if self.num is not None else source.size
        if num is None:
            raise ConfigError("data.num: an endless source needs a number of clips, for example data.num=20000")
        num = num if source.size is None else min(num, source.size)
        shapes = _shapes(source, self.shape, num)
        keys = [_key(source, index, shapes[index]) for index in range(num)]
        cache = LatentCache(Path(self.cache) / fingerprint(codec)[:16])
        _encode(source, codec, cache, keys, shapes, self, progress)
        return cache, keys, source


class LatentPool:
    """Encoded clips by step: in memory where they fit there."""

    def __init__(
        self,
        cache: LatentCache,
        keys: Sequence[str],
        words: Sequence[tuple[str, str]],
        tokenize: Callable[[Sequence[str]], Conditions],
        batches: Batches,
        hold: int = 2**32,
    ) -> None:
        self.captions = [caption for caption, _ in words]
        self.ids = [name for _, name in words]
        self._cache, self._keys = cache, list(keys)
        self._tokenize, self._batches = tokenize, batches
        self._held: list[AV[Tensor]] | None = None
        self._whole: AV[Tensor] | None = None
        if cache.bytes(keys) <= hold:
            held = [cache.get(key) for key in keys]
            alike = len({tuple((name, x.shape) for name, x in one.items()) for one in held}) == 1
            self._whole, self._held = (collate(held), None) if alike else (None, held)

    def __len__(self) -> int:
        return len(self._keys)

    def batch(self, step: int, size: int, part: int = 0, of: int = 1) -> Batch:
        """The batch of a step, or one of `of` equal parts of it; latents as float32.

        Of several shapes it has one, and as many clips as cost the same.
        """
        index = self._batches.take(step, size, part, of)
        chosen = index.tolist()
        if self._whole is not None:
            x0 = self._whole.map(lambda x: x[index].float())
        else:
            latents = [self._held[i] if self._held else self._cache.get(self._keys[i]) for i in chosen]
            x0 = collate(latents).map(lambda x: x.float())
        return Batch(x0, self._tokenize([self.captions[i] for i in chosen]), tuple(self.ids[i] for i in chosen))


def fingerprint(codec: Any) -> str:  # noqa: ANN401
    """A hash of what a codec is: its weights where it is a module, else its repr."""
    if not isinstance(codec, nn.Module):
        return sha256(repr(codec).encode()).hexdigest()
    digest = sha256(type(codec).__qualname__.encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shapes(source: Source, shape: ClipShape, num: int) -> list[ClipShape]:
    """The shape of every sample."""
    labels = getattr(source, "labels", None)
    if labels is None:
        return [shape] * num
    found = labels()
    return [found.shapes[number] for number in found.shape[:num].tolist()]


def _key(source: Source, index: int, shape: ClipShape) -> str:
    """What a clip's latents follow from, beside the codec."""
    digest = getattr(source, "digest", None)
    made_from = digest(index) if digest else f"{source.key}#{index}"
    return sha256(repr((made_from, shape)).encode()).hexdigest()[:32]


def _encode(
    source: Source,
    codec: Any,  # noqa: ANN401
    cache: LatentCache,
    keys: Sequence[str],
    shapes: Sequence[ClipShape],
    config: Latents,
    progress: OnProgress | None,
) -> None:
    """Encode the clips that are missing, a file of the cache at a time."""
    missing = [index for index, key in enumerate(keys) if key not in cache]
    done = len(keys) - len(missing)
    if progress and done:
        progress(done, len(keys))
    if not missing:
        return
    if isinstance(codec, nn.Module):
        codec.eval().to(config.device)
    reading = Ahead(source, dict.fromkeys(shapes), config.workers, MEMORY)
    try:
        for start in range(0, len(missing), SHARD):
            file = missing[start : start + SHARD]
            latents: list[AV[Tensor]] = []
            words: list[tuple[str, str]] = []
            for chunk in _chunks(file, shapes, config.batch_size):
                reading.expect(missing[start + len(latents) : start + len(latents) + 4 * config.batch_size])
                media, captions, names = reading.batch(chunk)
                with torch.inference_mode():
                    encoded = codec.encode(media.to(config.device))
                encoded = encoded.map(lambda x: x.float().cpu().clone())
                latents += [encoded.map(lambda x, i=i: x[i]) for i in range(len(chunk))]
                words += zip(captions, names, strict=True)
                if progress:
                    progress(done + start + len(latents), len(keys))
            cache.add([keys[index] for index in file], latents, words)
    finally:
        reading.close()


def _chunks(indices: Sequence[int], shapes: Sequence[ClipShape], size: int) -> Iterator[list[int]]:
    """Neighbours of one shape, at most `size` at a time."""
    chunk: list[int] = []
    for index in indices:
        if chunk and (len(chunk) == size or shapes[index] != shapes[chunk[0]]):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk
