"""Stage "embed": a vector for every clip, by a transformers model or, offline, by a descriptor made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from soundstage.core.errors import ConfigError, one_of
from soundstage.data.captions import pictures
from soundstage.data.flow import Drop, Item, Poison
from soundstage.media.decode import read
from soundstage.media.errors import MediaError
from soundstage.media.waves import MelConfig, mel_spectrogram

__all__ = ["Embed", "describe_picture", "describe_sound"]

RATE = 16_000
MEL = MelConfig(num_mels=32)


@dataclass(frozen=True)
class Embed:
    """Adds the file "embedding:<name>" (npy, (D,) float32 of length 1) and its name to the fact "embedding".

    of: "picture" or "sound". model: folder or hub id of a transformers model with image features (CLIP, SigLIP) or
    audio features (CLAP); "" is the descriptor made by hand: hues, gradients and their change, or the levels of 32 mel
    bands and how they move. images: frames whose vectors are averaged. An item without such a medium passes unchanged.
    """

    of: str = "picture"
    model: str = ""
    name: str = ""
    images: int = 4
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.of not in ("picture", "sound"):
            raise one_of("Embed.of", self.of, ("picture", "sound"))
        if self.images < 1:
            raise ConfigError(f"Embed.images: {self.images} is below 1")

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        media = item.facts.get("media") or {}
        if media and ("width" if self.of == "picture" else "sample_rate") not in media:
            yield item
            return
        name = self.name or self.of
        try:
            vector = self._picture(item) if self.of == "picture" else self._sound(item)
        except MediaError as error:
            raise Poison(f"{error.reason}; {error.remedy}") from error
        path = folder / f"{name}.npy"
        np.save(path, (vector / max(float(np.linalg.norm(vector)), 1e-9)).astype(np.float32), allow_pickle=False)
        known = dict(item.facts.get("embedding") or {})
        known[name] = {"model": self.model or "hand-made", "size": len(vector)}
        yield item.child({f"embedding:{name}": path}, embedding=known)

    def _picture(self, item: Item) -> np.ndarray:
        if not self.model:
            return describe_picture(pictures(item, max(2, self.images), 160))
        model, processor = _loaded(self.model)
        inputs = processor(images=pictures(item, self.images, 512), return_tensors="pt")
        return _mean(_features(model.get_image_features, inputs))

    def _sound(self, item: Item) -> np.ndarray:
        start, end = item.facts.get("span") or (0.0, None)
        processor = model = None
        rate = RATE
        if self.model:
            model, processor = _loaded(self.model)
            rate = processor.sampling_rate
        clip = read(item.files["media"], start=start, end=end, video=False, sample_rate=rate, channels=1)
        if model is None or processor is None:
            return describe_sound(clip.wave[0])
        inputs = processor(clip.wave[0], sampling_rate=rate, return_tensors="pt")
        return _mean(_features(model.get_audio_features, inputs))


def describe_picture(shown: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 frames of one clip -> (D,) float64: colours, edges by direction and place, and their change."""
    rows = np.stack([np.concatenate([_colours(image), _edges(image)]) for image in shown])
    return np.concatenate([rows.mean(axis=0), rows.std(axis=0)])


def describe_sound(wave: np.ndarray) -> np.ndarray:
    """(samples,) at 16 kHz -> (96,) float64: mean, spread and restlessness of 32 mel bands, without the level."""
    wave = np.pad(wave, (0, max(0, 2 * MEL.n_fft - len(wave))))
    mel = mel_spectrogram(wave[None], MEL)[0].astype(np.float64)
    mel = np.maximum(mel, mel.max() - 4)
    mel -= mel.mean()
    return np.concatenate([mel.mean(axis=1), mel.std(axis=1), 4 * np.abs(np.diff(mel, axis=1)).mean(axis=1)])


def _colours(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (4 * 24,) roots of the shares of 8 hues and 3 levels of grey, each by brightness, per quarter."""
    x = image[::2, ::2].astype(np.float64) / 255
    high, low = x.max(axis=2), x.min(axis=2)
    chroma = np.maximum(high - low, 1e-9)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    hue = np.where(high == r, (g - b) / chroma % 6, np.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4))
    grey = high - low < 0.15
    kind = np.where(grey, 16 + np.minimum(high * 8, 7), (hue / 6 * 8).astype(int) % 8 + 8 * (high > 0.5)).astype(int)
    rows, columns = (np.arange(side) * 2 // side for side in kind.shape)
    place = 2 * rows[:, None] + columns
    counts = np.bincount((place * 24 + kind).ravel(), minlength=96)
    return np.sqrt(counts / kind.size)


def _edges(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (16 * 8,) histograms of the direction of gradients over 4 x 4 places (N. Dalal, B. Triggs, 2005)."""
    luma = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    down, along = np.gradient(luma)
    strength = np.hypot(down, along)
    way = (np.arctan2(down, along) / np.pi % 1 * 8).astype(int) % 8
    rows, columns = (np.arange(side) * 4 // side for side in luma.shape)
    place = 4 * rows[:, None] + columns
    total = np.bincount((place * 8 + way).ravel(), strength.ravel(), minlength=128)
    return np.sqrt(total / max(total.sum(), 1e-9))


@lru_cache(maxsize=2)
def _loaded(name: str) -> tuple[Any, Any]:
    """(model, image processor or audio feature extractor), once per process."""
    from soundstage.core.extras import optional

    transformers = optional("transformers", "models")
    model = transformers.AutoModel.from_pretrained(name).eval()
    if hasattr(model, "get_audio_features"):
        return model, transformers.AutoFeatureExtractor.from_pretrained(name)
    return model, transformers.AutoImageProcessor.from_pretrained(name)


def _features(method: Any, inputs: Any) -> Any:  # noqa: ANN401
    import torch

    with torch.inference_mode():
        found = method(**inputs)
    # transformers 5 wraps the features in an output; before, they came bare.
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def _mean(features: Any) -> np.ndarray:  # noqa: ANN401
    vectors = features.float().numpy().astype(np.float64)
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).mean(axis=0)
