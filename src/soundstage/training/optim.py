"""Optimisers of one role, and the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.errors import ConfigError, WeightsError
from soundstage.training.config import Optim


def rate(optim: Optim, step: int, steps: int) -> float:
    """Learning rate at `step` of `steps`, both counted from where the schedule starts."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, steps - optim.warmup))
    if optim.schedule == "cosine":
        factor = optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * progress))
    elif optim.schedule == "linear":
        factor = 1 - (1 - optim.final) * progress
    elif optim.schedule == "wsd":
        tail = max(1e-9, min(1.0, optim.decay))
        factor = 1 - (1 - optim.final) * max(0.0, (progress - (1 - tail)) / tail)
    else:
        factor = 1.0
    return optim.lr * factor


def groups(module: nn.Module, optim: Optim) -> dict[str, list[Tensor]]:
    """Trainable parameters as "muon", "decay" (matrices) and "plain" (biases, norms, gates)."""
    hidden = _hidden(module) if optim.kind == "muon" else set()
    found: dict[str, list[Tensor]] = {"muon": [], "decay": [], "plain": []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = "muon" if id(parameter) in hidden else "decay" if parameter.ndim >= 2 else "plain"
            found[kind].append(parameter)
    return found


def _hidden(module: nn.Module) -> set[int]:
    """Weights of the Linear layers inside ModuleLists: hidden matrices, not embeddings, inputs or heads."""
    return {
        id(layer.weight)
        for blocks in module.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear)
    }


class Optimizer:
    """The optimiser of one role: torch optimisers over its parameter groups, clipping, and their state."""

    def __init__(self, module: nn.Module, optim: Optim) -> None:
        if optim.kind not in ("adamw", "muon"):
            raise ConfigError(f"optim.kind: {optim.kind!r} is not one of adamw, muon")
        self.optim = optim
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("optim: the network has no trainable parameter; give its role optim=None")
        found = groups(module, optim)
        self._parts: list[torch.optim.Optimizer] = []
        if found["muon"]:
            self._parts.append(
                torch.optim.Muon(
                    found["muon"],
                    lr=optim.lr,
                    weight_decay=optim.weight_decay,
                    momentum=optim.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        rest = [
            {"params": found[kind], "weight_decay": optim.weight_decay if kind == "decay" else 0.0}
            for kind in ("decay", "plain")
            if found[kind]
        ]
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True))

    def clip(self) -> Tensor:
        """Scale the gradients to the configured norm; returns the norm before (0-dim)."""
        limit = math.inf if self.optim.clip is None else self.optim.clip
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)

    def step(self, lr: float) -> None:
        """Move the parameters, and drop the gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, so that torch.load(weights_only=True) reads it."""
        return {"kind": self.optim.kind, "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over moments and momenta; settings stay those of this configuration.

        Raises WeightsError when they belong to another kind of optimiser or to other parameters.
        """
        sizes = [[len(group["params"]) for group in part.param_groups] for part in self._parts]
        saved = [[len(group["params"]) for group in part["param_groups"]] for part in state["parts"]]
        if state["kind"] != self.optim.kind or sizes != saved:
            raise WeightsError(
                f"optimiser state of {state['kind']} over {saved} parameters does not fit "
                f"{self.optim.kind} over {sizes}"
            )
        for part, values in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict({"state": values["state"], "param_groups": part.state_dict()["param_groups"]})
