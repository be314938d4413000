"""Weights of the Linear layers inside `module.blocks` held in 8 bits; everything is still computed in the working type.

int8: a scale per output channel, 127 steps either way. fp8: e4m3 with a scale per output channel. Both halve a bf16
model; int8 is the more exact, as weights have no heavy tails. Norms, tables, embeddings and heads stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from soundstage.core.errors import ConfigError, one_of
from soundstage.core.extras import optional

FORMS = ("int8", "fp8")


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did. layers: Linear layers changed. before, after: bytes of their weights."""

    layers: int
    before: int
    after: int


def quantize(module: nn.Module, form: str) -> Quantized:
    """Hold the weights of every nn.Linear in `module.blocks` as "int8" or "fp8", in place, one layer at a time.

    A weight keeps its name, shape and dtype (the working type, in which its inputs must come); it can be moved between
    devices and saved, but no longer trained or cast. Merge adapters first.
    Raises ConfigError for another form, no blocks, or weights quantised before; MissingExtra without torchao.
    """
    if form not in FORMS:
        raise one_of("weights", form, FORMS)
    layers = linear_layers(module)
    if any(is_traceable_wrapper_subclass(layer.weight) for layer in layers):
        raise ConfigError(f"weights: {form} was asked for and they are quantised already; load them again first")
    ao = optional("torchao.quantization", "models")
    # Without set_inductor_config the choice of weights would change how every later torch.compile tunes.
    config = {"int8": ao.Int8WeightOnlyConfig, "fp8": ao.Float8WeightOnlyConfig}[form](set_inductor_config=False)
    before = after = 0
    for layer in layers:
        before += stored_bytes(layer.weight)
        ao.quantize_(layer, config)
        layer.weight.requires_grad_(False)
        after += stored_bytes(layer.weight)
    return Quantized(len(layers), before, after)


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """The Linear layers inside `module.blocks`; raises ConfigError when there are none."""
    blocks = blocks_of(module, "weights")
    found = [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ConfigError(f"weights: the blocks of {type(module).__name__} hold no Linear layer to quantise")
    return found


def blocks_of(module: nn.Module, asked: str) -> nn.ModuleList:
    """`module.blocks`, the transformer blocks of a backbone; raises ConfigError, naming the switch, without them."""
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ConfigError(f"{asked}: {type(module).__name__} has no blocks (nn.ModuleList) to do this to; leave it out")
    if any(parameter.is_meta for parameter in blocks.parameters()):
        raise ConfigError(f"{asked}: the weights of {type(module).__name__} are on the meta device; load them first")
    return blocks


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's values: itself, or those inside a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(tensor, name))]


def rebuilt(tensor: Tensor, new: Iterator[Tensor]) -> Tensor:
    """A tensor like this one over other parts, taken from `new` in the order of `parts`."""
    if not is_traceable_wrapper_subclass(tensor):
        return next(new)
    names, context = tensor.__tensor_flatten__()
    inner = {name: rebuilt(getattr(tensor, name), new) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's values take, scales included."""
    return sum(part.numel() * part.element_size() for part in parts(tensor))
