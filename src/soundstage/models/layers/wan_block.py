"""The block of Wan and of both of Ovi's towers: self-attention, text (and fused) cross-attention, MLP.

Modulation comes as rows, one per distinct time step, and is spread over that step's tokens where it is used.
Shape letters: B batch, L tokens, S text tokens, R image tokens, D width, N heads, K head width, G rows of modulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soundstage.core.attention import Attend, Lengths, Precise, Reads
from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.models.layers.wan_rotary import rotate


class TextKV(NamedTuple):
    """Keys and values (B, S, N, K) of the text and, where there is one, of the reference image."""

    text: tuple[Tensor, Tensor]
    image: tuple[Tensor, Tensor] | None


class Stream(NamedTuple):
    """What the blocks of one tower are told beside its tokens; the same for every block but for who reads whom.

    rows: modulation (B, G, 6, D) without the block's own. index: which of the B * G rows each token (B, L) takes; None
    where each row is for L / G tokens in order. rotation: (1 or B, L, 1, K/2, 2). lengths: real tokens of each sample,
    None = all. text (B, S, D), image (B, R, D): what the cross-attention reads. reads: which tokens of its own tower
    each one reads, reads_other: which of the other tower; None = all.
    """

    rows: Tensor
    index: Tensor | None
    rotation: Tensor
    lengths: Lengths
    text: Tensor
    image: Tensor | None
    reads: Reads | None = None
    reads_other: Reads | None = None


class Other(NamedTuple):
    """The other tower's tokens (B, L, D), for fused cross-attention. reads: which of them each token reads."""

    x: Tensor
    rotation: Tensor
    lengths: Lengths
    reads: Reads | None = None


def typed(layer: nn.Module, x: Tensor) -> Tensor:
    """x in the layer's type: that of its bias, which stays what it was where weights are quantised."""
    return x.to(layer.bias.dtype)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm in the type of x, whatever the type of its weight."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in the type of x, whatever the type of its weight."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None) -> Tensor:
    """x (1 + scale) + shift; x (B, L, D), shift and scale (B, G, D) as in `Stream`."""
    if index is not None:
        return torch.addcmul(_taken(shift, index), x, 1 + _taken(scale, index))
    if shift.shape[1] == 1:
        return torch.addcmul(shift, x, 1 + scale)
    steps = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], steps, 1 + scale[:, :, None]).flatten(1, 2)


