"""UnifiedDiT made block-causal: the same weights, and keys and values of earlier chunks from a cache.

Video and audio tokens of one chunk read each other both ways, as in the bidirectional model, and all that is earlier.
Names of parameters are UnifiedDiT's, so that a student begins with its teacher's weights.
Shape letters: B batch, L tokens, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.causal import Cache, chunked
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.models.layers.attention import Attention, attend
from soundstage.models.unified_dit import UnifiedDiT, UnifiedDiTConfig

Pair = tuple[Tensor, Tensor]
"""Keys and values (B, N, L, K)."""


@dataclass(frozen=True)
class CausalDiTConfig(UnifiedDiTConfig):
    """chunk: seconds of a chunk. window: chunks that each can look back on besides itself; None = all."""

    chunk: Fraction = Fraction(1, 2)
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise ConfigError(f"window: {self.window} is below 0; None looks back on everything")

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
        return chunked(self.config.geometry, steps, self.config.chunk)

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
        layers = [_Layer(past) for past in cache.layers or [()] * len(self.blocks)]
        v = self._through(x_t, t, cond, r, layers)
        kept = None if self.config.window is None else -self.config.window
        return v, Cache(steps, tuple(layer.chunks[kept:] if kept != 0 else () for layer in layers))

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


class _Layer:
    """Attention of one layer in one call: tokens read themselves and what is remembered. chunks: as after the call."""

    def __init__(self, past: tuple[Pair, ...]) -> None:
        self.past = past
        self.chunks = past

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.chunks = (*self.past, (k, v))
        if not self.past:
            return attend(q, k, v)
        keys, values = zip(*self.chunks, strict=True)
        return attend(q, torch.cat(keys, dim=2), torch.cat(values, dim=2))


def _in_order(rows: list[Tensor], window: int | None) -> Attention:
    """Attention in which each chunk reads itself and those before it. rows: the places of each chunk's tokens.

    A call of the kernel per chunk, so that no mask is needed and nothing is computed that is not read.
    """
    order = torch.cat(rows)
    back = order.argsort()
    edges = list(accumulate((len(each) for each in rows), initial=0))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[:, :, order] for x in (q, k, v))
        parts = []
        for i, (start, end) in enumerate(pairwise(edges)):
            first = 0 if window is None else edges[max(0, i - window)]
            parts.append(attend(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]))
        return torch.cat(parts, dim=2)[:, :, back]

    return run
