"""A small causal video autoencoder: strides 4 x 16 x 16, the first frame alone, latents of unit variance.

A latent step depends on no later frame, so a longer clip has the same first latents (as in Wan, arXiv:2503.20314).
Shape letters: B batch, F frames, G latent frames, H, W pixels, C latent channels, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ShapeError

PIXELS = 8  # a frame enters and leaves as patches of 8 x 8 pixels
TIME = 4
SPACE = 16


@dataclass(frozen=True)
class VideoCodecConfig:
    """width, depth: of the encoder and decoder at latent resolution; detail: channels per 8 x 8 patch of a frame.

    noise: standard deviation added to the unit-variance latents while training, so that the decoder forgives.
    """

    channels: int = 32
    detail: int = 48
    encoder_width: int = 128
    encoder_depth: int = 3
    decoder_width: int = 160
    decoder_depth: int = 4
    noise: float = 0.1
    rate: int = 16
    size: tuple[int, int] = (64, 64)

    @property
    def geometry(self) -> StreamGeometry:
        """Frames to latents."""
        return StreamGeometry(Fraction(self.rate), TIME, self.channels, SPACE, self.size, causal_first=True)

    def build(self) -> VideoCodec:
        """The module, randomly initialised."""
        return VideoCodec(self)


class Mix(nn.Module):
    """Residual block: causal depthwise convolution, then an MLP over channels (ConvNeXt, arXiv:2201.03545)."""

    def __init__(self, width: int, expansion: int = 2) -> None:
        super().__init__()
        self.near = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), groups=width)
        self.past = nn.Parameter(torch.zeros(2, width, 1, 1, 1))
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, G, h, w) -> the same; step g sees g - 2 .. g."""
        padded = F.pad(x, (0, 0, 0, 0, 2, 0))
        y = self.near(x) + padded[:, :, :-2] * self.past[0] + padded[:, :, 1:-1] * self.past[1]
        return x + self.mlp(self.norm(y.movedim(1, -1))).movedim(-1, 1)


class VideoCodec(nn.Module):
    """encode (B, 3, F, H, W) in [-1, 1] -> (B, C, G, H/16, W/16); decode back. F is 1 + 4k."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VideoCodecConfig) -> None:
        super().__init__()
        self.config = config
        detail, merged = config.detail, config.detail * TIME * (SPACE // PIXELS) ** 2
        self.look = nn.Linear(3 * PIXELS**2, detail)
        self.merge = nn.Linear(merged, config.encoder_width)
        self.encoder = nn.ModuleList(Mix(config.encoder_width) for _ in range(config.encoder_depth))
        self.to_latent = nn.Linear(config.encoder_width, config.channels)
        self.from_latent = nn.Linear(config.channels, config.decoder_width)
        self.decoder = nn.ModuleList(Mix(config.decoder_width) for _ in range(config.decoder_depth))
        self.unmerge = nn.Linear(config.decoder_width, merged)
        self.refine = nn.ModuleList(Mix(detail) for _ in range(2))
        self.paint = nn.Linear(detail, 3 * PIXELS**2)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))

    def forward(self, media: AV[Tensor]) -> dict[str, tuple[AV[Tensor], AV[Tensor]]]:
        """Pairs (made, true) for the reconstruction objective."""
        raw = self._encode(media["video"])
        made = self._decode(raw + self.config.noise * torch.randn_like(raw) if self.training else raw)
        return {"frames": (AV(video=made), media.only("video"))}

    def encode(self, frames: Tensor) -> Tensor:
        """Frames to latents; raises ShapeError where the size does not divide."""
        raw = self._encode(frames)
        return (raw - _channels(self.mean)) / _channels(self.std)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to frames in [-1, 1]."""
        return self._decode(latents * _channels(self.std) + _channels(self.mean)).clamp(-1, 1)

    def _encode(self, frames: Tensor) -> Tensor:
        _, _, length, height, width = frames.shape
        if (length - 1) % TIME or height % SPACE or width % SPACE:
            raise ShapeError(f"{length} frames of {height} x {width} do not fit the codec: 1 + 4k frames, sizes by 16")
        x = torch.cat([frames[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), frames], dim=2)
        x = F.gelu(self.look(_fold(x, 1, PIXELS)))
        x = self.merge(_fold(x.movedim(-1, 1), TIME, SPACE // PIXELS))
        x = self.to_latent(_through(self.encoder, x.movedim(-1, 1)).movedim(1, -1)).float()
        return F.rms_norm(x, x.shape[-1:]).movedim(-1, 1)

    def _decode(self, raw: Tensor) -> Tensor:
        x = _through(self.decoder, self.from_latent(raw.movedim(1, -1)).movedim(-1, 1))
        x = _unfold(self.unmerge(x.movedim(1, -1)), TIME, SPACE // PIXELS)
        x = _unfold(self.paint(F.gelu(_through(self.refine, x)).movedim(1, -1)), 1, PIXELS)
        return x[:, :, TIME - 1 :].float()


def _channels(x: Tensor) -> Tensor:
    return x.reshape(1, -1, 1, 1, 1)


def _fold(x: Tensor, time: int, space: int) -> Tensor:
    """(B, C, F, H, W) -> (B, F/t, H/s, W/s, C t s s)."""
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _unfold(x: Tensor, time: int, space: int) -> Tensor:
    """Inverse of _fold."""
    x = x.unflatten(4, (-1, time, space, space))
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def _through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x
