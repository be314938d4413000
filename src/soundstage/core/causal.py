"""Block-causal denoisers: a clip made chunk after chunk, each reading those before it (arXiv:2412.07772).

A chunk is a span of seconds of both modalities. What a network remembers of earlier chunks is a value, `Cache`, that
goes in and comes out, so that a causal denoiser is as pure as any other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from soundstage.core.av import AV, cat
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, StreamGeometry
from soundstage.core.errors import ConfigError
from soundstage.core.known import Known
from soundstage.core.rng import Rng
from soundstage.core.sampling import SAMPLERS, OnStep, Sampler, renoise

__all__ = [
    "WAYS",
    "After",
    "Cache",
    "Causal",
    "Chunking",
    "causal",
    "chunked",
    "cut",
    "is_causal",
    "stream",
    "streamed",
    "told",
]


class Cache(NamedTuple):
    """What a network remembers of the chunks so far; `Cache()` = there was none.

    steps: latent steps of each modality. layers: the network's own, such as keys and values per layer.
    """

    steps: AV[int] = AV()
    layers: tuple[Any, ...] = ()


class Causal(Denoiser, Protocol):
    """A Denoiser in which no chunk depends on a later one.

    Called on a whole clip, every chunk reads the earlier ones as they are in x_t, each at its own t.
    """

    def chunks(self, steps: AV[int]) -> tuple[AV[slice], ...]:
        """The latent steps of each chunk of a clip of so many steps, in order."""
        ...

    def extend(
        self, cache: Cache, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
    ) -> tuple[AV[Tensor], Cache]:
        """The velocity of the next chunk alone, and the cache with that chunk remembered as it is in x_t.

        cond: what is told of this chunk (`told`). The velocity is that of a call on the whole clip.
        """
        ...


@dataclass(frozen=True)
class Chunking:
    """seconds: of a chunk. window: chunks that each can look back on besides itself; None = all."""

    seconds: Fraction = Fraction(1)
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise ConfigError(f"window: {self.window} is below 0; None looks back on everything")

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Chunking:
        """What `written` wrote; raises KeyError, TypeError or ValueError for anything else."""
        return cls(Fraction(told["seconds"]), told["window"])

    def written(self) -> dict[str, Any]:
        """As JSON."""
        return {"seconds": str(self.seconds), "window": self.window}

    def chunks(self, geometry: AV[StreamGeometry], steps: AV[int]) -> tuple[AV[slice], ...]:
        """The latent steps of each chunk of a clip of so many steps (`chunked`)."""
        return chunked(geometry, steps, self.seconds)


def is_causal(denoiser: object) -> bool:
    """Whether a denoiser can go on from a cache."""
    return callable(getattr(denoiser, "chunks", None)) and callable(getattr(denoiser, "extend", None))


def causal(denoiser: Denoiser) -> Causal:
    """The denoiser as a causal one; raises ConfigError where it cannot go on from a cache."""
    if not is_causal(denoiser):
        raise ConfigError(
            f"{type(denoiser).__name__} reads whole clips and cannot go on from a cache; build the student from a "
            "causal configuration, such as models.causal.CausalDiTConfig, and wrap nothing but Known around it"
        )
    return cast(Causal, denoiser)


@dataclass(frozen=True, eq=False)
class After:
    """The Denoiser of one chunk, after those of a cache: what samplers, guidance and Known are given."""

    network: Causal
    cache: Cache = field(default_factory=Cache)

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return self.network.extend(self.cache, x_t, t, cond, r=r)[0]

    @torch.no_grad()
    def then(self, x0: AV[Tensor], cond: Conditions) -> After:
        """After this chunk too: x0 is remembered clean, at t = 0, and no gradient leads back into it."""
        clean = x0.map(lambda x: x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32)))
        return After(self.network, self.network.extend(self.cache, x0.map(Tensor.detach), clean, cond)[1])


def stream(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,
    on_step: OnStep | None = None,
    sampler: Sampler = renoise,
) -> Iterator[AV[Tensor]]:
    """The clean chunks of a clip, each as soon as it is made.

    denoiser: causal, or `Known` around a causal one. x, times: as for a sampler, of the whole clip. rng: chunk k draws
    from rng.fold("chunk", k, "sampler"). Raises ConfigError for another denoiser.
    """
    known = denoiser if isinstance(denoiser, Known) else None
    network = causal(denoiser if known is None else known.denoiser)
    after, made = After(network), None
    for k, chunk in enumerate(network.chunks(x.map(lambda z: z.shape[2]))):
        if made is not None:
            after = after.then(*made)
        here, cond_here = after, told(cond, chunk)
        if known is not None:
            here = Known(after, cut(known.latents, chunk), cut(known.mask, chunk))
        drawn = None if rng is None else rng.fold("chunk", k, "sampler")
        x0 = sampler(here, cut(x, chunk), times, cond_here, rng=drawn, on_step=on_step)
        made = (here.keep(x0) if isinstance(here, Known) else x0, cond_here)
        yield made[0]


def streamed(
    denoiser: Denoiser,
    x: AV[Tensor],
    times: AV[Tensor],
    cond: Conditions,
    *,
    rng: Rng | None = None,
    on_step: OnStep | None = None,
) -> AV[Tensor]:
    """`stream` as a Sampler: the whole clip at its end. on_step sees each chunk's steps."""
    return cat(list(stream(denoiser, x, times, cond, rng=rng, on_step=on_step)), dim=2)


