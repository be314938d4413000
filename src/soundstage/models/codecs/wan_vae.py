"""The video autoencoders of Wan2.1 (4 x 8 x 8, 16 channels) and Wan2.2 (4 x 16 x 16, 48 channels), arXiv:2503.20314.

The layers are diffusers'; the walk through them is ours, so that a clip of any length and size fits in a bounded memory
and gives the numbers of the whole clip at once. In time: a chunk of frames after another, the last two frames before
each convolution kept between chunks, in lists that belong to one call (several threads may use one module). In space:
the layers around the attention, which sees a whole frame, run on whole frames at latent resolution, the others on tiles
with the margins that `tiled` counts.

Shape letters: B batch, F frames, G latent frames, H, W pixels, h, w latent cells, C latent channels, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ConfigError, ShapeError
from soundstage.core.extras import optional
from soundstage.models.codecs.tiled import Layer, Past, Run, Span, Tile, Walk, place, reach, split, windows
from soundstage.models.codecs.wan_vae_keys import WAN_VAE_KEYS, sizes

__all__ = ["WAN21_VAE", "WAN22_VAE", "WAN_VAE_KEYS", "WanVAE", "WanVAEConfig"]

# fmt: off
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class WanVAEConfig:
    """Widths, strides and latent statistics of a Wan video autoencoder.

    channels: of the latents. width, decoder_width: of the first and last stage. mean, std: of the latents by channel.
    multipliers: of the width, by stage. depth: residual blocks of an encoder stage (a decoder stage has one more).
    temporal: whether a stage halves the frames too. patch: pixels per side that enter and leave as channels. residual:
    stages with a shortcut of means and copies (Wan2.2). rate: frames per second. size: height and width it was trained
    for.
    """

    channels: int
    width: int
    decoder_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    depth: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    residual: bool = False
    rate: int = 16
    size: tuple[int, int] = (480, 832)

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            given = f"{len(self.mean)} and {len(self.std)} numbers for {self.channels} channels"
            raise ConfigError(f"mean and std: {given}; give one each")
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ConfigError(f"temporal: {len(self.multipliers)} stages need {len(self.multipliers) - 1} of them")

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> WanVAEConfig:
        """The config by the names and shapes of published tensors, or of diffusers'.

        Statistics, rate and size are not in a file: they are the published ones of the version, or mean 0 and
        deviation 1 for a number of channels that no published one has. Raises WeightsError for another model's tensors.
        """
        found = sizes(shapes)
        near, channels = (WAN22_VAE if found["residual"] else WAN21_VAE), int(str(found["channels"]))
        known = near.channels == channels
        mean = near.mean if known else (0.0,) * channels
        std = near.std if known else (1.0,) * channels
        return cls(mean=mean, std=std, rate=near.rate, size=near.size, **found)  # type: ignore[arg-type]

    @property
    def geometry(self) -> StreamGeometry:
        """Frames to latents."""
        stride, spatial = 2 ** sum(self.temporal), self.patch * 2 ** len(self.temporal)
        return StreamGeometry(Fraction(self.rate), stride, self.channels, spatial, self.size, causal_first=True)

    @property
    def down(self) -> tuple[Layer, ...]:
        """What the layers of the encoder read before its attention, in patches of pixels."""
        ends = [*([2] * len(self.temporal)), 1]
        if self.residual:
            return (Layer(1), *(Layer(2 * self.depth, down=end) for end in ends))
        stages = [(*([Layer(2)] * self.depth), *([Layer(0, down=2)] if end == 2 else [])) for end in ends]
        return (Layer(1), *(layer for stage in stages for layer in stage))

    @property
    def up(self) -> tuple[Layer, ...]:
        """What the layers of the decoder read after its attention, in latent cells."""
        ends = [*([2] * len(self.temporal)), 1]
        return (*(Layer(2 * (self.depth + 1), up=end) for end in ends), Layer(1))

    @property
    def halo(self) -> tuple[int, int]:
        """Pixels that the encoder and latent cells that the decoder reads, at most, around a tile."""
        return self.patch * max(reach(self.down)), max(reach(self.up))

    def build(self) -> WanVAE:
        """The module, randomly initialised. Raises MissingExtra without diffusers."""
        return WanVAE(self)


WAN21_VAE = WanVAEConfig(16, 96, 96, WAN21_MEAN, WAN21_STD)
WAN22_VAE = WanVAEConfig(48, 160, 256, WAN22_MEAN, WAN22_STD, patch=2, residual=True, rate=24, size=(704, 1280))


class WanVAE(nn.Module):
    """encode (B, 3, F, H, W) in [-1, 1] -> (B, C, G, h, w) of unit variance; decode back. F is 1 + 4k.

    tile: latent cells per side of the tiles that the wide layers run on, None for whole frames. stream: a latent frame
    at a time, otherwise all but the first at once (which saves calls and takes memory that grows with the length). Both
    change the memory and not the result. Latents and frames are float32 whatever the type of the weights; frames
    may lie on another device than the module and are moved in pieces.
    """

    def __init__(self, config: WanVAEConfig, tile: int | None = None, stream: bool = True) -> None:
        super().__init__()
        self.config, self.tile, self.stream = config, tile, stream
        layers = _diffusers(config)
        self.encoder: Any = layers.encoder
        self.quant_conv: Any = layers.quant_conv
        self.post_quant_conv: Any = layers.post_quant_conv
        self.decoder: Any = layers.decoder

    def encode(self, frames: Tensor) -> Tensor:
        """Frames to the mean of the latents, normalised. Raises ShapeError for a length or a size that does not fit."""
        self._check_frames(frames)
        past = Past(self.encoder)
        means = [self._to_latents(features, past) for features in self._seen(frames)]
        mean, std = self._statistics(means[0].device)
        return (torch.cat(means, dim=2) - mean) / std

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Latents to frames, in [-1, 1] if clamped. Raises ShapeError for latents of another codec.

        With tiles, one is painted through the whole clip before the next, so that the frames kept between chunks are
        those of one tile; the features before the tiles are kept for the whole clip (a third to a half of the bytes of
        the frames).
        """
        self._check_latents(latents)
        return self._paint(latents, clamp, 1 if self.stream else latents.shape[2], self.post_quant_conv.weight.device)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor, *, clamp: bool = True) -> Iterator[Tensor]:
        """The frames of `decode` in host memory and in chunks, first 1, then those of one latent frame after another.

        Whole frames come one chunk at a time, in a memory free of the length. With tiles all frames wait in host memory
        for the last tile; the module's device holds what one tile needs. Without gradients.
        """
        self._check_latents(latents)
        tiles, stride = self._tiles(*latents.shape[3:]), self.config.geometry.stride
        if len(tiles) == 1:
            walk = self._painter(tiles[0], latents)
            for chunk in self._felt(latents, 1):
                yield _finish(walk.over(chunk), self.config.patch, clamp).cpu()
        else:
            frames = self._paint(latents, clamp, 1, torch.device("cpu"))
            yield from (frames[:, :, start:stop] for start, stop in _cuts(frames.shape[2], stride))

    # Encoding

    def _seen(self, frames: Tensor) -> Iterator[Tensor]:
        """The features before the encoder's middle, chunk by chunk, whole at latent resolution."""
        geometry, patch = self.config.geometry, self.config.patch
        length, height, width = frames.shape[2:]
        cuts = _cuts(length, geometry.stride if self.stream else length)
        whole = (height // patch, width // patch)
        cells = (height // geometry.spatial_stride, width // geometry.spatial_stride)
        tiles = self._tiles(*cells)
        weight = self.quant_conv.weight
        runs = [_enter(self.encoder), *(_layer(block) for block in self.encoder.down_blocks)]

        def walked(tile: Tile) -> Iterator[Tensor]:
            spans = windows(self.config.down, tile, whole)
            walk = Walk(self.encoder, runs, self.config.down, spans)
            (top, bottom), (left, right) = spans[0]
            pixels = frames[..., top * patch : bottom * patch, left * patch : right * patch]
            for start, stop in cuts:
                yield walk(_fold(pixels[:, :, start:stop].to(weight.device, weight.dtype), patch))

        if len(tiles) == 1:
            yield from walked(tiles[0])
            return
        features: list[Tensor] = []
        for tile in tiles:
            for i, made in enumerate(walked(tile)):
                if i == len(features):
                    features.append(made.new_empty(*made.shape[:3], *cells))
                place(features[i], made, tile, 1)
        yield from features

    def _to_latents(self, features: Tensor, past: Past) -> Tensor:
        past.begin()
        x = _leave(self.encoder)(_layer(self.encoder.mid_block)(features, past), past)
        return self.quant_conv(x)[:, : self.config.channels].float()

    # Decoding

    def _felt(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        """The features after the decoder's middle, chunk by chunk, whole at latent resolution."""
        weight = self.post_quant_conv.weight
        mean, std = self._statistics(weight.device)
        decoder, past = self.decoder, Past(self.decoder)
        for start, stop in _cuts(latents.shape[2], chunk):
            past.begin()
            z = latents[:, :, start:stop].to(weight.device, torch.float32) * std + mean
            x = _enter(decoder)(self.post_quant_conv(z.to(weight.dtype)), past)
            yield _layer(decoder.mid_block)(x, past)

    def _paint(self, latents: Tensor, clamp: bool, chunk: int, device: torch.device) -> Tensor:
        """All frames, gathered on that device; chunk: latent frames at a time."""
        geometry = self.config.geometry
        batch, _, steps, height, width = latents.shape
        side = geometry.spatial_stride
        size = (batch, 3, geometry.length(steps), height * side, width * side)
        frames = torch.empty(size, dtype=torch.float32, device=device)
        tiles, chunks = self._tiles(height, width), self._felt(latents, chunk)
        held = chunks if len(tiles) == 1 else list(chunks)
        for tile in tiles:
            walk, done = self._painter(tile, latents), 0
            for features in held:
                made = _finish(walk.over(features), self.config.patch, clamp)
                place(frames[:, :, done : done + made.shape[2]], made, tile, side)
                done += made.shape[2]
        return frames

    def _painter(self, tile: Tile, latents: Tensor) -> Walk:
        """The walk that turns features into the pixels of one tile."""
        decoder, up = self.decoder, self.config.up
        grown = 2 ** len(self.config.temporal)
        wanted = tuple((start * grown, stop * grown) for start, stop in tile)
        spans = windows(up, (wanted[0], wanted[1]), latents.shape[3:])
        return Walk(decoder, [*(_upwards(block) for block in decoder.up_blocks), _leave(decoder)], up, spans)

    # Both

    def _tiles(self, height: int, width: int) -> tuple[Tile, ...]:
        if self.tile is not None and self.tile < 1:
            raise ConfigError(f"tile: {self.tile} latent cells per side; give 1 or more, or None for whole frames")
        return tuple(product(split(height, self.tile), split(width, self.tile)))

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation, made anew from numbers: never cast with the weights, never left on the meta device."""
        mean, std = (
            torch.tensor(x, device=device).reshape(1, -1, 1, 1, 1) for x in (self.config.mean, self.config.std)
        )
        return mean, std

    def _check_frames(self, frames: Tensor) -> None:
        geometry = self.config.geometry
        if frames.ndim != 5 or frames.shape[1] != 3:
            raise ShapeError(f"frames of shape {list(frames.shape)}: the codec takes (B, 3, F, H, W)")
        length, side = frames.shape[2], geometry.spatial_stride
        extra = (length - 1) % geometry.stride
        if length < 1 or extra:
            near = [n for n in (length - extra, length - extra + geometry.stride) if n > 0]
            raise ShapeError(
                f"{length} frames: the codec takes 1 + {geometry.stride}k; give {' or '.join(map(str, near))}"
            )
        if min(frames.shape[3:]) < side or any(size % side for size in frames.shape[3:]):
            near = [max(side, round(size / side) * side) for size in frames.shape[3:]]
            raise ShapeError(
                f"frames of {frames.shape[3]} x {frames.shape[4]}: sides must be multiples of {side}; "
                f"give {near[0]} x {near[1]}"
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.channels or min(latents.shape[2:]) < 1:
            raise ShapeError(
                f"latents of shape {list(latents.shape)}: the codec takes (B, {self.config.channels}, G, h, w)"
            )


def _enter(path: Any) -> Run:  # noqa: ANN401
    return lambda x, past: past.convolve(path.conv_in, x)


def _layer(block: Any) -> Run:  # noqa: ANN401
    return lambda x, past: block(x, feat_cache=past.kept, feat_idx=past.index)


def _upwards(block: Any) -> Run:  # noqa: ANN401
    return lambda x, past: block(x, feat_cache=past.kept, feat_idx=past.index, first_chunk=past.first)


def _leave(path: Any) -> Run:  # noqa: ANN401
    return lambda x, past: past.convolve(path.conv_out, F.silu(path.norm_out(x)))


def _cuts(length: int, chunk: int) -> list[Span]:
    """The first alone, then chunk after chunk."""
    return [(0, 1), *((start, min(start + chunk, length)) for start in range(1, length, chunk))]


def _fold(x: Tensor, patch: int) -> Tensor:
    """(B, C, F, H, W) -> (B, C p p, F, H/p, W/p), of a patch the columns before the rows."""
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _finish(x: Tensor, patch: int, clamp: bool) -> Tensor:
    """The inverse of _fold, in float32."""
    x = x.float().unflatten(1, (3, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5).flatten(3, 4)
    return x.clamp(-1, 1) if clamp else x


def _diffusers(config: WanVAEConfig) -> Any:  # noqa: ANN401
    """The layers, held together by the class that they belong to."""
    pixels = 3 * config.patch**2
    return optional("diffusers", "models", "AutoencoderKLWan").AutoencoderKLWan(
        base_dim=config.width,
        decoder_base_dim=config.decoder_width,
        z_dim=config.channels,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.depth,
        temperal_downsample=list(config.temporal),
        is_residual=config.residual,
        in_channels=pixels,
        out_channels=pixels,
        patch_size=config.patch if config.patch > 1 else None,
    )