def gated(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """x + gate y; x and y (B, L, D), gate (B, G, D) as in `Stream`."""
    if index is not None:
        return torch.addcmul(x, y, _taken(gate, index))
    if gate.shape[1] == 1:
        return torch.addcmul(x, y, gate)
    steps = gate.shape[1]
    return torch.addcmul(x.unflatten(1, (steps, -1)), y.unflatten(1, (steps, -1)), gate[:, :, None]).flatten(1, 2)


def _taken(row: Tensor, index: Tensor) -> Tensor:
    return row.flatten(0, 1)[index]


class SelfAttention(nn.Module):
    """All tokens of a tower among themselves, with normalised and rotated queries and keys."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attend, self.precise = Attend(), Precise()

    def forward(self, x: Tensor, rotation: Tensor, lengths: Lengths, reads: Reads | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = typed(self.q, x)
        q = self._rotated(self.norm_q, self.q(x), rotation)
        k = self._rotated(self.norm_k, self.k(x), rotation)
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return self.o(self.attend(q, k, v, lengths, reads=reads).flatten(2))

    def _rotated(self, norm: nn.RMSNorm, x: Tensor, rotation: Tensor) -> Tensor:
        return rotate(rms_norm(norm, self.precise(x)).unflatten(-1, (self.num_heads, -1)), rotation)


class CrossAttention(nn.Module):
    """Tokens read the text; with `image` also a reference image, with `fused` also the other tower's tokens.

    One query serves all of them; it is rotated for the other tower alone. The results are added before the projection.
    """

    def __init__(self, width: int, num_heads: int, eps: float, *, image: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        if image:
            self.k_img, self.v_img = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_k_img = nn.RMSNorm(width, eps)
        if fused:
            self.k_fusion, self.v_fusion = nn.Linear(width, width), nn.Linear(width, width)
            self.pre_attn_norm_fusion = nn.LayerNorm(width, eps)
            self.norm_k_fusion = nn.RMSNorm(width, eps)
        self.attend, self.precise = Attend(), Precise()

    def keys(self, text: Tensor, image: Tensor | None) -> TextKV:
        """Keys and values of the text (B, S, D) and of the image (B, R, D)."""
        told = self._pair(self.k, self.v, self.norm_k, text)
        seen = self._pair(self.k_img, self.v_img, self.norm_k_img, image) if image is not None else None
        return TextKV(told, seen)

    def forward(self, x: Tensor, kv: TextKV, rotation: Tensor | None = None, other: Other | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). rotation: of x, needed with `other`."""
        q = self._heads(rms_norm(self.norm_q, self.precise(self.q(typed(self.q, x)))))
        out = self.attend(q, *kv.text, shared=True)
        if kv.image is not None:
            out = out + self.attend(q, *kv.image, shared=True)
        if other is not None and rotation is not None:
            out = out + self._fused(rotate(q, rotation), other)
        return self.o(out.flatten(2))

    def _fused(self, q: Tensor, other: Other) -> Tensor:
        read = typed(self.k_fusion, layer_norm(self.pre_attn_norm_fusion, other.x))
        k = self._heads(rms_norm(self.norm_k_fusion, self.precise(self.k_fusion(read))))
        v = self._heads(self.v_fusion(read))
        return self.attend(q, rotate(k, other.rotation), v, other.lengths, reads=other.reads)

    def _pair(self, to_k: nn.Linear, to_v: nn.Linear, norm: nn.RMSNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        x = typed(to_v, x)
        v = to_v(x)
        k = rms_norm(norm, self.precise(to_k(x))).to(v.dtype)
        return self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class WanBlock(nn.Module):
    """Self-attention, cross-attention, MLP on one tower's tokens.

    Its parts are methods so that a fused block can take turns between two towers; `forward` runs them in order.
    """

    def __init__(
        self, width: int, hidden: int, num_heads: int, eps: float, *, image: bool = False, fused: bool = False
    ) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, width) * width**-0.5)
        self.norm1 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(width, num_heads, eps)
        self.norm3 = nn.LayerNorm(width, eps)
        self.cross_attn = CrossAttention(width, num_heads, eps, image=image, fused=fused)
        self.norm2 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.precise = Precise()

    def forward(self, x: Tensor, stream: Stream, kv: TextKV | None = None) -> tuple[Tensor, TextKV]:
        """Tokens after the block, and the keys and values of the text: those given, or computed here."""
        x, rows = self.enter(x, stream)
        x = self.among(x, rows, stream)
        x, kv = self.across(x, stream, kv)
        return self.think(x, rows, stream), kv

    def enter(self, x: Tensor, stream: Stream) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens in the type of the residual stream; shift, scale, gate (B, G, D) of the attention, then of the MLP."""
        x = self.precise(x)
        return x, (stream.rows + self.modulation.to(stream.rows.dtype)).to(x.dtype).unbind(2)

    def among(self, x: Tensor, rows: tuple[Tensor, ...], stream: Stream) -> Tensor:
        """x plus self-attention."""
        y = modulate(layer_norm(self.norm1, x), rows[0], rows[1], stream.index)
        return gated(x, self.self_attn(y, stream.rotation, stream.lengths, stream.reads), rows[2], stream.index)

    def across(self, x: Tensor, stream: Stream, kv: TextKV | None, other: Other | None = None) -> tuple[Tensor, TextKV]:
        """x plus cross-attention, and the keys and values of the text."""
        kv = self.cross_attn.keys(stream.text, stream.image) if kv is None else kv
        return x + self.cross_attn(layer_norm(self.norm3, x), kv, stream.rotation, other), kv

    def think(self, x: Tensor, rows: tuple[Tensor, ...], stream: Stream) -> Tensor:
        """x plus the MLP."""
        y = modulate(layer_norm(self.norm2, x), rows[3], rows[4], stream.index)
        return gated(x, self.ffn(typed(self.ffn[0], y)), rows[5], stream.index)


def through(block: nn.Module, checkpointing: bool, *args: Any) -> Any:  # noqa: ANN401
    """The block's outputs; with checkpointing its inner values are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


@dataclass(frozen=True, eq=False)
class Skipping:
    """A denoiser with some of its blocks left out, on the same weights: the weak side of skip-layer guidance."""

    denoiser: Callable[..., AV[Tensor]]
    blocks: tuple[int, ...]

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return self.denoiser(x_t, t, cond, r=r, skip=self.blocks)


def skipping(denoiser: Callable[..., AV[Tensor]], depth: int, blocks: Iterable[int]) -> Skipping:
    """`denoiser` without some of its `depth` blocks; raises ConfigError for a block that it does not have."""
    left_out = tuple(sorted(set(blocks)))
    wrong = [block for block in left_out if not 0 <= block < depth]
    if wrong:
        raise ConfigError(f"skipping: there is no block {wrong[0]}; the blocks are 0 to {depth - 1}")
    return Skipping(denoiser, left_out)
