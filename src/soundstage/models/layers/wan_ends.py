"""Both ends of a Wan tower: latents, time, text and reference image in; velocity out.

Shape letters: B batch, L tokens, F latent frames, H, W, C, A audio latent steps, S text tokens, R image tokens,
D width, G rows of modulation, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.attention import Memo, Precise, Reads, Tokens
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, ShapeError
from soundstage.models.layers.wan_block import Stream, TextKV, layer_norm, modulate, typed
from soundstage.models.layers.wan_rotary import rotations, unturned

if TYPE_CHECKING:
    from soundstage.models.wan import WanConfig

Latents = Tensor | Sequence[Tensor]
"""A batch (B, C, ...), or unbatched latents (C, ...) of several sizes."""


class GatedConv(nn.Module):
    """w2(silu(w1 x) * w3 x) by convolutions over 7 steps."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Conv1d(width, hidden, 7, padding=3, bias=False)
        self.w2 = nn.Conv1d(hidden, width, 7, padding=3, bias=False)
        self.w3 = nn.Conv1d(width, hidden, 7, padding=3, bias=False)

    def forward(self, x_BDA: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BDA)) * self.w3(x_BDA))


class ImageEmbedding(nn.Module):
    """Features of a reference image (B, R, image width) to the tower's width."""

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_width),
            nn.Linear(image_width, image_width),
            nn.GELU(),
            nn.Linear(image_width, width),
            nn.LayerNorm(width),
        )
        self.precise = Precise()

    def forward(self, x_BRD: Tensor) -> Tensor:
        before, first, act, second, after = self.proj
        x = second(act(first(typed(first, layer_norm(before, self.precise(x_BRD))))))
        return layer_norm(after, self.precise(x)).to(x.dtype)


class Head(nn.Module):
    """Modulated norm and projection of each token to its patch, channels last."""

    def __init__(self, width: int, features: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.head = nn.Linear(width, features)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) * width**-0.5)

    def forward(self, x_BLD: Tensor, clock_BGD: Tensor, index: Tensor | None) -> Tensor:
        rows = clock_BGD[:, :, None] + self.modulation.to(clock_BGD.dtype)
        shift, scale = rows.to(x_BLD.dtype).unbind(2)
        return self.head(typed(self.head, modulate(layer_norm(self.norm, x_BLD), shift, scale, index)))


@dataclass(frozen=True)
class Layout:
    """Where the samples of a batch stand in a sequence of tokens.

    grids: (F, H, W) or (A,) in tokens, one per sample, or one for all. batch: samples. length: tokens of the sequence,
    padding included.
    """

    grids: tuple[tuple[int, ...], ...]
    batch: int
    length: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Real tokens of each sample."""
        counts = tuple(math.prod(grid) for grid in self.grids)
        return counts if len(counts) == self.batch else counts * self.batch

    @property
    def even(self) -> bool:
        """One size, nothing padded."""
        return len(self.grids) == 1 and math.prod(self.grids[0]) == self.length


class Order(NamedTuple):
    """How one tower is run in chunks of latent steps.

    chunks: in the latents of the call. reads, reads_other: as in Stream, of each block. start: steps before the call.
    before: the last `Ends.reach` latents of those steps (B, C, ...), None = there were none or nothing reaches them.
    """

    chunks: tuple[slice, ...]
    reads: Sequence[Reads]
    reads_other: Sequence[Reads]
    start: int = 0
    before: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Side:
    """One tower's run: what its blocks are told, layout, time embedding (B, G, D), and the text's keys by block."""

    stream: Stream
    layout: Layout
    clock: Tensor
    kv: list[TextKV | None]
    keeps: bool
    order: Order | None = None

    def told(self, block: int) -> Stream:
        """What one block is told."""
        if self.order is None:
            return self.stream
        return self.stream._replace(reads=self.order.reads[block], reads_other=self.order.reads_other[block])

    def keep(self, block: int, kv: TextKV) -> None:
        """Hold a block's keys and values where they outlive the call."""
        if self.keeps:
            self.kv[block] = kv


