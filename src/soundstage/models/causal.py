"""UnifiedDiT made block-causal: the same weights, and keys and values of earlier chunks from a cache.

Video and audio tokens of one chunk read each other both ways, as in the bidirectional model, and all that is earlier.
Names of parameters are UnifiedDiT's, so that a student begins with its teacher's weights.
Shape letters: B batch, L tokens, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.causal import Cache, Chunking
from soundstage.core.conditions import Conditions
from soundstage.models.layers.attention import Attention, attend
from soundstage.models.layers.chunks import InOrder, Remembering
from soundstage.models.unified_dit import UnifiedDiT, UnifiedDiTConfig


@dataclass(frozen=True)
class CausalDiTConfig(UnifiedDiTConfig):
    """chunk: seconds of a chunk. window: chunks that each can look back on besides itself; None = all."""

    chunk: Fraction = Fraction(1, 2)
    window: int | None = None

    def __post_init__(self) -> None:
        _ = self.chunking  # raises ConfigError

    @property
    def chunking(self) -> Chunking:
        """Length of the chunks and how far they look back."""
        return Chunking(self.chunk, self.window)

    @classmethod
    def of(cls, config: UnifiedDiTConfig, **changes: Any) -> CausalDiTConfig:  # noqa: ANN401
        """The causal form of a bidirectional model."""
        return cls(**{**vars(config), **changes})

    @classmethod
    def parse(cls, text: str) -> CausalDiTConfig:
        """A size by name: `model=3b`."""
        return cls.of(UnifiedDiTConfig.parse(text))

    def build(self) -> CausalDiT:
        """The module, randomly initialised."""
        return CausalDiT(self)


class CausalDiT(UnifiedDiT):
    """A Causal Denoiser (core.causal) over AV latents: video (B, C, F, H, W), audio (B, C, A); either may be absent.

    The cache holds, per layer and chunk, the rotated keys and the values; chunks of an earlier cache are shared with
    the longer one, not copied.
    """

    config: CausalDiTConfig

    def forward(  # type: ignore[override]
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,
        *,
        r: AV[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> AV[Tensor] | tuple[AV[Tensor], Cache]:
        """Velocity of a whole clip; with a cache that of its next chunk, as `extend`."""
        if cache is not None:
            return self._extend(cache, x_t, t, cond, r)
        reads = _in_order(self._rows(x_t), self.config.window)
        return self._through(x_t, t, cond, r, [reads] * len(self.blocks))

    def chunks(self, steps: AV[int]) -> tuple[AV[slice], ...]:
        """The latent steps of each chunk of a clip of so many steps."""
        return self.config.chunking.chunks(self.config.geometry, steps)

    def extend(
        self, cache: Cache, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
    ) -> tuple[AV[Tensor], Cache]:
        """The velocity of the next chunk, and the cache with it. cond: of this chunk, its positions too."""
        return self(x_t, t, cond, r=r, cache=cache)  # by the call, where sharding and compiling have their hooks

    def _extend(
        self, cache: Cache, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, r: AV[Tensor] | None
    ) -> tuple[AV[Tensor], Cache]:
        before = cache.steps.as_dict()
        steps = AV(**{n: before.get(n, 0) + x.shape[2] for n, x in x_t.items()})
        told = cond.positions or AV()
        seconds = {n: told[n] if n in told else self._seconds(n, x, steps[n]) for n, x in x_t.items()}
        cond = replace(cond, positions=AV(**seconds))
        layers = [Remembering(past, dim=2) for past in cache.layers or [()] * len(self.blocks)]
        v = self._through(x_t, t, cond, r, [partial(layer, attend) for layer in layers])
        return v, Cache(steps, tuple(layer.taken(self.config.window) for layer in layers))

    def _seconds(self, name: str, x: Tensor, end: int) -> Tensor:
        """(1, F) middles of the last steps of `end`, as many as x has."""
        seconds = self.config.geometry[name].seconds(end)[end - x.shape[2] :]
        return torch.tensor(seconds, device=x.device)[None]

    def _rows(self, x_t: AV[Tensor]) -> list[Tensor]:
        """The places of each chunk's tokens in the sequence, video first."""
        per_step = x_t.map(lambda x: x[0, 0, 0].numel() // (self.config.patch**2 if x.ndim == 5 else 1))
        sizes = [x.shape[2] * per_step[name] for name, x in x_t.items()]
        first = AV(**dict(zip(x_t.modalities, accumulate(sizes[:-1], initial=0), strict=True)))

        def tokens(chunk: AV[slice]) -> Iterator[Tensor]:
            for (name, x), where in zip(x_t.items(), chunk.values(), strict=True):
                begin, end = (first[name] + step * per_step[name] for step in (where.start, where.stop))
                yield torch.arange(begin, end, device=x.device)

        return [torch.cat(list(tokens(chunk))) for chunk in self.chunks(x_t.map(lambda x: x.shape[2]))]


def _in_order(rows: list[Tensor], window: int | None) -> Attention:
    """Attention in which each chunk reads itself and those before it. rows: the places of each chunk's tokens."""
    order = torch.cat(rows)
    back = order.argsort()
    begins = list(accumulate((len(each) for each in rows[:-1]), initial=0))
    reads = InOrder(begins, begins, window, dim=2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reads(attend, *(x[:, :, order] for x in (q, k, v)))[:, :, back]

    return run
