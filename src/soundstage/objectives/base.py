"""What the engine and the losses agree on: a `Batch` in, named terms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from soundstage.core.batch import Batch
from soundstage.core.denoiser import Losses
from soundstage.core.rng import Rng

__all__ = ["Batch", "Losses", "Nets", "Objective", "mean_where", "report"]

Nets = Mapping[str, Callable[..., Any]]
"""Role ("student", "teacher", "fake_score", "discriminator") to the network that plays it."""


class Objective(Protocol):
    """Which roles move at a step, and the terms of each. Owns maths only: no optimiser, no EMA, no checkpoint.

    A term is a scalar; the engine weighs, sums and differentiates terms. A tensor of shape (2,) is a report
    (`report`): it is logged as a mean and never added to the loss. `loss` is pure given `rng`.
    """

    def turn(self, step: int) -> tuple[str, ...]: ...

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses: ...


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
