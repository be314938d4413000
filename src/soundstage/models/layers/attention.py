"""Attention with normalised queries and keys.

Shape letters: B batch, L tokens, S text tokens, D width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.models.layers.rotary import rotate

SHORT = 256

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (B, N, L, K), keys and values (B, N, S, K) -> (B, N, L, K)."""


def heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    """(B, L, D) -> (B, N, L, K)."""
    return x_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention (B, N, L, K); mask True = may be read, broadcastable to (B, N, L, S).

    Short sequences on a CPU take three matrix products: the bf16 backward of the fused CPU kernel is 5 to 10 times
    slower there (13 against 74 ms for 64 x 4 heads of 69 x 64 on one core). Everything else takes the fused kernel.
    """
    if q_BNLK.device.type != "cpu" or k_BNSK.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK, attn_mask=mask)
    scores = (q_BNLK * q_BNLK.shape[-1] ** -0.5) @ k_BNSK.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(v_BNSK.dtype) @ v_BNSK


def _rms(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Normalise in float32 whatever the precision around it."""
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), 1e-6)


class SelfAttention(nn.Module):
    """Joint self-attention with RMS-normalised queries and keys (arXiv:2302.05442) and rotary positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.RMSNorm(width // num_heads)
        self.norm_k = nn.RMSNorm(width // num_heads)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, angles_BLK: Tensor, attend: Attention = attend) -> Tensor:
        """Attend over all tokens, or as `attend` does; angles (B or 1, L, K/2)."""
        q, k, v = (heads(part, self.num_heads) for part in self.qkv(x_BLD).chunk(3, dim=-1))
        q = rotate(_rms(self.norm_q, q), angles_BLK).to(v.dtype)
        k = rotate(_rms(self.norm_k, k), angles_BLK).to(v.dtype)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from tokens to text, in a width of its own so that it stays cheap in small models."""

    def __init__(self, width: int, text_width: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(text_width, 2 * inner, bias=False)
        self.norm_q = nn.RMSNorm(inner // num_heads)
        self.norm_k = nn.RMSNorm(inner // num_heads)
        self.out = nn.Linear(inner, width)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """mask: True where a text token may be read; at least one per sample."""
        q = heads(self.q(x_BLD), self.num_heads)
        k, v = (heads(part, self.num_heads) for part in self.kv(text_BSD).chunk(2, dim=-1))
        q, k = _rms(self.norm_q, q).to(v.dtype), _rms(self.norm_k, k).to(v.dtype)
        out = attend(q, k, v, mask_BS[:, None, None, :])
        return self.out(out.transpose(1, 2).flatten(2))
