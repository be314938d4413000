"""The sizes at which `ovi.py` measures, and modules and inputs of those sizes with random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.extras import optional
from soundstage.models.codecs.bigvgan import BigVGANConfig
from soundstage.models.codecs.mmaudio import MMAUDIO_16K, MMAudioConfig
from soundstage.models.codecs.wan_vae import WAN22_VAE, WanVAEConfig
from soundstage.models.twin import OVI, OVI_ROPE_SCALE, TwinConfig
from soundstage.models.wan import WAN_DIFFUSERS_KEYS, WanConfig

FIVE_SECONDS = (31, 157)
"""Latent steps of picture and of sound in five seconds of Ovi."""
SLG = 11
"""The block that Ovi leaves out of its negative prediction."""


@dataclass(frozen=True)
class Preset:
    """What is measured. grid: latent frames, rows and columns. steps: latent steps of sound. words: rows of text.

    types: in which the tower is measured; the first is that of the twin. picture, picture_grid, tile, sound, piece: the
    decoders, what they decode, and in what parts. sampling: (steps, guided). matrix: side of the matrix product.
    """

    name: str
    twin: TwinConfig
    grid: tuple[int, int, int]
    steps: int
    words: int
    types: tuple[torch.dtype, ...]
    picture: WanVAEConfig
    picture_grid: tuple[int, int, int]
    tile: int
    sound: MMAudioConfig
    piece: int
    sampling: tuple[tuple[int, bool], ...]
    matrix: int

    @property
    def tokens(self) -> AV[int]:
        """Tokens of each tower."""
        frames, height, width = self.grid
        return AV(video=frames * (height // 2) * (width // 2), audio=self.steps)

    @property
    def left_out(self) -> int:
        """The block that skip-layer guidance leaves out."""
        return min(SLG, self.twin.video.depth - 1)

    def told(self) -> dict[str, Any]:
        """What a reader of the figures must know."""
        config = self.twin.video
        return {
            "name": self.name,
            "width": config.width,
            "hidden": config.hidden,
            "heads": config.num_heads,
            "depth": config.depth,
            "tokens": self.tokens.as_dict(),
            "grid": list(self.grid),
            "text_rows": [self.words, config.text_length],
            "picture": {"widths": [self.picture.width, self.picture.decoder_width], "grid": list(self.picture_grid)},
            "sound": {"widths": [self.sound.width, self.sound.vocoder.width], "steps": self.steps},
        }


def presets(width: int, depth: int, tokens: int) -> dict[str, Preset]:
    """The sizes by name: "tiny" for tests, "full" as published, and "cpu" of this width, depth and number of tokens."""
    frames = max(2, round(tokens / 64))
    small = WanConfig(64, 128, 2, 2, 48, 48, frequencies=32, text_width=32, text_length=16)
    middle = WanConfig(width, round(width * 14 / 384) * 128, max(2, width // 128), depth, 48, 48)
    return {
        "tiny": Preset(
            "tiny",
            _twin(small),
            (2, 4, 4),
            8,
            5,
            (torch.float32, torch.bfloat16),
            replace(WAN22_VAE, width=16, decoder_width=16),
            (2, 4, 4),
            2,
            MMAudioConfig(width=8, vocoder=BigVGANConfig(width=64)),
            4,
            ((2, True), (1, False)),
            64,
        ),
        "cpu": Preset(
            "cpu",
            _twin(middle),
            (frames, 16, 16),
            round(frames * FIVE_SECONDS[1] / FIVE_SECONDS[0]),
            100,
            (torch.float32,),  # processors without bf16 of their own take a hundred times as long
            replace(WAN22_VAE, width=32, decoder_width=48),
            (3, 8, 8),
            4,
            MMAudioConfig(width=64, vocoder=BigVGANConfig(width=192)),
            20,
            ((4, True), (4, False)),
            1024,
        ),
        "full": Preset(
            "full",
            OVI,
            (FIVE_SECONDS[0], 44, 44),
            FIVE_SECONDS[1],
            100,
            (torch.bfloat16,),
            WAN22_VAE,
            (FIVE_SECONDS[0], 44, 44),
            22,
            MMAUDIO_16K,
            64,
            ((50, True), (4, False)),
            8192,
        ),
    }


def _twin(video: WanConfig) -> TwinConfig:
    """Ovi around such a video tower."""
    return TwinConfig(video, replace(video, in_channels=20, out_channels=20, patch=(1,)), OVI_ROPE_SCALE)


# Modules


@torch.no_grad()
def filled(config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:  # noqa: ANN401
    """A backbone made straight on the device, with random weights under which values keep their size."""
    with torch.device("meta"):
        module = config.build().to(dtype)
    module = module.to_empty(device=device).eval().requires_grad_(False)
    make = torch.Generator(device).manual_seed(0)
    for name, x in module.named_parameters():
        if x.ndim > 1 and "modulation" not in name:
            x.normal_(std=math.prod(x.shape[1:]) ** -0.5, generator=make)
        else:
            x.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.1, generator=make)
    return module


def shared(module: nn.Module) -> Any:  # noqa: ANN401
    """Another module over the same weights, to be switched by itself."""
    with torch.device("meta"):
        other = module.config.build()  # type: ignore[operator, union-attr]
    other.load_state_dict(module.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def counterpart(ours: nn.Module, config: WanConfig, dtype: torch.dtype) -> nn.Module:
    """diffusers' module with the weights of ours; what it keeps in float32 when it loads a file is so here."""
    transformer = optional("diffusers", "models", "WanTransformer3DModel").WanTransformer3DModel
    with torch.device(next(ours.parameters()).device):
        module = transformer(
            patch_size=config.patch,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.width // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_width,
            freq_dim=config.frequencies,
            ffn_dim=config.hidden,
            num_layers=config.depth,
            eps=config.eps,
        )
    weights = ours.state_dict()
    sources = WAN_DIFFUSERS_KEYS(list(module.state_dict()))
    module.load_state_dict({source.names[0]: weights[name] for name, source in sources.items()})
    kept = set(module._keep_in_fp32_modules or ())
    for name, x in module.named_parameters():
        if not kept & set(name.split(".")):
            x.data = x.data.to(dtype)
    return module.eval().requires_grad_(False)


