"""Which samples make the batch of a step: of one shape each, mixed by shares, all from seed and step alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from soundstage.core.batch import share
from soundstage.core.errors import Caution, ConfigError
from soundstage.data.batching import Interleaved, Order
from soundstage.data.mixture import Mixture, Phase
from soundstage.data.shapes import ClipShape

__all__ = ["Batches", "Labels", "Sizes", "phases_of"]

BLOCK = 1000
"""Samples within which shares are kept to one; of batches of several shapes, a quarter of it."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What a source knows of its samples without reading them. shape: (N,) number of each in `shapes`.

    category: (N,) words; seconds: (N,) length of the clip that each is part of.
    """

    shapes: tuple[ClipShape, ...]
    shape: np.ndarray
    category: Sequence[str]
    seconds: np.ndarray


class Sizes(Protocol):
    """How many clips of a shape cost as much as `size` of the shape `like`; such as Buckets.batch_size."""

    def __call__(self, shape: ClipShape, like: ClipShape, size: int) -> int: ...


def phases_of(mixture: Mixture | None, curriculum: Sequence[Phase]) -> tuple[Phase, ...]:
    """Both settings as one: what is shown from which step on. Raises ConfigError where the steps do not ascend."""
    phases = (*((Phase(0, mixture),) if mixture else ()), *curriculum)
    starts = [phase.start for phase in phases]
    if starts and (starts[0] != 0 or starts != sorted(set(starts))):
        raise ConfigError(
            f"curriculum: its steps {starts} do not ascend from 0; give the first as mixture=, or start it at 0"
        )
    return phases


class Batches:
    """Indices by step.

    Without phases every sample comes once per epoch; batches of one shape follow each other in shuffled order. With
    them each combination of category and length has its own shuffled epochs, and comes by its share; what a phase did
    not get to is what a next phase of the same tables goes on with.
    """

    def __init__(
        self,
        num: int,
        seed: int = 0,
        labels: Labels | None = None,
        phases: Sequence[Phase] = (),
        sizes: Sizes | None = None,
        like: ClipShape | None = None,
    ) -> None:
        if num < 1:
            raise ConfigError("data: there is no sample to train on")
        if phases and labels is None:
            raise ConfigError(
                "mixture: this source tells neither category nor length of its clips; pack them into shards with "
                "soundstage data pack, and read those"
            )
        self._num, self._seed, self._sizes, self._like = num, seed, sizes, like
        self._order = Order(num, seed)
        self._labels = labels
        several = labels is not None and len(np.unique(labels.shape[:num])) > 1
        self._plain = not phases and not several
        self._phases = [] if self._plain else [self._phase(each) for each in phases or (None,)]
        self._made = lru_cache(maxsize=4)(self._outer)
        for before, after in zip(self._phases, self._phases[1:], strict=False):
            after.follows = before if before.same_cells(after) else None

    def take(self, step: int, size: int, part: int = 0, of: int = 1) -> Tensor:
        """(n,) int64 indices of the batch, or of one of its equal parts; it has `size`, or what costs as much.

        Raises ShapeError where the batches of any shape do not divide.
        """
        if self._plain:
            return self._order.take(step * size, size)[share(size, part, of)]
        number = max(i for i, phase in enumerate(self._phases) if phase.start <= step)
        phase, (outer, num, offsets) = self._phases[number], self._made(number, size)
        which, batch = outer.take(step - phase.start, 1)
        bucket, position = int(which), int(batch) * num[int(which)]
        cells, units = phase.inner[bucket].take(position, num[bucket])
        found = torch.empty_like(units)
        for cell in cells.unique().tolist():
            here = cells == cell
            found[here] = phase.members[bucket][cell].at(units[here] + offsets[bucket][cell])
        return found[[share(each, part, of) for each in num][bucket]]

    def epochs(self, steps: int, size: int) -> dict[str, float]:
        """How often the clips of each combination are seen in so many steps, by name; "all" without a mixture."""
        if self._plain:
            return {"all": steps * size / self._num}
        number = max(i for i, phase in enumerate(self._phases) if phase.start < steps or i == 0)
        phase = self._phases[number]
        counts = self._counts(number, steps - phase.start, size)
        shown: dict[str, list[int]] = {}
        for bucket, members in enumerate(phase.members):
            for cell, group in enumerate(members):
                entry = shown.setdefault(phase.names[phase.cells[bucket][cell]], [0, 0])
                entry[0] += counts[bucket][cell]
                entry[1] += len(group)
        return {name: drawn / held for name, (drawn, held) in shown.items()}

    def _phase(self, phase: Phase | None) -> _Dealt:
        assert self._labels is not None
        labels, num = self._labels, self._num
        if phase is None:
            cell, shares, names = np.zeros(num, np.int64), np.ones(1), ["all"]
        else:
            mixture = phase.mixture
            cell = mixture.cells(labels.category[:num], labels.seconds[:num])
            names = mixture.names
            left = int((cell < 0).sum())
            if left:
                warnings.warn(
                    f"mixture: {left} of {num} samples are of no category or length that it names, and are not shown",
                    Caution,
                    stacklevel=4,
                )
            shares = mixture.shares(np.bincount(cell[cell >= 0], minlength=len(names)))
        return _Dealt(phase.start if phase else 0, labels.shape[:num], cell, shares, names, self._seed, phase is None)

    def _outer(self, number: int, size: int) -> tuple[Interleaved, list[int], list[list[int]]]:
        """Shapes of the batches of a phase, samples in each, and where its orders begin."""
        phase = self._phases[number]
        assert self._labels is not None
        num = []
        for shape in phase.shapes:
            one = self._labels.shapes[shape]
            num.append(self._sizes(one, self._like, size) if self._sizes and self._like else size)
        rates = [
            Fraction(share).limit_denominator(10**9) / each for share, each in zip(phase.weights, num, strict=True)
        ]
        if phase.whole:
            rates = [Fraction(sum(map(len, group)), each) for group, each in zip(phase.members, num, strict=True)]
        scale = max(1, ceil(1 / sum(rates))) if phase.whole else Fraction(BLOCK, 4) / sum(rates)
        outer = Interleaved([rate * scale for rate in rates], self._seed + 7 * number)
        if phase.follows is None:
            return outer, num, [[0] * len(members) for members in phase.members]
        steps = phase.start - phase.follows.start
        return outer, num, self._counts(number - 1, steps, size)

    def _counts(self, number: int, steps: int, size: int) -> list[list[int]]:
        """Samples that each order has given when a phase is `steps` old."""
        phase, (outer, num, offsets) = self._phases[number], self._made(number, size)
        found = []
        for bucket, batches in enumerate(outer.counts(steps)):
            drawn = phase.inner[bucket].counts(batches * num[bucket])
            found.append([more + offset for more, offset in zip(drawn, offsets[bucket], strict=True)])
        return found


class _Dealt:
    """The samples of one phase, by shape and combination."""

    def __init__(
        self,
        start: int,
        shape: np.ndarray,
        cell: np.ndarray,
        shares: np.ndarray,
        names: Sequence[str],
        seed: int,
        whole: bool,
    ) -> None:
        self.start, self.whole, self.names = start, whole, list(names)
        self.follows: _Dealt | None = None
        self.shapes = np.unique(shape[cell >= 0]).tolist()
        self.weights: list[float] = []
        self.cells: list[list[int]] = []
        self.members: list[list[_Group]] = []
        self.inner: list[Interleaved] = []
        held = np.bincount(cell[cell >= 0], minlength=len(shares))
        for bucket in self.shapes:
            here = np.unique(cell[(cell >= 0) & (shape == bucket)]).tolist()
            groups = [_Group(np.flatnonzero((cell == c) & (shape == bucket)), seed, c, bucket) for c in here]
            parts = [shares[c] * len(group) / held[c] for c, group in zip(here, groups, strict=True)]
            self.weights.append(float(sum(parts)))
            self.cells.append(here)
            self.members.append(groups)
            # a shape of which nothing is to be shown has a weight of 0, and its streams are never asked
            parts = parts if sum(parts) > 0 else [1.0] * len(parts)
            scale = BLOCK / sum(parts)
            self.inner.append(Interleaved([Fraction(part * scale).limit_denominator(10**6) for part in parts], seed))

    def same_cells(self, other: _Dealt) -> bool:
        """Whether the orders of both are the same."""
        return (self.names, self.shapes, self.cells) == (other.names, other.shapes, other.cells)


class _Group:
    """Samples of one shape and combination, in their own order."""

    def __init__(self, indices: np.ndarray, seed: int, cell: int, bucket: int) -> None:
        self._indices = torch.from_numpy(indices)
        self._order = Order(len(indices), (seed * 1009 + cell) * 1009 + bucket + 1)

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, units: Tensor) -> Tensor:
        return self._indices[self._order.at(units)]
