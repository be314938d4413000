"""Backward simulation: the student is trained on its own samples, made as they will be made (arXiv:2405.14867, 4.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Losses
from soundstage.core.errors import ConfigError
from soundstage.core.flow import noised, to_x0
from soundstage.core.known import Known
from soundstage.core.rng import Rng
from soundstage.core.sampling import renoise
from soundstage.core.schedule import explicit, shifted
from soundstage.objectives.base import mean_where
from soundstage.objectives.tasks import draw

__all__ = ["Given", "Rollout", "Simulate", "Simulated", "warped"]


@dataclass(frozen=True, eq=False)
class Given:
    """What the samples of a batch are told: conditions, and the clean latents wherever the mask is 0.

    x0: clean latents. mask: per modality (B, F) or (B, 1 or C, F, H, W), 1 = generate; CPU or the device of x0.
    """

    x0: AV[Tensor]
    mask: AV[Tensor]
    cond: Conditions

    @classmethod
    def of(cls, batch: Batch, tasks: Mapping[str, float], rng: Rng) -> Given:
        """A task for every sample, drawn from `tasks` (names in objectives.tasks.TASKS to probabilities)."""
        mask, _ = draw(tasks, batch.x0, rng)
        x0 = batch.x0.only(*mask.modalities)
        return cls(x0, mask.map(_every_step, x0), batch.cond.only(*mask.modalities))

    def around(self, denoiser: Denoiser) -> Known:
        """The denoiser as it sees these samples: what is given enters clean at t = 0, and stays."""
        return Known(denoiser, self.x0, self.mask)

    def cells(self) -> AV[Tensor]:
        """1 where a cell is generated, else 0; shape, type and device of x0."""
        return self.mask.map(lambda mask, x: spread((mask >= 0.5).to(x), x).expand_as(x), self.x0)

    def generated(self) -> AV[Tensor]:
        """(B,) bool: something of the modality is generated."""
        return self.mask.map(lambda mask, x: (mask >= 0.5).flatten(1).any(1).to(x.device), self.x0)

    def means(self, values: AV[Tensor]) -> AV[Tensor]:
        """(B,) mean of `values` (shape of x0) over what is generated of each sample, 0 where that is nothing."""

        def mean(v: Tensor, keep: Tensor) -> Tensor:
            keep = keep.to(v.dtype).flatten(1)
            return (v.flatten(1) * keep).sum(1) / keep.sum(1).clamp_min(1.0)

        return values.map(mean, self.cells())

    def terms(self, name: str, values: AV[Tensor]) -> Losses:
        """A scalar "name/modality" from `values` (shape of x0): samples count alike, and what is given not at all."""
        means, generated = self.means(values), self.generated()
        return {f"{name}/{modality}": mean_where(value, generated[modality]) for modality, value in means.items()}


def _every_step(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, 1) of the whole modality as (B, F)."""
    return mask.expand(-1, x.shape[2]) if mask.ndim == 2 else mask


def warped(steps: int = 4, by: float = 5.0) -> AV[tuple[float, ...]]:
    """Levels a student of `steps` calls is asked at, both modalities alike: 1, 0.9375, 0.8333, 0.625 for 4 and 5."""
    levels = tuple(float(t) for t in shifted(steps, AV(by))["video"][:-1])
    return AV(levels, levels)


@dataclass(frozen=True, eq=False)
class Simulated:
    """x0: the clean prediction, with the gradient of the last call. x_t, t: what that call was asked.

    exits: (B,) int64, which of the rollout's times the last call was at.
    """

    x0: AV[Tensor]
    x_t: AV[Tensor]
    t: AV[Tensor]
    exits: Tensor


class Simulate(Protocol):
    """Makes one sample per seed with the student; `steps` exits are possible."""

    @property
    def steps(self) -> int: ...

    def __call__(self, student: Denoiser, given: Given, rng: Rng) -> Simulated: ...


