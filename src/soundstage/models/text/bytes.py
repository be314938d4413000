"""A text encoder on bytes, trained with the model it serves: no vocabulary, no download.

Bytes become words (split at spaces) by a short convolution and a pool; a small transformer reads the words.
Shape letters: B batch, S bytes, W words, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import RequestError
from soundstage.models.layers.attention import attend, heads

SPACE = 32


@dataclass(frozen=True)
class ByteTextConfig:
    """width: of the word tokens. depth: transformer layers. max_words: later words share the last place.

    alphabet: byte values with an embedding of their own; larger ones share the last. 128 is ASCII.
    """

    width: int = 128
    depth: int = 2
    num_heads: int = 4
    max_words: int = 24
    max_bytes: int = 160
    alphabet: int = 256


def tokenize(prompts: Sequence[str], max_bytes: int = ByteTextConfig.max_bytes) -> Conditions:
    """Prompts as UTF-8 bytes: text (B, S) int64, text_mask (B, S) bool; lower case, single spaces.

    An empty prompt has an all-False mask: the unconditional input. Raises RequestError on a prompt over `max_bytes`.
    """
    coded = [" ".join(prompt.lower().split()).encode() for prompt in prompts]
    for prompt, code in zip(prompts, coded, strict=True):
        if len(code) > max_bytes:
            raise RequestError(
                f"the prompt has {len(code)} bytes and the model reads {max_bytes}: shorten {prompt[:40]!r}..."
            )
    length = max(1, *(len(code) for code in coded))
    ids = torch.zeros(len(coded), length, dtype=torch.int64)
    for row, code in enumerate(coded):
        ids[row, : len(code)] = torch.tensor(list(code), dtype=torch.int64)
    mask = torch.arange(length)[None] < torch.tensor([len(code) for code in coded])[:, None]
    return Conditions(text=AV(video=ids, audio=ids), text_mask=AV(video=mask, audio=mask))


class ByteText(nn.Module):
    """Byte ids (B, S) and mask -> word features (B, 1 + W, D) and mask; place 0 is a learned, always visible token."""

    def __init__(self, config: ByteTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.alphabet, config.width // 2)
        self.spell = nn.Conv1d(config.width // 2, config.width, 5, padding=2)
        self.word = nn.Linear(config.width, config.width)
        self.place = nn.Parameter(torch.randn(config.max_words, config.width) * 0.02)
        self.null = nn.Parameter(torch.randn(config.width) * 0.02)
        self.layers = nn.ModuleList(_Layer(config.width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features (B, 1 + W, D) and their bool mask (B, 1 + W)."""
        spelled = self.spell(
            (self.embed(ids_BS.clamp_max(self.config.alphabet - 1)) * mask_BS[..., None]).transpose(1, 2)
        ).transpose(1, 2)
        letters = mask_BS & (ids_BS != SPACE)
        word_BS = ((ids_BS == SPACE) & mask_BS).cumsum(1).clamp_max(self.config.max_words - 1)
        member_BSW = F.one_hot(word_BS, self.config.max_words) * letters[..., None]
        count_BW = member_BSW.sum(1)
        pooled = member_BSW.to(spelled.dtype).transpose(1, 2) @ F.gelu(spelled)
        pooled = pooled / count_BW.clamp_min(1).sqrt()[..., None].to(pooled.dtype)
        x = torch.cat([self.null.expand(len(ids_BS), 1, -1), self.word(pooled) + self.place], dim=1)
        mask = F.pad(count_BW > 0, (1, 0), value=True)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x), mask


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (heads(part, self.num_heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        read = attend(q, k, v, mask[:, None, None, :])
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
