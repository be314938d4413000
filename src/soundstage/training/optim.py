"""Optimisers of one role, and the learning rate over a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.errors import ConfigError, WeightsError
from soundstage.training.config import Optim
from soundstage.training.parallel import divided, local, part_of


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


def groups(module: nn.Module, optim: Optim) -> dict[tuple[str, float], list[Tensor]]:
    """Trainable parameters by kind and by their factor on the learning rate; factor 0 = frozen.

    Kinds: "muon", "decay" (matrices), "plain" (biases, norms, gates), in this order. Raises ConfigError for a pattern
    of `optim.scale` that is no regular expression, is negative, or is found in no name.
    """
    hidden = _hidden(module) if optim.kind == "muon" else set()
    scales = _scales(optim)
    found: dict[tuple[str, float], list[Tensor]] = {}
    unused = set(optim.scale)
    for name, parameter in module.named_parameters():
        matching = [(text, factor) for text, pattern, factor in scales if pattern.search(name)]
        unused -= {text for text, _ in matching}
        if parameter.requires_grad:
            kind = "muon" if id(parameter) in hidden else "decay" if parameter.ndim >= 2 else "plain"
            found.setdefault((kind, matching[0][1] if matching else 1.0), []).append(parameter)
    if unused:
        example = next((name for name, _ in module.named_parameters()), "")
        raise ConfigError(f"optim.scale: {min(unused)!r} is found in no parameter's name, such as {example!r}")
    order = ("muon", "decay", "plain")
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), -item[0][1])))


def _scales(optim: Optim) -> list[tuple[str, re.Pattern[str], float]]:
    for text, factor in optim.scale.items():
        if not factor >= 0:
            raise ConfigError(f"optim.scale: {factor} for {text!r} is below 0; 0 freezes, 1 changes nothing")
    try:
        return [(text, re.compile(text), float(factor)) for text, factor in optim.scale.items()]
    except re.error as error:
        raise ConfigError(f"optim.scale: {error.pattern!r} is no regular expression ({error})") from None


def _hidden(module: nn.Module) -> set[int]:
    """Weights of the Linear layers inside ModuleLists: hidden matrices, not embeddings, inputs or heads."""
    return {
        id(layer.weight)
        for blocks in module.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear)
    }


class _Muon(torch.optim.Muon):
    """Muon on divided matrices too: one after the other is gathered, moved as a whole, and divided again."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if not any(divided(p) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return None

    def _move(self, parameter: Any, group: dict[str, Any]) -> None:  # noqa: ANN401
        whole = nn.Parameter(parameter.full_tensor())
        whole.grad = parameter.grad.full_tensor()
        alone = torch.optim.Muon([{**group, "params": [whole]}])
        held = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        alone.state[whole] = {"momentum_buffer": held.full_tensor()}
        alone.step()
        local(parameter).copy_(local(part_of(whole.detach(), parameter)))
        local(held).copy_(local(part_of(alone.state[whole]["momentum_buffer"], held)))


class Optimizer:
    """The optimiser of one role: torch optimisers over its parameter groups, clipping, and their state."""

    def __init__(self, module: nn.Module, optim: Optim) -> None:
        if optim.kind not in ("adamw", "muon"):
            raise ConfigError(f"optim.kind: {optim.kind!r} is not one of adamw, muon")
        self.optim = optim
        found = groups(module, optim)
        self.frozen = [p for (_, scale), parameters in found.items() if not scale for p in parameters]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("optim: the network has no trainable parameter; give its role optim=None")
        self._parts: list[torch.optim.Optimizer] = []
        moving = [(kind, {"params": those, "scale": scale}) for (kind, scale), those in found.items() if scale]
        muon = [group for kind, group in moving if kind == "muon"]
        if muon:
            self._parts.append(
                _Muon(
                    muon,
                    lr=optim.lr,
                    weight_decay=optim.weight_decay,
                    momentum=optim.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        rest = [
            {**group, "weight_decay": optim.weight_decay if kind == "decay" else 0.0}
            for kind, group in moving
            if kind != "muon"
        ]
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True))

    def clip(self) -> Tensor:
        """Scale the gradients to the configured norm, over all processes; returns the norm before (0-dim)."""
        limit = math.inf if self.optim.clip is None else self.optim.clip
        if not any(map(divided, self.parameters)):
            return torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor()
        torch._foreach_mul_([local(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, lr: float) -> None:
        """Move the parameters, and drop the gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * group["scale"]
            part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def take_over(self, old: Optimizer) -> None:
        """Go on with the moments that an optimiser of the same kind has of the parameters that move here too."""
        if old.optim.kind != self.optim.kind:
            return
        held = {id(p): state for part in old._parts for p, state in part.state.items()}
        for part in self._parts:
            for group in part.param_groups:
                part.state.update({p: held[id(p)] for p in group["params"] if id(p) in held})

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, so that torch.load(weights_only=True) reads it."""
        return {"kind": self.optim.kind, "parts": [part.state_dict() for part in self._parts]}

    def about(self) -> dict[str, Any]:
        """Its kind, and the numbers of parameters in its groups: what a state must agree with."""
        return {"kind": self.optim.kind, "sizes": _sizes(self.state_dict())}

    def blank(self, shapes: Mapping[tuple[int, int, str], torch.Size]) -> dict[str, Any]:
        """A state_dict of zeros, divided as the parameters are, for a reader to fill.

        shapes: of what is to be read, by number of the torch optimiser, of the parameter in it, and name.
        """
        state = self.state_dict()
        for part, values in zip(self._parts, state["parts"], strict=True):
            values["state"] = {}
            held = [p for group in part.param_groups for p in group["params"]]
            for (number, index, key), shape in shapes.items():
                if part is self._parts[number]:
                    like = held[index].detach()
                    blank = torch.zeros_like(like) if shape == like.shape else torch.zeros(shape, device=like.device)
                    values["state"].setdefault(index, {})[key] = blank
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over moments and momenta; settings stay those of this configuration.

        Raises WeightsError when they belong to another kind of optimiser or to other parameters.
        """
        sizes, saved = _sizes(self.state_dict()), _sizes(state)
        if state["kind"] != self.optim.kind or sizes != saved:
            raise WeightsError(
                f"optimiser state of {state['kind']} over {saved} parameters does not fit "
                f"{self.optim.kind} over {sizes}"
            )
        for part, values in zip(self._parts, state["parts"], strict=True):
            held = [p for group in part.param_groups for p in group["params"]]
            fitting = {
                index: {key: _fitting(value, held[index]) for key, value in moments.items()}
                for index, moments in values["state"].items()
            }
            part.load_state_dict({"state": fitting, "param_groups": part.state_dict()["param_groups"]})


def _sizes(state: dict[str, Any]) -> list[list[int]]:
    return [[len(group["params"]) for group in part["param_groups"]] for part in state["parts"]]


def _fitting(value: Any, parameter: Tensor) -> Any:  # noqa: ANN401
    """A moment as its parameter is divided; a count stays a number."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and not divided(value):
        return part_of(value, parameter)
    return value
