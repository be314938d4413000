"""Toy data for tests: a source of clips, a codec and a tokenizer that cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.data.records import ClipShape, Sample


@dataclass(frozen=True)
class Ramps:
    """Clips whose pixels and sound are constant within a clip and differ between clips; endless where size is None."""

    size: int | None = None

    def build(self, shape: ClipShape) -> RampSource:
        """The source of clips of this shape."""
        return RampSource(self.size, shape)


class RampSource:
    """Clip `index` has level (index mod 16) / 16 in both modalities."""

    def __init__(self, size: int | None, shape: ClipShape) -> None:
        self.size, self._shape = size, shape
        self.key = "ramps"
        self.read: list[int] = []

    def item(self, index: int) -> Sample:
        """A constant clip."""
        self.read.append(index)
        level, s = (index % 16) / 16, self._shape
        media = AV(torch.full((3, s.num_frames, *s.size), level), torch.full((s.channels, s.samples), level))
        return Sample(media, f"level {index % 16}", str(index))


@dataclass(frozen=True)
class MeanCodec:
    """Latents are means over blocks: video (B, 3, F, H / 8, W / 8), audio (B, channels, samples / 1000)."""

    def build(self) -> MeanCodec:
        """Itself."""
        return self

    @property
    def geometry(self) -> AV[StreamGeometry]:
        """One latent step per frame, and per 1000 samples."""
        video = StreamGeometry(Fraction(16), 1, channels=3, spatial_stride=8)
        return AV(video, StreamGeometry(Fraction(16000), 1000, channels=1))

    def encode(self, media: AV[Tensor]) -> AV[Tensor]:
        """Means over blocks."""
        pools = {"video": lambda x: F.avg_pool3d(x, (1, 8, 8)), "audio": lambda x: F.avg_pool1d(x, 1000)}
        return AV(**{name: pools[name](x) for name, x in media.items()})

    def decode(self, latents: AV[Tensor]) -> AV[Tensor]:
        """Constant blocks."""
        scales = {"video": (1.0, 8.0, 8.0), "audio": (1000.0,)}
        return AV(**{name: F.interpolate(x, scale_factor=scales[name]) for name, x in latents.items()})


def tokenize(captions: Sequence[str]) -> Conditions:
    """The first 8 bytes of each caption, for both modalities."""
    rows = [list(caption.encode()[:8].ljust(8, b"\0")) for caption in captions]
    ids = torch.tensor(rows, dtype=torch.int64)
    return Conditions(text=AV(ids, ids), text_mask=AV(ids > 0, ids > 0))