# Inputs


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, the same numbers for every module of a preset."""

    preset: Preset
    device: torch.device
    dtype: torch.dtype

    def latents(self) -> AV[Tensor]:
        """Noise, in float32 as samplers keep it."""
        make = torch.Generator().manual_seed(1)
        config = self.preset.twin
        video = torch.randn(1, config.video.in_channels, *self.preset.grid, generator=make)
        audio = torch.randn(1, config.audio.in_channels, self.preset.steps, generator=make)
        return AV(video.to(self.device), audio.to(self.device))

    def time(self) -> AV[Tensor]:
        """One level for all."""
        return AV(torch.tensor([0.5], device=self.device), torch.tensor([0.5], device=self.device))

    def clean_first(self) -> Tensor:
        """(1, F) of video: the first frame given, as with an image."""
        t = torch.full((1, self.preset.grid[0]), 0.5, device=self.device)
        t[:, 0] = 0
        return t

    def told(self, seed: int = 2) -> Conditions:
        """A text of `words` rows for both modalities."""
        shape = (1, self.preset.words, self.preset.twin.video.text_width)
        text = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)
        mask = torch.ones(shape[:2], dtype=torch.bool, device=self.device)
        return Conditions(text=AV(text, text), text_mask=AV(mask, mask))

    def padded(self) -> Tensor:
        """The same text with zero rows up to the model's own length, as diffusers is given it."""
        text = self.told().text
        assert text is not None
        missing = self.preset.twin.video.text_length - self.preset.words
        return nn.functional.pad(text["video"], (0, 0, 0, missing))
