"""Wan and Twin (Ovi) made block-causal: the same weights, and keys and values of earlier chunks from a cache.

Tokens of a chunk read all of it and all that is earlier: in the self-attention of their tower and, in Twin, in the
fused cross-attention, where the video of chunk k reads the audio of chunks 0 to k and the audio the video alike.
Positions count from the start of the clip. Audio latents enter by convolutions that reach 9 steps to either side: a
chunk's tokens are those of the clip that ends with it, so that the last 9 of each chunk but the last lack what follows
and differ from the bidirectional model's.
Names of parameters are those of Wan and Twin, so that a student begins with its teacher's weights.
Shape letters: B batch, L tokens, N heads, K head width, F latent frames, H, W, C, A audio latent steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.causal import Cache, Chunking
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.models.layers.chunks import InOrder, Pair, Remembering
from soundstage.models.layers.wan_ends import Order
from soundstage.models.twin import Twin, TwinConfig
from soundstage.models.unified_dit import LARGE
from soundstage.models.wan import Wan, WanConfig

__all__ = ["CausalTwin", "CausalTwinConfig", "CausalWan", "CausalWanConfig", "Memory"]


@dataclass(frozen=True)
class CausalWanConfig(WanConfig):
    """geometry: of the codec, by whose clock chunks are cut. chunking: how long they are, how far they look back."""

    geometry: AV[StreamGeometry] = LARGE
    chunking: Chunking = Chunking()  # noqa: RUF009 (it is frozen)

    def build(self) -> CausalWan:
        """The module, randomly initialised (for free under `torch.device("meta")`)."""
        return CausalWan(self)


@dataclass(frozen=True)
class CausalTwinConfig(TwinConfig):
    """geometry: of the codecs, by whose clock chunks are cut. chunking: how long they are, how far they look back."""

    geometry: AV[StreamGeometry] = LARGE
    chunking: Chunking = Chunking()  # noqa: RUF009 (it is frozen)

    def build(self) -> CausalTwin:
        """The module, randomly initialised (for free under `torch.device("meta")`)."""
        return CausalTwin(self)


class Memory(NamedTuple):
    """What one tower remembers; Cache.layers is one AV of it. Chunks are shared with longer caches, not copied.

    own: of each block, the rotated keys and the values of the chunks that may still be read. other: those of the other
    tower's tokens, as this tower's fused attention reads them. before: the last latents, as far as a token reaches.
    """

    own: tuple[tuple[Pair, ...], ...]
    other: tuple[tuple[Pair, ...], ...]
    before: Tensor | None = None


class _InChunks(nn.Module):
    """What Wan and Twin become causal by. Mixed in before one of them: `_denoise`, `ends` and `blocks` are theirs."""

    config: Any
    _denoise: Any
    ends: Any
    blocks: Any

    def forward(
        self,
        x_t: AV[Tensor],
        t: AV[Tensor],
        cond: Conditions,
        *,
        r: AV[Tensor] | None = None,
        skip: tuple[int, ...] = (),
        cache: Cache | None = None,
    ) -> AV[Tensor] | tuple[AV[Tensor], Cache]:
        """Velocity of a whole clip; with a cache that of its next chunk, as `extend`. Otherwise as without chunks."""
        if cache is None:
            return self._denoise(x_t, t, cond, r, skip, self._in_order(x_t))
        orders = AV(**{name: self._after(cache, name, x) for name, x in x_t.items()})
        v = self._denoise(x_t, t, cond, r, skip, orders)
        steps = AV(**{name: order.start + x_t[name].shape[2] for name, order in orders.items()})
        return v, Cache(steps, (AV(**{name: self._remembered(name, orders[name], x) for name, x in x_t.items()}),))

    def chunks(self, steps: AV[int]) -> tuple[AV[slice], ...]:
        """The latent steps of each chunk of a clip of so many steps."""
        return self.config.chunking.chunks(self.config.geometry, steps)

    def extend(
        self, cache: Cache, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
    ) -> tuple[AV[Tensor], Cache]:
        """The velocity of the next chunk, and the cache with it. cond: of this chunk, its control latents too."""
        return self(x_t, t, cond, r=r, cache=cache)  # by the call, where sharding and compiling have their hooks

    def _in_order(self, x_t: AV[Tensor]) -> AV[Order]:
        """How each tower runs a whole clip."""
        chunks = self.chunks(x_t.map(lambda x: x.shape[2]))
        window, depth = self.config.chunking.window, len(self.blocks)
        begins = {name: self._begins(name, x, [chunk[name] for chunk in chunks]) for name, x in x_t.items()}

        def order(name: str) -> Order:
            other = next((tokens for each, tokens in begins.items() if each != name), begins[name])
            own, fused = (InOrder(begins[name], keys, window) for keys in (begins[name], other))
            return Order(tuple(chunk[name] for chunk in chunks), [own] * depth, [fused] * depth)

        return AV(**{name: order(name) for name in x_t.modalities})

    def _begins(self, name: str, x: Tensor, chunks: list[slice]) -> list[int]:
        """The first token of each chunk."""
        per_step = math.prod(x.shape[3:]) // math.prod(self.ends[name].config.patch)
        return [chunk.start * per_step for chunk in chunks]

    def _after(self, cache: Cache, name: str, x: Tensor) -> Order:
        """How a tower runs the next chunk."""
        nothing = ((),) * len(self.blocks)
        memory = cache.layers[0][name] if cache.layers else Memory(nothing, nothing)
        own, other = ([Remembering(past) for past in each] for each in (memory.own, memory.other))
        start = cache.steps[name] if cache.layers else 0
        return Order((slice(0, x.shape[2]),), own, other, start, memory.before)

    def _remembered(self, name: str, order: Order, x: Tensor) -> Memory:
        """What a tower remembers after a chunk x."""
        window, reach = self.config.chunking.window, self.ends[name].reach
        held: tuple[Any, Any] = (order.reads, order.reads_other)
        own, other = (tuple(each.taken(window) for each in reads) for reads in held)
        if not reach:
            return Memory(own, other)
        x = x if order.before is None else torch.cat([order.before, x], 2)
        return Memory(own, other, x[:, :, -reach:])


class CausalWan(_InChunks, Wan):  # type: ignore[misc]
    """A Causal Denoiser (core.causal) of one modality, as Wan."""

    config: CausalWanConfig


class CausalTwin(_InChunks, Twin):  # type: ignore[misc]
    """A Causal Denoiser (core.causal) of video (B, C, F, H, W) and audio (B, C, A), as Twin; either may be absent."""

    config: CausalTwinConfig
