"""Low-rank adapters (arXiv:2106.09685): several networks on one frozen base, each at about 1 % of its size.

    student = Lora("teacher", rank=32).on(teacher, "student")

An adapted network runs on a view of the base: a second tree of modules with the base's own parameters, in which the
adapted layers are peft's. Nothing is switched on or off between calls, so that the base stays what it was bit by bit,
networks on it can take turns before a common backward pass, and a block computed again in that pass is its own.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.errors import ConfigError, WeightsError
from soundstage.core.extras import optional
from soundstage.models.weight_files import metadata
from soundstage.models.weights import fingerprint, load_weights, save_weights

__all__ = ["Adapted", "Lora", "load_adapter", "merged", "save_adapter"]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Lora:
    """A role's network as a change of low rank to another's: W + (alpha / rank) B A, B starting at 0.

    base: the role whose frozen network carries it. targets: the Linear layers changed: a regular expression found in
    their names, or their names; None = all inside `blocks`. alpha: None = rank. dropout: on what A reads, in training.
    """

    base: str = "teacher"
    rank: int = 32
    alpha: float | None = None
    targets: str | tuple[str, ...] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"Lora.rank: {self.rank} is not at least 1")

    def on(self, module: nn.Module, role: str) -> Adapted:
        """A network for `role` on a module that stays as it is, its parameters in float32 where the module's are.

        It begins as the module itself. Raises ConfigError where no layer is a target, MissingExtra without peft.
        """
        return Adapted(module, self, role)

    def names(self, module: nn.Module) -> list[str]:
        """The layers of a module that are changed."""
        linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        if isinstance(self.targets, tuple):
            found = [name for name in linear if name in self.targets]
            absent = sorted({*self.targets} - {*found})
            if absent:
                raise ConfigError(f"Lora.targets: {absent[0]!r} is no Linear layer; there are {_some(linear)}")
        else:
            pattern = re.compile(r"^blocks\." if self.targets is None else self.targets)
            found = [name for name in linear if pattern.search(name)]
        if not found:
            raise ConfigError(
                f"Lora.targets: {self.targets or 'blocks'!r} is found in no name of a Linear layer; there are "
                f"{_some(linear)}"
            )
        return found

    def peft(self, names: list[str]) -> Any:  # noqa: ANN401
        """peft's own configuration for these layers."""
        alpha = self.rank if self.alpha is None else self.alpha
        return optional("peft", "models", "LoraConfig").LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, names)),
        )


