"""What a run would be, without running it: `soundstage train RECIPE --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from soundstage.core.av import AV
from soundstage.core.causal import is_causal
from soundstage.training import memory
from soundstage.training.config import Optim, Shared, TrainConfig, describe
from soundstage.training.optim import groups
from soundstage.training.state import networks, phases

DEVICES = (8, 16, 64)


def plan(config: TrainConfig, devices: Sequence[int] = DEVICES) -> dict[str, Any]:
    """The resolved configuration, and what it takes: parameters and bytes per role, and the model's own figures.

    Networks are built on the meta device, so 7 B parameters cost no memory. A network on another's base counts its own
    parameters only. bytes: weights, gradients, optimiser state and average on one device, without activations.
    A model's `describe()` adds tokens and FLOPs; "flops" in it means one forward pass of one sample, and a training
    step costs three such passes per sample. Where it also tells its "latents", "memory" has the bytes on each of
    several devices with activations, "calls" how often a step calls each network, and FLOPs follow from these (see
    `memory`): of the last stage, and "flops" of the whole run. Raises ConfigError for a stage that cannot be.
    """
    spans = [{"start": phase.start, "end": phase.end} for phase in phases(config)]
    optims = {"student": config.optim} | {name: role.optim for name, role in config.roles.items()}
    made: list[tuple[Any, nn.Module]] = []

    def make(model: Any) -> nn.Module:  # noqa: ANN401
        """Alike networks are one here, where they are only measured."""
        known = next((module for other, module in made if other == model), None)
        if known is None:
            made.append((model, model.build()))
        return made[-1][1] if known is None else known

    with torch.device("meta"):
        nets = networks(config, lambda _, module: module, make)
    shown = {name: _role(module, optims[name]) for name, module in nets.items()}
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
    whole = config.roles[config.model.base].model if isinstance(config.model, Shared) else config.model
    own = getattr(whole, "describe", None)
    if own is not None:
        found["model"] = dict(own())
        if "flops" in found["model"]:
            found["flops_per_step"] = 3 * found["model"]["flops"] * config.batch_size
    told = memory.known(config)
    return found if told is None else found | _measured(config, nets, told, devices)


def _measured(
    config: TrainConfig, nets: Mapping[str, nn.Module], told: Mapping[str, Mapping[str, Any]], devices: Sequence[int]
) -> dict[str, Any]:
    latents = AV(**{name: tuple(shape) for name, shape in told["student"]["latents"].items()})
    student: Any = nets["student"]
    chunks = len(student.chunks(latents.map(lambda shape: shape[1]))) if is_causal(student) else 2
    flops = {role: float(said["flops"]) for role, said in told.items()}
    stages = phases(config)
    each = [memory.count_calls(phase.config, latents.modalities, chunks) for phase in stages]
    per_step = [memory.flops_per_step(phase.config, made, flops) for phase, made in zip(stages, each, strict=True)]
    calls = each[-1]
    sizes = memory.memory(config, nets, latents, calls, devices)
    return {
        "calls": {role: vars(each) for role, each in calls.items()},
        "flops_per_step": per_step[-1],
        "flops": sum(cost * (phase.end - phase.start) for cost, phase in zip(per_step, stages, strict=True)),
        "memory": [{**vars(size), "total": size.total} for size in sizes],
    }


def _role(module: nn.Module, optim: Optim | None) -> dict[str, int]:
    """Parameters, those that move, and bytes of fp32 weights with gradients and optimiser state."""
    parameters = sum(p.numel() for p in module.parameters())
    held = sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
    if optim is None:
        return {"parameters": parameters, "moving": 0, "bytes": held}
    found = groups(module, optim)
    sizes = {key: sum(p.numel() for p in those) for key, those in found.items()}
    moving = sum(size for (_, factor), size in sizes.items() if factor)
    muon = sum(size for (kind, factor), size in sizes.items() if kind == "muon" and factor)
    # gradient and one momentum for Muon; gradient and two moments for AdamW
    return {"parameters": parameters, "moving": moving, "bytes": held + 12 * moving - 4 * muon}
