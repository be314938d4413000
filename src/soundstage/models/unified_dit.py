"""UnifiedDiT (system A): one trunk over video and audio tokens that meet in every block's self-attention.

Rotary positions are in seconds, so a frame and the sound of the same instant stand at the same place. Modulation is
adaLN-single (arXiv:2310.00426, section 2.3) of low rank, one per modality.
Shape letters: B batch, F latent frames, H, W, C, A audio latent steps, L tokens, S text tokens, D width, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.causal import Chunking
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ShapeError, one_of
from soundstage.models.layers.attention import Attention, CrossAttention, SelfAttention, attend
from soundstage.models.layers.rotary import angles
from soundstage.models.text.bytes import ByteText, ByteTextConfig

SMALL = AV(
    video=StreamGeometry(Fraction(16), 4, channels=32, spatial_stride=16, size=(64, 64), causal_first=True),
    audio=StreamGeometry(Fraction(16000), 1024, channels=32),
)
"""What the codecs trained here give (models.codecs)."""

LARGE = AV(
    video=StreamGeometry(Fraction(24), 4, channels=48, spatial_stride=16, size=(704, 1280), causal_first=True),
    audio=StreamGeometry(Fraction(16000), 512, channels=20),
)
"""What the Wan2.2 and MMAudio 16 kHz autoencoders give."""


@dataclass(frozen=True)
class UnifiedDiTConfig:
    """geometry: of the codec it denoises. patch: latent cells per video token, square. rank: of the modulation.

    seconds: length of the clips it is trained on; any other length fits, positions being in seconds.
    """

    geometry: AV[StreamGeometry] = SMALL
    width: int = 256
    depth: int = 6
    num_heads: int = 4
    mlp_ratio: float = 2.0
    patch: int = 2
    rank: int = 32
    text: ByteTextConfig = field(default_factory=ByteTextConfig)
    text_inner: int = 96
    seconds: Fraction = Fraction(33, 16)

    @classmethod
    def parse(cls, text: str) -> UnifiedDiTConfig:
        """A size by name: `model=3b`."""
        if text not in SIZES:
            raise one_of("model", text, SIZES)
        return SIZES[text]

    @property
    def chunking(self) -> Chunking | None:
        """How the model goes through a clip in chunks; None: it reads whole clips."""
        return None

    def as_causal(self, chunking: Chunking) -> UnifiedDiTConfig:
        """The same made block-causal (models.causal)."""
        from soundstage.models.causal import CausalDiTConfig

        return CausalDiTConfig.of(self, chunk=chunking.seconds, window=chunking.window)

    @property
    def shape(self) -> AV[tuple[int, ...]]:
        """Latent shape of one clip: video (C, F, H, W), audio (C, A)."""

        def latent(g: StreamGeometry) -> tuple[int, ...]:
            length = -(-self.seconds * g.rate // 1)
            steps = g.steps(int(length))
            cells = tuple(side // g.spatial_stride for side in g.size) if g.spatial_stride > 1 else ()
            return (g.channels, steps, *cells)

        return self.geometry.map(latent)

    def describe(self) -> dict[str, Any]:
        """Tokens, parameters and FLOPs of one clip, on the meta device (formulas: docs/training.md)."""
        with torch.device("meta"):
            module = self.build()
        parameters = sum(p.numel() for p in module.parameters())
        tokens = {n: math.prod(s[1:]) // (self.patch**2 if len(s) > 2 else 1) for n, s in self.shape.items()}
        length, d, words = sum(tokens.values()), self.width, self.text.max_words + 1
        attention = 8 * length * d * d + 4 * length**2 * d
        text = 4 * length * d * self.text_inner + 4 * words * (self.text.width + length) * self.text_inner
        layer = attention + text + 4 * length * d * int(d * self.mlp_ratio)
        ends = sum(4 * tokens[n] * c * d for n, c in module.token_channels.items())
        return {"tokens": tokens, "parameters": parameters, "flops": self.depth * layer + ends}

    def build(self) -> UnifiedDiT:
        """The module, randomly initialised."""
        return UnifiedDiT(self)


class Block(nn.Module):
    """Self-attention, text cross-attention and MLP, each modulated or gated per modality and per latent step."""

    def __init__(self, config: UnifiedDiTConfig, num_modalities: int) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.table = nn.Parameter(torch.randn(num_modalities, 6, width) * width**-0.5)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, config.num_heads)
        self.norm_text = nn.LayerNorm(width)
        self.read_text = CrossAttention(width, config.text.width, config.text_inner, config.num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def forward(
        self,
        x_BLD: Tensor,
        mods: list[Tensor],
        rows: list[int],
        lengths: list[int],
        angles_BLK: Tensor,
        text: Tensor,
        mask: Tensor,
        attend: Attention = attend,
    ) -> Tensor:
        """mods: per modality (B, 1 or F, 6, D) and its row in the block's own table; gates last of each triple.

        lengths: tokens of each modality. text, mask: word features and which of them exist. attend: who reads whom.
        """
        mods = [mod + self.table[row].to(mod.dtype) for mod, row in zip(mods, rows, strict=True)]
        y = self.attention(_modulate(self.norm(x_BLD), mods, lengths, 0), angles_BLK, attend)
        x = x_BLD + _scale(y, mods, lengths, 2)
        x = x + self.read_text(self.norm_text(x), text, mask)
        return x + _scale(self.mlp(_modulate(self.norm(x), mods, lengths, 3)), mods, lengths, 5)


class UnifiedDiT(nn.Module):
    """A Denoiser over AV latents: video (B, C, F, H, W), audio (B, C, A); either may be absent."""

    def __init__(self, config: UnifiedDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, names = config.width, config.geometry.modalities
        self.token_channels = config.geometry.map(
            lambda g: g.channels * (config.patch**2 if g.spatial_stride > 1 else 1)
        )
        self.embed = nn.ModuleDict({n: nn.Linear(c, width) for n, c in self.token_channels.items()})
        self.place = nn.ModuleDict({n: nn.Linear(3 * 16, width) for n in names})
        self.text = ByteText(config.text)
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, config.rank))
        self.span = nn.Linear(128, config.rank, bias=False)
        self.modulation = nn.ModuleDict({n: nn.Linear(config.rank, 6 * width) for n in names})
        self.blocks = nn.ModuleList(Block(config, len(names)) for _ in range(config.depth))
        self.final_table = nn.ParameterDict({n: torch.zeros(2, width) for n in names})
        self.final_modulation = nn.ModuleDict({n: nn.Linear(config.rank, 2 * width) for n in names})
        self.head = nn.ModuleDict({n: nn.Linear(width, c) for n, c in self.token_channels.items()})
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.span.weight)
        for zeroed in (*self.modulation.values(), *self.final_modulation.values(), *self.head.values()):
            nn.init.zeros_(zeroed.weight)  # type: ignore[arg-type]
        for block in self.blocks:
            nn.init.zeros_(block.read_text.out.weight)  # type: ignore[union-attr, arg-type]

    def forward(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        """Velocity noise - x0 of the present modalities; t and r per modality (B,) or (B, steps)."""
        return self._through(x_t, t, cond, r, [attend] * len(self.blocks))

    def _through(
        self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, r: AV[Tensor] | None, attends: Sequence[Attention]
    ) -> AV[Tensor]:
        """The forward pass, with who reads whom in each block."""
        tokens = AV(**{name: self._tokens(name, x) for name, x in x_t.items()})
        positions = AV(**{name: self._positions(name, x, cond) for name, x in x_t.items()})
        clock = AV(**{n: self._clock(t[n], None if r is None else r[n]) for n in x_t.modalities})
        x = torch.cat([tokens[n] + self.place[n](_waves(positions[n])) for n in x_t.modalities], dim=1)
        rotation = angles(
            torch.cat(list(positions.values()), dim=1),
            self.config.width // self.config.num_heads,
            shortest=(0.1, 0.5, 0.5),
            longest=(20.0, 4.0, 4.0),
        )
        text, text_mask = self._read(cond, x_t)
        shared = {n: F.silu(clock[n]) for n in x_t.modalities}
        base = {n: self.modulation[n](shared[n]).unflatten(-1, (6, -1)) for n in x_t.modalities}
        rows = [self.config.geometry.modalities.index(n) for n in base]
        lengths = [part.shape[1] for part in tokens.values()]
        for block, each in zip(self.blocks, attends, strict=True):
            x = block(x, list(base.values()), rows, lengths, rotation, text, text_mask, each)
        return self._heads(x, x_t, lengths, shared)

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        """(B, C, F, H, W) or (B, C, A) -> (B, L, D)."""
        if x.shape[1] != self.config.geometry[name].channels:
            raise ShapeError(
                f"{name} latents have {x.shape[1]} channels, the model {self.config.geometry[name].channels}"
            )
        if x.ndim == 5:
            p = self.config.patch
            if x.shape[3] % p or x.shape[4] % p:
                raise ShapeError(f"latents of {x.shape[3]} x {x.shape[4]} cells do not divide into patches of {p}")
            x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # B C F h p w p
            x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        else:
            x = x.transpose(1, 2)
        return self.embed[name](x)

    def _untokens(self, x_BLC: Tensor, like: Tensor) -> Tensor:
        if like.ndim == 3:
            return x_BLC.transpose(1, 2)
        p, (frames, height, width) = self.config.patch, like.shape[2:]
        x = x_BLC.reshape(len(x_BLC), frames, height // p, width // p, like.shape[1], p, p)
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)

    def _positions(self, name: str, x: Tensor, cond: Conditions) -> Tensor:
        """(1 or B, L, 3): seconds, height and width in frame heights from the centre."""
        if cond.positions is not None and name in cond.positions:
            seconds = cond.positions[name].to(x.device, torch.float32)
        else:
            seconds = torch.tensor(self.config.geometry[name].seconds(x.shape[2]), device=x.device)[None]
        if x.ndim == 3:
            return F.pad(seconds[..., None], (0, 2))
        rows, columns = (x.shape[3] // self.config.patch, x.shape[4] // self.config.patch)
        y = (torch.arange(rows, device=x.device) + 0.5) / rows - 0.5
        z = ((torch.arange(columns, device=x.device) + 0.5) / columns - 0.5) * columns / rows
        batch, steps = seconds.shape
        shape = (batch, steps, rows, columns)
        parts = (seconds[:, :, None, None], y[None, None, :, None], z[None, None, None, :])
        return torch.stack([part.expand(shape) for part in parts], dim=-1).flatten(1, 3)

    def _clock(self, t: Tensor, r: Tensor | None) -> Tensor:
        """Time embedding (B, 1 or F, rank); r = t adds exactly nothing."""
        t = t[:, None] if t.ndim == 1 else t
        embedded = self.time(_sinusoid(t).to(self.time[0].weight.dtype))  # type: ignore[union-attr]
        if r is None:
            return embedded
        r = r[:, None] if r.ndim == 1 else r
        span = _sinusoid(t - r) - _sinusoid(torch.zeros_like(t - r))
        return embedded + self.span(span.to(embedded.dtype))

    def _read(self, cond: Conditions, x_t: AV[Tensor]) -> tuple[Tensor, Tensor]:
        first = next(x_t.values())
        if cond.text is None:
            ids = torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)
            mask = torch.zeros_like(ids, dtype=torch.bool)
        else:
            name = cond.text.modalities[0]
            ids = cond.text[name]
            mask = cond.text_mask[name] if cond.text_mask is not None else torch.ones_like(ids, dtype=torch.bool)
        return self.text(ids, mask)

    def _heads(self, x_BLD: Tensor, x_t: AV[Tensor], lengths: list[int], shared: dict[str, Tensor]) -> AV[Tensor]:
        out = {}
        for name, part in zip(x_t.modalities, x_BLD.split(lengths, dim=1), strict=True):
            mod = self.final_modulation[name](shared[name]).unflatten(-1, (2, -1)) + self.final_table[name]
            y = _modulate(F.layer_norm(part, part.shape[-1:]), [mod], [part.shape[1]], 0)
            out[name] = self._untokens(self.head[name](y), x_t[name]).to(x_t[name].dtype)
        return AV(**out)


def _modulate(x_BLD: Tensor, mods: list[Tensor], lengths: list[int], at: int) -> Tensor:
    """x (1 + scale) + shift, with mod[..., at, :] the shift and the next the scale, spread over each step's tokens."""
    parts = []
    for part, mod in zip(x_BLD.split(lengths, dim=1), mods, strict=True):
        shift, scale = mod[:, :, None, at], mod[:, :, None, at + 1]
        parts.append((part.unflatten(1, (mod.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2))
    return torch.cat(parts, dim=1)


def _scale(y_BLD: Tensor, mods: list[Tensor], lengths: list[int], at: int) -> Tensor:
    """Gate y by mod[..., at, :]."""
    parts = [
        (part.unflatten(1, (mod.shape[1], -1)) * mod[:, :, None, at]).flatten(1, 2)
        for part, mod in zip(y_BLD.split(lengths, dim=1), mods, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _size(width: int, depth: int, num_heads: int, **changes: Any) -> UnifiedDiTConfig:  # noqa: ANN401
    text = ByteTextConfig(width=min(1024, width), depth=4, num_heads=8)
    settings = {"mlp_ratio": 4.0, "rank": 256, "text_inner": width, "text": text, **changes}
    return UnifiedDiTConfig(width=width, depth=depth, num_heads=num_heads, **settings)


SIZES = {
    "tiny": UnifiedDiTConfig(),
    "small": _size(384, 12, 6),
    "base": _size(768, 12, 12, geometry=LARGE, seconds=Fraction(121, 24)),
    "1b": _size(1792, 24, 14, geometry=LARGE, seconds=Fraction(121, 24)),
    "3b": _size(2560, 32, 20, geometry=LARGE, seconds=Fraction(121, 24)),
    "7b": _size(3840, 32, 30, geometry=LARGE, seconds=Fraction(121, 24)),
}
"""Sizes by name; from "base" on for the latents of the published autoencoders."""


def _sinusoid(t: Tensor) -> Tensor:
    """Fourier features (..., 128) of times in [0, 1], wavelengths from 4 down to 0.004."""
    frequencies = 0.25 * torch.logspace(0, 3, 64, device=t.device)
    phase = 2 * torch.pi * t.float()[..., None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _waves(position_BLP: Tensor) -> Tensor:
    """Fourier features (B, L, 3 * 16) of seconds and frame heights, wavelengths 8 down to 0.0625."""
    phase = 2 * torch.pi * position_BLP[..., None] * 2.0 ** torch.arange(-3, 5, device=position_BLP.device)
    return torch.cat([phase.cos(), phase.sin()], dim=-1).flatten(2)