class Ends(nn.Module):
    """Embeddings, head and the parameter-free parts of one tower, under the published names."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.modality == "video":
            self.patch_embedding = nn.Conv3d(config.in_channels, width, config.patch, config.patch)
            self.reach = 0  # latent steps to either side that a token is made of
        else:
            first = nn.Conv1d(config.in_channels, width, 7, padding=3)
            self.patch_embedding = nn.Sequential(first, nn.SiLU(), GatedConv(width, config.conv_hidden))
            self.reach = 9  # three convolutions of 7 steps, one after another
        self.text_embedding = _mlp(config.text_width, width, nn.GELU(approximate="tanh"))
        self.time_embedding = _mlp(config.frequencies, width, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if config.two_times:
            self.span_embedding = span_embedding(config)
        if config.image_width is not None:
            self.img_emb = ImageEmbedding(config.image_width, width)
        self.head = Head(width, config.out_channels * math.prod(config.patch), config.eps)
        self.tokens, self.memo, self.precise = Tokens(), Memo(), Precise()

    def enter(
        self,
        x: Latents,
        t: Tensor,
        cond: Conditions,
        length: int | None = None,
        per_token: bool = False,
        r: Tensor | None = None,
        order: Order | None = None,
    ) -> tuple[Tensor, Side]:
        """Tokens (B, L, D) of this process and all that the blocks are told.

        x: latents with `in_channels` channels. t (B,) or (B, F) in [0, 1], with per_token (B, L). length: tokens to pad
        the sequence to. r: of a flow map, as t; None = t. order: where x, a batch, is run in chunks. Raises ShapeError
        where something does not fit.
        """
        x_BLD, layout = self._embed(x, length, order)
        clock, rows = self._clock(t, layout, per_token, r)
        text, image, kv, keeps = self._read(cond, layout.batch, x_BLD.device)
        counts = layout.counts
        full = all(count == self.tokens.padded(layout.length) for count in counts)
        stream = Stream(
            rows,
            self._index(layout, rows.shape[1], per_token, x_BLD.device),
            self._rotation(layout, x_BLD, 0 if order is None else order.start),
            None if full else counts,
            text,
            image,
        )
        return self.tokens.split(x_BLD), Side(stream, layout, clock, kv, keeps, order)

    def leave(self, x_BLD: Tensor, side: Side, like: Latents) -> Latents:
        """Velocity in the form, size and type of `like`."""
        y = self.head(x_BLD, side.clock, side.stream.index)
        y = self.tokens.gather(y, side.layout.length)
        grids = side.layout.grids
        if isinstance(like, Tensor):
            return self._unpatched(y[:, : math.prod(grids[0])], grids[0]).to(like.dtype)
        grids = grids if len(grids) == len(like) else grids * len(like)
        return [
            self._unpatched(y[i : i + 1, : math.prod(grid)], grid)[0].to(sample.dtype)
            for i, (grid, sample) in enumerate(zip(grids, like, strict=True))
        ]

    def _embed(self, x: Latents, length: int | None, order: Order | None) -> tuple[Tensor, Layout]:
        """Tokens (B, L, D) of the whole sequence, zeros behind each sample's own."""
        if not isinstance(x, Tensor) and all(sample.shape == x[0].shape for sample in x):
            x = torch.stack(list(x))
        parts = [x] if isinstance(x, Tensor) else [sample[None] for sample in x]
        grids = tuple(self._grid(part) for part in parts)
        longest = max(math.prod(grid) for grid in grids)
        if length is not None and length < longest:
            raise ShapeError(f"a sequence of {length} tokens does not hold {longest}; give at least that many")
        layout = Layout(grids, parts[0].shape[0] if isinstance(x, Tensor) else len(parts), length or longest)
        kind = next(self.patch_embedding.parameters()).dtype
        made = (self.patch_embedding(part.to(kind)) if order is None else self._chunks(part, order) for part in parts)
        tokens = [part.flatten(2).transpose(1, 2) for part in made]
        if layout.even:
            return self.precise(tokens[0].contiguous()), layout
        padded = [F.pad(part, (0, 0, 0, layout.length - part.shape[1])) for part in tokens]
        return self.precise(torch.cat(padded)), layout

    def _chunks(self, x: Tensor, order: Order) -> Tensor:
        """Patches embedded chunk by chunk: each is that of the clip which ends with the chunk.

        So the last `reach` steps of a chunk are made without those that follow them; all others are the same as those
        of the whole clip. Before it, only the steps within reach are computed again.
        """
        x = x.to(next(self.patch_embedding.parameters()).dtype)
        known = 0 if order.before is None else order.before.shape[2]
        x = x if order.before is None else torch.cat([order.before.to(x.dtype), x], 2)
        parts = []
        for chunk in order.chunks:
            begin, end = known + chunk.start, known + chunk.stop
            first = max(0, begin - self.reach)
            parts.append(self.patch_embedding(x[:, :, first:end])[:, :, begin - first :])
        return torch.cat(parts, 2)

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        config = self.config
        if x.ndim != 2 + len(config.patch):
            axes = ", ".join("FHW" if config.modality == "video" else "A")
            raise ShapeError(f"{config.modality} latents are (B, C, {axes}), not {tuple(x.shape)}")
        if x.shape[1] != config.in_channels:
            raise ShapeError(
                f"{config.modality} latents have {x.shape[1]} channels and the model takes {config.in_channels}; "
                "encode them with the model's own codec"
            )
        if any(size % patch for size, patch in zip(x.shape[2:], config.patch, strict=True)):
            raise ShapeError(
                f"latents of {tuple(x.shape[2:])} do not divide into patches of {config.patch}; change the clip's size"
            )
        return tuple(size // patch for size, patch in zip(x.shape[2:], config.patch, strict=True))

    def _clock(self, t: Tensor, layout: Layout, per_token: bool, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Time embedding (B, G, D) and modulation (B, G, 6, D), once per row of t."""
        span = torch.zeros_like(t) if r is None else t - r
        span = span[:, None] if span.ndim == 1 else span
        t = t[:, None] if t.ndim == 1 else t
        steps = layout.length if per_token else max(grid[0] for grid in layout.grids)
        if t.shape[0] != layout.batch or t.shape[1] not in (1, steps):
            batch, name = layout.batch, self.config.modality
            raise ShapeError(f"t.{name}: {tuple(t.shape)} fits neither ({batch},) nor ({batch}, {steps})")
        waves = sinusoid(1000 * t.double(), self.config.frequencies)
        clock = self.time_embedding(typed(self.time_embedding[0], waves))
        if self.config.two_times:
            waves = sinusoid(math.tau * span.double(), self.config.frequencies)
            clock = clock + self.span_embedding(typed(self.span_embedding[0], waves))
        rows = self.time_projection(typed(self.time_projection[1], clock))
        return self.precise(clock), self.precise(rows.unflatten(-1, (6, -1)))

    def _index(self, layout: Layout, rows: int, per_token: bool, device: torch.device) -> Tensor | None:
        """The row of each token (B, L), counted through the batch, where tokens do not stand in equal groups."""
        if rows == 1 or (self.tokens.size == 1 and (per_token or layout.even)):
            return None
        grids = layout.grids if len(layout.grids) == layout.batch else layout.grids * layout.batch
        place = torch.arange(layout.length, device=device)
        parts = [place if per_token else (place // math.prod(grid[1:])).clamp(max=rows - 1) for grid in grids]
        return self.tokens.split(torch.stack([part + rows * i for i, part in enumerate(parts)]))

    def _rotation(self, layout: Layout, like: Tensor, start: int) -> Tensor:
        """(1 or B, L, 1, K/2, 2) of this process's tokens, in the residual stream's type; padding stays as it is."""
        config = self.config
        tables = []
        for grid in layout.grids:
            table = rotations(grid, config.width // config.num_heads, config.time_scale, like.device, start)
            missing = layout.length - table.shape[0]
            if missing:
                table = torch.cat([table, unturned(missing, table.shape[1], device=like.device)])
            tables.append(table.to(like.dtype))
        return self.tokens.split(torch.stack(tables)[:, :, None])

    def _read(
        self, cond: Conditions, batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None, list[TextKV | None], bool]:
        """Text (B, S, D), image (B, R, D), the list of keys by block, and whether it outlives this call."""
        name = self.config.modality
        text = cond.text[name] if cond.text is not None and name in cond.text else None
        mask = cond.text_mask[name] if text is not None and cond.text_mask is not None else None
        image = self._image(cond)
        for told, value in (("text", text), ("reference", image)):
            if value is not None and value.shape[0] != batch:
                raise ShapeError(f"Conditions.{told}: {value.shape[0]} samples, and the latents have {batch}")
        told = [value for value in (text, mask, image) if value is not None]
        kept: list[TextKV | None] = [None] * self.config.depth

        def compute() -> tuple[Tensor, Tensor | None, list[TextKV | None]]:
            return self._text(text, mask, batch, device), None if image is None else self.img_emb(image), kept

        keeps = bool(told) and self.memo.enabled and not torch.is_grad_enabled()
        return (*(self.memo(told, compute) if keeps else compute()), keeps)

    def _text(self, text: Tensor | None, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """The text embedded with zero rows up to text_length, which are attended as in training."""
        config, kind = self.config, self.text_embedding[0].bias.dtype
        if text is None:
            shape = (batch, config.text_length, config.text_width)
            return self.text_embedding(torch.zeros(shape, dtype=kind, device=device))
        if text.ndim != 3 or text.shape[2] != config.text_width or text.shape[1] > config.text_length:
            raise ShapeError(
                f"Conditions.text.{config.modality}: {tuple(text.shape)}; the model reads up to {config.text_length} "
                f"rows of {config.text_width} numbers"
            )
        text = text.to(kind) if mask is None else text.to(kind).masked_fill(~mask[..., None], 0)
        return self.text_embedding(F.pad(text, (0, 0, 0, config.text_length - text.shape[1])))

    def _image(self, cond: Conditions) -> Tensor | None:
        width = self.config.image_width
        if width is None:
            if cond.reference is not None:
                raise ConfigError('Conditions.reference: this model reads none; leave it out: cond.drop("reference")')
            return None
        if cond.reference is None:
            raise ConfigError(f"Conditions.reference: this model needs an image's features (B, R, {width}); give one")
        if cond.reference.ndim != 3 or cond.reference.shape[2] != width:
            raise ShapeError(f"Conditions.reference: {tuple(cond.reference.shape)} is not (B, R, {width})")
        return cond.reference

    def _unpatched(self, y_BLC: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, L, patch * C) -> (B, C, F, H, W) or (B, C, A); channels are the fastest within a patch."""
        patch, axes = self.config.patch, len(grid)
        y = y_BLC.reshape(len(y_BLC), *grid, *patch, -1)
        order = [axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair]
        y = y.permute(0, 2 * axes + 1, *order)
        return y.reshape(*y.shape[:2], *(n * p for n, p in zip(grid, patch, strict=True)))


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines (..., width) of t at the frequencies 10000^(-2i/width), in the type of t."""
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def span_embedding(config: WanConfig) -> nn.Sequential:
    """Of t - r, slow waves so that derivatives by time stay small; its last layer 0, so that it says nothing yet."""
    made = _mlp(config.frequencies, config.width, nn.SiLU())
    nn.init.zeros_(made[2].weight)
    nn.init.zeros_(made[2].bias)
    return made


def initialise(module: nn.Module) -> None:
    """Weights for training from scratch, as Wan does it.

    Linear and convolution: Xavier uniform over the flattened kernel, biases 0; text and time embeddings: normal, 0.02;
    head: 0; fusion: a tenth of Xavier, in both towers (the published code does so in the video tower alone).
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv3d):
            if "text_embedding" in name or "time_embedding" in name:
                nn.init.normal_(part.weight, std=0.02)
            elif name.endswith(("head.head", "span_embedding.2")):
                nn.init.zeros_(part.weight)
            else:
                nn.init.xavier_uniform_(part.weight.flatten(1))
            if name.endswith(("k_fusion", "v_fusion")):
                with torch.no_grad():
                    part.weight.div_(10)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _mlp(inner: int, width: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, width), act, nn.Linear(width, width))