@dataclass(frozen=True)
class Rollout:
    """Runs `renoise`, the sampler of few-step students, up to a drawn exit; only the call at the exit has a gradient.

    times: per modality, the levels the student is asked at, descending to above 0; sampling uses the same and then 0.
    source: "data" asks at noised data instead of at the student's own samples (needs data; train and test inputs then
        differ by what the student gets wrong). each: an exit per sample, at the price of the longest for all; otherwise
        one exit for all samples, micro-batches and processes.
    """

    times: AV[tuple[float, ...]] = field(default_factory=warped)
    source: Literal["simulated", "data"] = "simulated"
    each: bool = False

    def __post_init__(self) -> None:
        for name, levels in self.times.items():
            if not levels or not levels[-1] > 0 or not all(1 >= a >= b for a, b in pairwise((1.0, *levels))):
                raise ConfigError(f"Rollout.times.{name}: {levels} must descend from at most 1 and stay above 0")
        if len({len(levels) for levels in self.times.values()}) > 1:
            raise ConfigError(f"Rollout.times: the lists differ in length: {self.times.as_dict()}")
        if self.source not in ("simulated", "data"):
            raise ConfigError(f"Rollout.source: {self.source!r} is not one of simulated, data")

    @property
    def steps(self) -> int:
        """Calls of the student per sample."""
        return len(next(self.times.values()))

    @property
    def grid(self) -> AV[Tensor]:
        """The sampler's grid: times, then 0."""
        return explicit(self.times.map(lambda levels: (*levels, 0.0)))

    def exits(self, rng: Rng) -> Tensor:
        """(B,) where each sample leaves, uniform over times; the same for all unless `each`."""
        shared = rng if self.each else rng.everywhere()
        return shared.fold("exit").integers(0, self.steps).expand(len(rng))

    def __call__(self, student: Denoiser, given: Given, rng: Rng, exits: Tensor | None = None) -> Simulated:
        """One sample per seed. exits: (B,), drawn where not told; at the last of them this is the sampler, bit for bit.

        Starts from rng.fold("start") and re-noises with rng.fold("sampler"), as the generator does.
        """
        exits = self.exits(rng) if exits is None else exits
        denoiser = given.around(student)
        times = self.times.only(*given.x0.modalities)
        x_t = self._entering(denoiser, given, exits, rng)
        t = given.x0.map(lambda x, levels: _levels(levels, exits, x), times)
        x0 = to_x0(x_t, denoiser(x_t, t, given.cond), t)
        return Simulated(denoiser.keep(x0), x_t, t, exits)

    def _entering(self, denoiser: Denoiser, given: Given, exits: Tensor, rng: Rng) -> AV[Tensor]:
        """Each sample's x_t at its exit."""
        noise = rng.fold("start").normal_like(given.x0)
        times = self.times.only(*noise.modalities)
        if self.source == "data":
            return noised(given.x0, noise, given.x0.map(lambda x, levels: _levels(levels, exits, x), times))
        last = int(exits.max())
        if last == 0:
            return noise
        path = [noise]
        grid = self.grid.only(*noise.modalities).map(lambda levels: levels[: last + 1])
        with torch.no_grad():
            renoise(
                denoiser, noise, grid, given.cond, rng=rng.fold("sampler"), on_step=lambda _i, x, _x0: path.append(x)
            )
        return AV(**{name: _at(exits, [x[name] for x in path]) for name in noise.modalities})


def _levels(levels: tuple[float, ...], exits: Tensor, like: Tensor) -> Tensor:
    """(B,) levels at the exits, in the type the samplers use."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.tensor(levels, dtype=torch.float64)[exits].to(device=like.device, dtype=dtype)


def _at(exits: Tensor, path: list[Tensor]) -> Tensor:
    """Row b of path[exits[b]]."""
    chosen = path[-1]
    for i, x in enumerate(path[:-1]):
        chosen = torch.where((exits == i).to(x.device).reshape(-1, *(1,) * (x.ndim - 1)), x, chosen)
    return chosen
