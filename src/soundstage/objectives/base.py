"""What the engine and the losses agree on: a `Batch` in, named terms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from soundstage.core.batch import Batch
from soundstage.core.denoiser import Losses
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng

__all__ = ["Batch", "Losses", "Nets", "Objective", "Sum", "mean_where", "report"]

Nets = Mapping[str, Callable[..., Any]]
"""Role ("student", "teacher", "fake_score", "discriminator") to the network that plays it."""


class Objective(Protocol):
    """Which roles move at a step, and the terms of each. Owns maths only: no optimiser, no EMA, no checkpoint.

    A term is a scalar; the engine weighs, sums and differentiates terms. A tensor of shape (2,) is a report
    (`report`): it is logged as a mean and never added to the loss. `loss` is pure given `rng`.
    """

    def turn(self, step: int) -> tuple[str, ...]: ...

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses: ...


@dataclass(frozen=True)
class Sum:
    """`first`, and `others` whose terms are added to its student's: Sum(FlowMatching(), (Fidelity(...),)).

    Turns and other roles are the first's. The first draws what it draws alone.
    """

    first: Objective
    others: tuple[Objective, ...]

    def turn(self, step: int) -> tuple[str, ...]:
        """The turns of the first."""
        return self.first.turn(step)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        """Terms of all for the student, of the first for other roles; raises ConfigError where two share a name."""
        terms = self.first.loss(role, nets, batch, rng)
        for i, other in enumerate(self.others if role == "student" else ()):
            found = other.loss(role, nets, batch, rng.fold("anchor", i))
            twice = sorted(terms.keys() & found.keys())
            if twice:
                raise ConfigError(f"Sum.others: two objectives name a term {twice[0]!r}")
            terms = terms | found
        return terms


def report(values: Tensor, where: Tensor) -> Tensor:
    """(sum, count) of `values` where `where` is true: means of it can be joined over micro-batches and steps.

    values, where: same shape. The graph is kept, so that the engine can differentiate the mean for gradient norms.
    """
    keep = where.to(values.dtype)
    return torch.stack([(values * keep).sum(), keep.sum()])


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` where `where` is true; 0 (with a graph) where it is true nowhere."""
    keep = where.to(values.dtype)
    return (values * keep).sum() / keep.sum().clamp_min(1.0)