class Adapted(nn.Module):
    """A network on a frozen base: parameters, state dict, device and mode are the adapter's alone.

    The names are those of a published peft file, `base_model.model.blocks.0.attention.out.lora_A.weight`. Every other
    attribute is that of the view: `blocks` and `config` to read, `checkpointing` to set (the base keeps its own).
    Layers outside the adapted ones are the base's, in the base's mode. A deep copy is another adapter on the same base.
    """

    def __init__(self, base: nn.Module, lora: Lora, role: str, *, device: str | None = None) -> None:
        super().__init__()
        names = lora.names(base)
        # past nn.Module.__setattr__, which would register the base's parameters as this module's
        self.__dict__.update(_base=base, _lora=lora, _role=role, _names=names)
        view = _view(base, {name.rpartition(".")[0] for name in names})
        inject = optional("peft", "models", "inject_adapter_in_model").inject_adapter_in_model
        frozen = [p for p in base.parameters() if p.requires_grad]
        inject(lora.peft(names), view, role, low_cpu_mem_usage=True)
        for parameter in frozen:  # peft freezes what it is given, and whether the base moves is not ours to say
            parameter.requires_grad_(True)
        self.__dict__["_view"] = view
        for name, layer in self._layers():
            place = _node(self, PREFIX + name)
            whole = layer.get_base_layer()  # of a sharded layer peft takes the part that is here
            for part, sizes in (
                ("lora_A", (whole.in_features, lora.rank)),
                ("lora_B", (lora.rank, whole.out_features)),
            ):
                sides: nn.ModuleDict = getattr(layer, part)
                sides[role] = nn.Linear(*sizes, bias=False, device=device or whole.weight.device)
                place.add_module(part, sides[role])
            nn.init.zeros_(layer.lora_B[role].weight)
            place.add_module("lora_dropout", layer.lora_dropout[role])

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What the base would give with the adapter's change to its weights."""
        return self._view(*args, **kwargs)

    def _layers(self) -> Iterator[tuple[str, Any]]:
        """Name and peft layer of every adapted layer."""
        return ((name, self._view.get_submodule(name)) for name in self._names)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_view" not in self.__dict__:
                raise
            return getattr(self.__dict__["_view"], name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        view = self.__dict__.get("_view")
        theirs = view is not None and name in view.__dict__
        if theirs and name not in self.__dict__ and not hasattr(nn.Module, name):
            setattr(view, name, value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        other = Adapted(self._base, self._lora, self._role, device="meta")  # where nothing is drawn
        for one, two in zip(self.modules(), other.modules(), strict=True):
            for name, parameter in one._parameters.items():
                setattr(two, name, copy.deepcopy(parameter, memo))
        return other.train(self.training)


def merged(adapted: Adapted) -> dict[str, Tensor]:
    """The state dict of a plain network that computes the same: the base's, with the change added to its weights.

    Of a base divided over processes, whole; all of them call it.
    """
    tensors = _whole(adapted._base)
    for name, layer in adapted._layers():
        weight = tensors[f"{name}.weight"]
        change = layer.get_delta_weight(adapted._role).detach()
        tensors[f"{name}.weight"] = (weight.float() + change.float()).to(weight.dtype)
    return tensors


def save_adapter(adapted: Adapted, folder: Path) -> Path:
    """Write an adapter as peft does, adapter_model.safetensors and adapter_config.json; returns the folder.

    The file also names its base, by the SHA-256 of the base's weights.
    """
    base = fingerprint(_whole(adapted._base))
    save_weights(adapted, folder / WEIGHTS, metadata={"format": "pt", "base_sha256": base})
    told = adapted._lora.peft(adapted._names).to_dict() | {"target_modules": adapted._names, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")
    return folder


def load_adapter(adapted: Adapted, folder: Path, *, any_base: bool = False) -> None:
    """Read an adapter that `save_adapter` or peft wrote; any_base: also one made on other weights of the same shapes.

    Raises WeightsError for tensors that do not fit, and for an adapter of another base.
    """
    path = folder / WEIGHTS
    of = metadata(path).get("base_sha256")
    if of is not None and not any_base:
        here = fingerprint(_whole(adapted._base))
        if of != here:
            raise WeightsError(
                f"{path}: is an adapter of other weights (SHA-256 {of[:12]}, and these are {here[:12]}); load the "
                "model that it was trained on, or say any_base=True"
            )
    device = next(adapted.parameters()).device
    load_weights(adapted, path, device=device, dtype=torch.float32, what="this adapter")


def _whole(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, tensors divided over processes gathered."""
    held = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    return {name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() for name, tensor in held.items()}


def _view(module: nn.Module, parents: set[str], name: str = "") -> nn.Module:
    """A module with the same parameters and children, in which the named modules can get other children.

    Only they and the way to them are copied. Hooks are copied as they are, so that a sharded module gathers its
    parameters in the view too.
    """
    inside = f"{name}." if name else ""
    if name not in parents and not any(parent.startswith(inside) for parent in parents):
        return module
    twin = object.__new__(module.__class__)  # FSDP has a __new__ of its own
    shared = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    for key, value in module.__dict__.items():
        twin.__dict__[key] = copy.copy(value) if isinstance(value, dict | set) and key not in shared else value
    twin.__dict__.pop("_compiled_call_impl", None)  # of the module itself
    for child, part in module._modules.items():
        if part is not None:
            twin._modules[child] = _view(part, parents, inside + child)
    return twin


def _node(root: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name, made of bare modules where there is none."""
    for part in name.split("."):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
