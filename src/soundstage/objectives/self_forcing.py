"""Self-forcing: a causal student is trained on what it made itself, chunk after chunk (arXiv:2506.08009).

    DMD(SelfForcing(Rollout(times)))              the loss: a causal student, scores that see the whole clip
    Regression(Staggered(times))                  how such a student begins (arXiv:2412.07772, section 4.3)
    DMD(Rollout(times, source="data"))            asked about noised data, as in CausVid, all chunks at one level

The student is a core.causal.Causal; teacher and fake score are plain denoisers of whole clips, as in CausVid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from soundstage.core.av import AV, cat
from soundstage.core.causal import After, causal, cut, told
from soundstage.core.denoiser import Denoiser
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.core.sampling import SAMPLERS
from soundstage.objectives.base import Batch, Nets
from soundstage.objectives.regression import Pair, Solved
from soundstage.objectives.rollout import Given, Rollout, Simulated

__all__ = ["SelfForcing", "Staggered"]


@dataclass(frozen=True)
class SelfForcing:
    """Samples as `core.causal.stream` makes them: chunk k by `rollout` with rng.fold("chunk", k), after a cache.

    One exit for all chunks, samples and processes. The call at the exit of each chunk has a gradient, which does not
    reach earlier chunks: they are remembered clean, by a call without one.
    context: what is remembered, the student's own chunks or, as in teacher forcing, the data's. The latter is here to
        be compared with: errors then add up over a clip, since the student never saw its own.
    """

    rollout: Rollout = field(default_factory=Rollout)
    context: Literal["own", "data"] = "own"

    def __post_init__(self) -> None:
        if self.rollout.source != "simulated":
            raise ConfigError(f'SelfForcing.rollout: its source is {self.rollout.source!r}; use "simulated"')
        if self.context not in ("own", "data"):
            raise ConfigError(f"SelfForcing.context: {self.context!r} is not one of own, data")

    @property
    def steps(self) -> int:
        """Calls of the student per chunk, beside the one that remembers it."""
        return self.rollout.steps

    def __call__(self, student: Denoiser, given: Given, rng: Rng, exits: Tensor | None = None) -> Simulated:
        """One sample per seed. exits: (B,), drawn where not told. Raises ConfigError for a student not causal."""
        network = causal(student)
        exits = self.rollout.exits(rng) if exits is None else exits
        after, made, told_of = After(network), [], []
        for k, chunk in enumerate(network.chunks(given.x0.map(lambda x: x.shape[2]))):
            if made:
                after = after.then(*told_of[-1])
            here = Given(cut(given.x0, chunk), cut(given.mask, chunk), told(given.cond, chunk))
            made.append(self.rollout(after, here, rng.fold("chunk", k), exits))
            told_of.append((made[-1].x0 if self.context == "own" else here.x0, here.cond))
        return Simulated(cat([m.x0 for m in made], 2), cat([m.x_t for m in made], 2), made[0].t, exits)


@dataclass(frozen=True)
class Staggered(Solved):
    """As `Solved`, with a level of its own for every chunk of the causal student: one of `times`, or 0.

    A chunk at 0 is clean: it teaches nothing itself, and later ones learn to read it as they will in sampling.
    """

    @torch.no_grad()
    def __call__(self, nets: Nets, batch: Batch, given: Given, rng: Rng) -> Pair:  # noqa: ARG002
        teacher = nets["teacher"] if self.guidance is None else self.guidance(nets["teacher"], given.cond)
        known = given.around(teacher)
        noise = rng.fold("start").normal_like(given.x0)
        grid = self.times.only(*noise.modalities).map(self._grid)
        path = [noise]
        SAMPLERS[self.sampler](known, noise, grid, given.cond, on_step=lambda _i, x, _x0: path.append(x))
        path = [known.keep(x) if i == len(path) - 1 else x for i, x in enumerate(path)]
        stops = len(next(self.times.values())) + 1
        chunks = causal(nets["student"]).chunks(noise.map(lambda x: x.shape[2]))
        at = [rng.fold("level", k).integers(0, stops) * self.substeps for k in range(len(chunks))]
        rows = torch.arange(noise.batch)

        def x_t(name: str) -> Tensor:
            states = torch.stack([x[name] for x in path])
            return torch.cat([states[i, rows][:, :, chunk[name]] for i, chunk in zip(at, chunks, strict=True)], 2)

        def levels(name: str) -> Tensor:
            found = grid[name].to(noise[name].device, torch.float32)
            spans = [chunk[name].stop - chunk[name].start for chunk in chunks]
            return torch.cat([found[i][:, None].expand(-1, n) for i, n in zip(at, spans, strict=True)], 1)

        parts = noise.modalities
        return Pair(AV(**{n: x_t(n) for n in parts}), AV(**{n: levels(n) for n in parts}), path[-1])
