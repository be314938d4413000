"""Features of texts on disk: one safetensors file per (encoder, length, type, text), written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from soundstage.core.errors import Caution, WeightsError
from soundstage.models.weights import weight_files

EDGE = 2**16
SAMPLES = 16
SAMPLE = 2**12
FEATURES = "features"
CHECKSUM = "crc32"


class TextCache:
    """Features (S, D) by text in a folder that many processes may share.

    identity: what made them, from `encoder_identity` or `identity_of`; features of another encoder are never given.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def get(self, text: str) -> Tensor | None:
        """The features of a text, or None where there are none; a damaged file counts as none, with a warning."""
        path = self._path(text)
        if not path.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor(FEATURES)
                whole = (file.metadata() or {}).get(CHECKSUM) == _checksum(features)
        except (SafetensorError, OSError):
            whole = False
        if whole:
            return features
        warnings.warn(f"{path}: a damaged entry of the text cache; the text is encoded again", Caution, stacklevel=2)
        return None

    def put(self, text: str, features: Tensor) -> None:
        """Store the features of a text; a folder that cannot be written to is a warning."""
        from safetensors.torch import save

        features = features.detach().cpu().contiguous()
        whole = save({FEATURES: features}, {CHECKSUM: _checksum(features)})
        try:
            _write(self._path(text), whole)
        except OSError as error:
            warnings.warn(
                f"{self.folder}: the text cache cannot be written to ({error}); choose another folder, or none",
                Caution,
                stacklevel=2,
            )

    def _path(self, text: str) -> Path:
        return self.folder / f"{_hash(self.identity, text)}.safetensors"


def encoder_identity(weights: Path, tokenizer: Sequence[Path]) -> str:
    """A hash that another encoder would not have: names, sizes and sampled bytes of its weights, all of its tokenizer.

    Reads about 200 KB of each weight file: both ends, where safetensors and zip archives keep their tables, and 16
    places between. Raises WeightsError where there is no weight file.
    """
    digest = hashlib.sha256()
    for path in weight_files(weights):
        digest.update(f"{path.name}:{path.stat().st_size};".encode())
        digest.update(_sampled(path))
    for path in tokenizer:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def identity_of(weights: Path, tokenizer: Sequence[Path], folder: Path) -> str:
    """`encoder_identity`, remembered in the cache folder by place, sizes and times of the files.

    So weights are opened once, and a folder full of answers serves without them. Raises WeightsError where there is no
    weight file and none was there before.
    """
    vocabulary = "".join(_hash(path.name, str(path.stat().st_size), str(path.stat().st_mtime_ns)) for path in tokenizer)
    record = folder / f"encoder-{_hash(str(weights.resolve()), vocabulary)[:32]}.json"
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        before, identity = known["files"], str(known["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        before = identity = None
    try:
        now = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weight_files(weights)]
    except WeightsError:
        if identity is None:
            raise
        return identity
    if identity is None or now != before:
        identity = encoder_identity(weights, tokenizer)
        try:
            _write(record, json.dumps({"files": now, "identity": identity}).encode())
        except OSError as error:
            warnings.warn(
                f"{folder}: the text cache cannot be written to ({error}); choose another folder, or none",
                Caution,
                stacklevel=2,
            )
    return identity


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    step = max(1, (size - 2 * EDGE) // (SAMPLES + 1))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(EDGE))
        for place in range(1, SAMPLES + 1):
            file.seek(min(EDGE + place * step, size))
            digest.update(file.read(SAMPLE))
        file.seek(max(0, size - EDGE))
        digest.update(file.read(EDGE))
    return digest.digest()


def _hash(*parts: str) -> str:
    """A hash of strings that another split of the same letters does not have."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _checksum(features: Tensor) -> str:
    return f"{zlib.crc32(features.contiguous().view(-1).view(torch.uint8).numpy().data):08x}"


def _write(path: Path, whole: bytes) -> None:
    """Write aside, then rename: a reader sees the whole file or none, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".aside-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
