"""Discriminator heads on the block outputs of any backbone here: 3-D convolutions for video, 1-D for audio.

Shape letters: B batch, F latent frames, H, W, A audio latent steps, L tokens, D width, R regions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError, ShapeError, one_of

_CONVOLUTION = {"video": nn.Conv3d, "audio": nn.Conv1d}


@dataclass(frozen=True)
class DiscriminatorConfig:
    """taps: the blocks read, as in objectives.gan.GAN. widths: token width D of the backbone, per modality judged.

    hidden: channels of the heads.
    """

    taps: tuple[str, ...]
    widths: AV[int] = field(default_factory=lambda: AV(256, 256))
    hidden: int = 64

    def build(self) -> Discriminator:
        """The heads, randomly initialised."""
        return Discriminator(self)


class Head(nn.Module):
    """Two convolutions over the tokens' grid, the second with stride 2 in time and space, then one logit per cell."""

    def __init__(self, width: int, hidden: int, convolution: type[nn.Conv1d] | type[nn.Conv3d]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.near = convolution(width, hidden, 3, padding=1)
        self.far = convolution(hidden, hidden, 3, stride=2, padding=1)
        self.out = convolution(hidden, 1, 1)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Logits (B, R): means over the grid of x (B, D, ...), weighted by `weights` (B, R, ...) of the latents."""
        # contiguous: torch 2.13 on a CPU crashes in the backward pass of convolutions over transposed tokens
        x = self.norm(x.to(self.out.weight.dtype).contiguous())
        x = self.out(F.silu(self.far(F.silu(self.near(x)))))
        pool: Any = F.adaptive_avg_pool3d if weights.ndim == 5 else F.adaptive_avg_pool1d
        share = pool(weights.to(x), x.shape[2:])
        total = share.flatten(2).sum(2)
        # a region that is nowhere says nothing: its logit is 0, without gradient
        return (share * x).flatten(2).sum(2) / total.clamp_min(torch.finfo(x.dtype).eps)


class Discriminator(nn.Module):
    """One head per tap and modality."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleList(Head(width, config.hidden, _CONVOLUTION[name]) for _ in config.taps)
                for name, width in config.widths.items()
            }
        )

    def forward(self, features: Mapping[str, Any], weights: AV[Tensor]) -> AV[Tensor]:
        """Logits per modality (B, taps R).

        features: tap to what the block put out. weights: per modality (B, R, F, H, W) or (B, R, A), how much each
        latent cell counts in each region. Raises ConfigError when a tap is missing.
        """
        missing = [name for name in self.config.taps if name not in features]
        if missing:
            raise one_of("DiscriminatorConfig.taps", missing[0], features)
        if any(name not in self.heads for name in weights.modalities):
            raise ConfigError(
                f"DiscriminatorConfig.widths: has {', '.join(self.heads)}, the batch {', '.join(weights.modalities)}"
            )
        grids = [on_grid(features[name], weights) for name in self.config.taps]
        return AV(**{name: self._judge(name, [grid[name] for grid in grids], w) for name, w in weights.items()})

    def _judge(self, name: str, grids: list[Tensor], weights: Tensor) -> Tensor:
        heads: nn.ModuleList = self.heads[name]  # type: ignore[assignment]
        return torch.cat([head(grid, weights) for head, grid in zip(heads, grids, strict=True)], dim=1)


def on_grid(output: Any, like: AV[Tensor]) -> AV[Tensor]:  # noqa: ANN401
    """A block's output as grids: video (B, D, F, h, w), audio (B, D, A).

    output: tokens (B, L, D) of all modalities, video first, frame by frame and row by row; or tokens per modality by
    name; or either as the first of a tuple. like: latents, (B, C, F, H, W) and (B, C, A), whose modalities are present.
    Patches are square and within a frame; audio has a token per latent step.
    Raises ShapeError when the tokens do not fit.
    """
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, Mapping):
        return AV(**{name: _grid(output[name], x) for name, x in like.items()})
    steps = like["audio"].shape[2] if "audio" in like else 0
    parts = {name: _grid(part, like[name]) for name, part in _split(output, like.modalities, steps).items()}
    return AV(**parts)


def _split(tokens: Tensor, names: tuple[str, ...], steps: int) -> dict[str, Tensor]:
    """Joint tokens per modality; `steps` are the audio's, at the end."""
    if names == ("audio",):
        return {"audio": tokens}
    video = tokens.shape[1] - steps
    return {"video": tokens[:, :video], "audio": tokens[:, video:]} if "audio" in names else {"video": tokens}


def _grid(tokens: Tensor, like: Tensor) -> Tensor:
    count, cells = tokens.shape[1], like.shape[2:]
    if like.ndim == 3:
        if count != cells[0]:
            raise ShapeError(f"{count} audio tokens do not fit {cells[0]} latent steps")
        return tokens.transpose(1, 2)
    frames, height, width = cells
    patch = math.isqrt(frames * height * width // max(1, count))
    if not patch or height % patch or width % patch or count * patch**2 != frames * height * width:
        raise ShapeError(
            f"{count} video tokens do not form {frames} frames of square patches of {height} x {width} cells"
        )
    return tokens.unflatten(1, (frames, height // patch, width // patch)).movedim(-1, 1)
