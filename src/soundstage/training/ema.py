"""The averaged student."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from soundstage.training.parallel import local


class Ema:
    """Exponential moving average of a module's parameters; buffers are copied.

    Divided modules (training.parallel) cannot be copied: make it before, and divide its `module` likewise.
    The decay warms up as (1 + n) / (10 + n), so that early steps do not hold the initial weights for long.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Fold in the weights reached after step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_held(self.module), _held(module), 1 - decay)
        for kept, new in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(new)


def _held(module: nn.Module) -> list[Tensor]:
    """What this process holds of each parameter."""
    return [local(parameter) for parameter in module.parameters()]