WAYS: Mapping[str, Sampler] = {**SAMPLERS, "streamed": streamed}
"""Samplers by name: those for every denoiser, and `streamed`, for causal ones."""


def chunked(geometry: AV[StreamGeometry], steps: AV[int], seconds: Fraction) -> tuple[AV[slice], ...]:
    """Chunks of `seconds`, by the exact clock: a latent step is in the chunk that its middle falls into.

    What is left at the end without a step of every modality joins the last chunk. Raises ConfigError where `seconds`
    are fewer than a step has.
    """
    longest = max(Fraction(geometry[name].stride) / geometry[name].rate for name in steps.modalities)
    if seconds < longest:
        raise ConfigError(f"chunk: {seconds} s is shorter than a latent step; use at least {longest} s")
    number = steps.map(
        lambda count, g: [middle // seconds for middle in _middles(g, count)], geometry.only(*steps.modalities)
    )
    last = min(each[-1] for each in number.values())

    def part(k: int) -> AV[slice]:
        def one(each: list[int]) -> slice:
            return slice(bisect_left(each, k), len(each) if k == last else bisect_left(each, k + 1))

        return number.map(one)

    return tuple(part(k) for k in range(last + 1))


def _middles(geometry: StreamGeometry, steps: int) -> list[Fraction]:
    """Exact seconds at the middle of each latent step."""
    edges = [Fraction(0), *(Fraction(geometry.length(i + 1)) for i in range(steps))]
    return [(a + b) / 2 / geometry.rate for a, b in pairwise(edges)]


def cut(value: AV[Tensor], chunk: AV[slice]) -> AV[Tensor]:
    """A chunk's steps of latents (B, C, F, ...) or of per-step values (B, F); per-sample values (B,) are every chunk's.

    Modalities that the chunk lacks are left out.
    """

    def one(x: Tensor, where: slice) -> Tensor:
        return x if x.ndim == 1 else x[:, where] if x.ndim == 2 else x[:, :, where]

    names = [name for name in value.modalities if name in chunk]
    return value.only(*names).map(one, chunk.only(*names))


def told(cond: Conditions, chunk: AV[slice]) -> Conditions:
    """What is told of a chunk: text and reference as they are, control, mask and positions of its steps alone."""
    per_step = {"control": cond.control, "mask": cond.mask, "positions": cond.positions}
    return replace(cond, **{name: cut(value, chunk) for name, value in per_step.items() if value is not None})
