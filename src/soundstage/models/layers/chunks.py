"""Who reads whom in a block-causal network: every chunk itself and those before it, as they are or as remembered.

Shape letters: B batch, L tokens, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundstage.core.attention import Kernel

Pair = tuple[Tensor, Tensor]
"""Keys and values of a chunk, (B, L, N, K) or (B, N, L, K)."""


class Remembering:
    """Reads (core.attention) of one chunk: all of its tokens read all of it and all that is remembered.

    past: keys and values of earlier chunks. dim: where the tokens are.
    """

    def __init__(self, past: tuple[Pair, ...] = (), dim: int = 1) -> None:
        self.past = past
        self.dim = dim
        self._own: tuple[Pair, ...] | None = ()

    def __call__(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._own is not None:
            self._own = ((k, v),)
        if not self.past:
            return kernel(q, k, v)
        keys, values = zip(*self.past, (k, v), strict=True)
        return kernel(q, torch.cat(keys, self.dim), torch.cat(values, self.dim))

    def taken(self, window: int | None) -> tuple[Pair, ...]:
        """What the next chunk can look back on: of `past` and this chunk the last `window`, None = all.

        Afterwards this chunk's are not held here, nor where its block is computed again in a backward pass.
        """
        chunks = (*self.past, *(self._own or ()))
        self._own = None
        return chunks if window is None else chunks[len(chunks) - min(window, len(chunks)) :]


@dataclass(frozen=True)
class InOrder:
    """Reads of a whole clip: each chunk's tokens read those of their own chunk and of earlier ones.

    A call of the kernel per chunk, so that no mask is needed and nothing is computed that is not read.
    queries, keys: where each chunk's tokens begin; the last one's go on to the end. window: earlier chunks that are
    read, None = all. dim: where the tokens are.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    window: int | None = None
    dim: int = 1

    def __call__(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = [*self.queries[1:], q.shape[self.dim]], [*self.keys[1:], k.shape[self.dim]]
        parts = []
        for i, (begin, end, seen) in enumerate(zip(self.queries, *ends, strict=True)):
            first = 0 if self.window is None else self.keys[max(0, i - self.window)]
            asked = q.narrow(self.dim, begin, end - begin)
            parts.append(kernel(asked, *(x.narrow(self.dim, first, seen - first) for x in (k, v))))
        return torch.cat(parts, self.dim)
