"""What a run would be, without running it: `soundstage train RECIPE --dry-run`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from soundstage.training.config import Optim, TrainConfig, describe
from soundstage.training.optim import groups
from soundstage.training.state import phases


def plan(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration, and what it takes: parameters and bytes per role, and the model's own figures.

    Networks are built on the meta device, so 7 B parameters cost no memory. bytes: weights, gradients, optimiser state
    and average, without activations. A model's `describe()` adds tokens and FLOPs; "flops" in it means one forward
    pass of one sample, and a training step costs three such passes per sample. Raises ConfigError for a stage that
    cannot be.
    """
    spans = [{"start": phase.start, "end": phase.end} for phase in phases(config)]
    roles = {"student": (config.model, config.optim)} | {n: (r.model, r.optim) for n, r in config.roles.items()}
    shown = {name: _role(model, optim) for name, (model, optim) in roles.items()}
    if config.ema is not None:
        shown["ema"] = {"parameters": shown["student"]["parameters"], "bytes": shown["student"]["parameters"] * 4}
    found = {
        "config": describe(config),
        "out": str(config.folder),
        "phases": spans,
        "samples": config.batch_size * config.steps,
        "roles": shown,
        "bytes": sum(role["bytes"] for role in shown.values()),
    }
    own = getattr(config.model, "describe", None)
    if own is not None:
        found["model"] = dict(own())
        if "flops" in found["model"]:
            found["flops_per_step"] = 3 * found["model"]["flops"] * config.batch_size
    return found


def _role(model: Any, optim: Optim | None) -> dict[str, int]:  # noqa: ANN401
    """Parameters, those that move, and bytes of fp32 weights with gradients and optimiser state."""
    module = on_meta(model)
    parameters = sum(p.numel() for p in module.parameters())
    held = parameters * 4 + sum(b.numel() * b.element_size() for b in module.buffers())
    if optim is None:
        return {"parameters": parameters, "moving": 0, "bytes": held}
    sizes = {kind: sum(p.numel() for p in found) for kind, found in groups(module, optim).items()}
    moving = sum(sizes.values())
    # gradient and one momentum for Muon; gradient and two moments for AdamW
    return {"parameters": parameters, "moving": moving, "bytes": held + 12 * moving - 4 * sizes["muon"]}


def on_meta(model: Any) -> nn.Module:  # noqa: ANN401
    """A model built from its configuration without memory for its weights."""
    with torch.device("meta"):
        return model.build()
