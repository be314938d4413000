"""The protocols of the waist: what a backbone, a codec and a loss are to everything else."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, runtime_checkable

from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions

Losses = dict[str, Tensor]
"""Unweighted scalar terms, keyed "term/modality" ("flow/audio"); weights are configuration."""


@runtime_checkable
class Denoiser(Protocol):
    """Velocity field v = noise - x0 of the path x_t = (1 - t) x0 + t noise.

    x_t: latents. t: per modality (B,) or (B, F), in [0, 1], 1 = noise, 0 = data. r: the second time of a flow map,
    nearer the data; None means r = t. Pure: no hidden state, no side output.
    """

    def __call__(
        self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
    ) -> AV[Tensor]: ...


@dataclass(frozen=True)
class StreamGeometry:
    """How one modality's media maps to latents.

    rate: frames or samples per second. stride: frames or samples per latent step. channels: latent channels.
    spatial_stride: pixels per latent cell (video). size: (height, width) the codec was trained for (video).
    causal_first: the first latent step holds one frame alone, so that F frames give 1 + (F - 1) / stride steps.
    """

    rate: Fraction
    stride: int
    channels: int
    spatial_stride: int = 1
    size: tuple[int, int] = (1, 1)
    causal_first: bool = False

    def steps(self, length: int) -> int:
        """Latent steps of `length` frames or samples (an incomplete last step counts)."""
        if self.causal_first:
            return 1 + -(-(length - 1) // self.stride)
        return -(-length // self.stride)

    def length(self, steps: int) -> int:
        """Frames or samples of `steps` latent steps."""
        return 1 + (steps - 1) * self.stride if self.causal_first else steps * self.stride

    def seconds(self, steps: int) -> list[float]:
        """Middle of each latent step in seconds: the rotary positions shared by both modalities."""
        if self.causal_first:
            middles = [Fraction(1, 2), *(1 + (i - Fraction(1, 2)) * self.stride for i in range(1, steps))]
        else:
            middles = [(i + Fraction(1, 2)) * self.stride for i in range(steps)]
        return [float(m / self.rate) for m in middles]


class Codec(Protocol):
    """Media to unit-variance latents and back; the only place that knows latent shapes.

    Media: video (B, 3, F, H, W) in [-1, 1], audio (B, channels, samples) in [-1, 1].
    """

    geometry: AV[StreamGeometry]

    def encode(self, media: AV[Tensor]) -> AV[Tensor]: ...

    def decode(self, latents: AV[Tensor]) -> AV[Tensor]: ...


@runtime_checkable
class Tileable(Protocol):
    """A codec that can work on tiles: latent cells per side; None = whole pictures, "auto" = by the memory there is."""

    tile: int | str | None
