"""Latents on disk: each clip of a source is encoded once, then training reads batches by (seed, step)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from soundstage.core.av import AV, collate
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.data.batching import Order
from soundstage.data.folder import Folder
from soundstage.data.prompts import ready
from soundstage.data.records import ClipShape, Source, SourceConfig

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
    cache: folder of the encoded clips; it grows when num does, and one folder serves many sources and codecs.
    batch_size, device: of the encoding.
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

    def parse(self, text: str) -> Latents:
        """The same codec and captions on another source: "folder:PATH" takes every clip of a folder."""
        kind, _, rest = text.partition(":")
        if kind != "folder" or not rest:
            raise ConfigError(f"data: {text!r} is not folder:PATH, a folder of clips with a .txt beside each")
        return replace(self, source=Folder(rest), num=None)

    def prepare(self, progress: OnProgress | None = None) -> tuple[list[Path], int]:
        """Encode what the cache lacks; returns its files and the number of clips. Killed, it goes on where it was."""
        source, codec = self.source.build(self.shape), self.codec.build()
        num = self.num if self.num is not None else source.size
        if num is None:
            raise ConfigError("data.num: an endless source needs a number of clips, for example data.num=20000")
        num = num if source.size is None else min(num, source.size)
        key = sha256(repr((source.key, self.shape, fingerprint(codec))).encode()).hexdigest()[:16]
        folder = Path(self.cache) / key
        return _encode(source, codec, folder, num, self, progress), num

    def build(self) -> LatentPool:
        """The pool in memory; encodes first what the cache lacks."""
        files, num = self.prepare()
        pool = LatentPool(files, num, self.tokenize, self.seed)
        ready(self.tokenize, pool.captions, None)
        return pool


class LatentPool:
    """Encoded clips in memory. `batch` draws every clip once per epoch, in an order made from the seed."""

    def __init__(
        self, files: Sequence[Path], num: int, tokenize: Callable[[Sequence[str]], Conditions], seed: int = 0
    ) -> None:
        parts: list[dict[str, Tensor]] = []
        self.captions: list[str] = []
        self.ids: list[str] = []
        for file in files:
            tensors, captions, ids = read_shard(file)
            parts.append(tensors)
            self.captions += captions
            self.ids += ids
        self.latents = AV(**{name: torch.cat([part[name] for part in parts])[:num] for name in parts[0]})
        self._order = Order(num, seed)
        self._tokenize = tokenize

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, step: int, size: int) -> Batch:
        """Samples step * size onwards of the shuffled epochs; latents as float32."""
        index = self._order.take(step * size, size)
        x0 = self.latents.map(lambda x: x[index].float())
        captions = [self.captions[i] for i in index.tolist()]
        return Batch(x0, self._tokenize(captions), tuple(self.ids[i] for i in index.tolist()))


def fingerprint(codec: Any) -> str:  # noqa: ANN401
    """A hash of what a codec is: its weights where it is a module, else its repr."""
    if not isinstance(codec, nn.Module):
        return sha256(repr(codec).encode()).hexdigest()
    digest = sha256(type(codec).__qualname__.encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_shard(file: Path) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(latents per modality, captions, ids) of one file of the cache."""
    with safe_open(str(file), "pt") as opened:
        told = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, json.loads(told["captions"]), json.loads(told["ids"])


def _encode(
    source: Source,
    codec: Any,  # noqa: ANN401
    folder: Path,
    num: int,
    config: Latents,
    progress: OnProgress | None,
) -> list[Path]:
    """Write the shards that are missing; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(codec, nn.Module):
        codec.eval().to(config.device)
    files = []
    for start in range(0, num, SHARD):
        stop = min(start + SHARD, num)
        file = folder / f"clips-{start:08d}.safetensors"
        files.append(file)
        if _holds(file) < stop - start:
            latents, captions, ids = _encode_range(source, codec, range(start, stop), config, progress, num)
            told = {"captions": json.dumps(captions), "ids": json.dumps(ids)}
            part = file.with_suffix(f".{os.getpid()}.part")
            save_file({name: x.half().contiguous() for name, x in latents.items()}, str(part), told)
            part.replace(file)
        elif progress:
            progress(stop, num)
    return files


def _encode_range(
    source: Source,
    codec: Any,  # noqa: ANN401
    indices: range,
    config: Latents,
    progress: OnProgress | None,
    num: int,
) -> tuple[AV[Tensor], list[str], list[str]]:
    parts, captions, ids = [], [], []
    for chunk in _chunks(indices, config.batch_size):
        samples = [source.item(index) for index in chunk]
        with torch.inference_mode():
            encoded = codec.encode(collate([sample.media for sample in samples]).to(config.device))
        parts.append(encoded.map(lambda x: x.float().cpu().clone()))
        captions += [sample.caption for sample in samples]
        ids += [sample.id for sample in samples]
        if progress:
            progress(chunk[-1] + 1, num)
    first, *rest = parts
    return first.map(lambda *tensors: torch.cat(tensors), *rest), captions, ids


def _chunks(indices: range, size: int) -> Iterator[range]:
    return (indices[i : i + size] for i in range(0, len(indices), size))


def _holds(file: Path) -> int:
    """Clips in a shard; 0 when it is missing or damaged."""
    if not file.exists():
        return 0
    try:
        with safe_open(str(file), "pt") as opened:
            return len(json.loads(opened.metadata()["ids"]))
    except (SafetensorError, KeyError, TypeError):
        return 0
