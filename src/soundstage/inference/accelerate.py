"""Switches that make a backbone lighter or faster, whichever backbone it is.

Each finds what it changes by its place (`module.blocks`) or its class (core.attention); none knows the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from soundstage.core.attention import KERNELS, Attend, Memo, Precise, Tokens, kernel, kernels
from soundstage.core.errors import ConfigError, one_of
from soundstage.inference.offload import offload, offloaded
from soundstage.inference.quantize import FORMS, blocks_of, quantize, stored_bytes

GUIDANCE = ("auto", "together", "apart")
WORDS: dict[str, tuple[str, Any]] = {
    "offload": ("offload", True),
    "compile": ("compile", True),
    "int8": ("weights", "int8"),
    "fp8": ("weights", "fp8"),
    "text-memo": ("text_memo", True),
    "no-text-memo": ("text_memo", False),
    "fp32-norms": ("fp32_norms", True),
    "bf16-norms": ("fp32_norms", False),
    "together": ("guidance", "together"),
    "apart": ("guidance", "apart"),
}
P = TypeVar("P", bound=nn.Module)


@dataclass(frozen=True)
class Switches:
    """What is switched on.

    attention: a name in core.attention.KERNELS. weights: of the blocks' Linear layers, "int8" or "fp8"; None = as
        loaded. offload: the blocks' weights wait in host memory. compile: each block by torch.compile.
    text_memo: the text's keys and values once per clip, not per step. fp32_norms: norms, modulation and rotary
        positions in float32; otherwise in the type they come in.
    guidance: both predictions in one batched call ("together"), in two ("apart"), or "auto" by memory; for whoever
        builds the guidance.
    tiles: latent cells per side of the tiles that a picture is decoded in; None = whole, "auto" = by memory; for
        whoever decodes.
    """

    attention: str = "sdpa"
    weights: str | None = None
    offload: bool = False
    compile: bool = False
    text_memo: bool = True
    fp32_norms: bool = True
    guidance: str = "auto"
    tiles: str | int | None = "auto"

    def __post_init__(self) -> None:
        if self.attention not in KERNELS:
            raise one_of("attention", self.attention, KERNELS)
        if self.weights is not None and self.weights not in FORMS:
            raise one_of("weights", self.weights, FORMS)
        if self.guidance not in GUIDANCE:
            raise one_of("guidance", self.guidance, GUIDANCE)
        if self.tiles not in ("auto", None) and not (isinstance(self.tiles, int) and self.tiles > 0):
            raise ConfigError(f"tiles: {self.tiles!r} is not auto, none or a number of latent cells above 0")

    @classmethod
    def parse(cls, text: str) -> Switches:
        """The switches of a list such as "offload,int8,attention=sage,tiles=22".

        Raises ConfigError for a word that is none, with the nearest one, and for two that exclude each other.
        """
        found: dict[str, tuple[Any, str]] = {}
        for word in filter(None, (part.strip() for part in text.split(","))):
            name, value = _meaning(word)
            if name in found and found[name][0] != value:
                raise ConfigError(f"accelerate: {found[name][1]} and {word} exclude each other; leave one out")
            found[name] = (value, word)
        return cls(**{name: value for name, (value, _) in found.items()})

    def apply(self, module: nn.Module, device: torch.device | str) -> nn.Module:
        """The module, switched and moved to `device`, in place: weights, then place, kernel, memo, precision, compile.

        Raises ConfigError, before anything is changed, for a switch that this module or this machine has not, and
        MissingExtra where a package is missing.
        """
        self._check(module)
        if self.weights is not None:
            quantize(module, self.weights)
        if self.offload:
            offload(module, device)
        else:
            module.to(device)
        for part in _parts(module, Attend):
            part.use(self.attention)
        for part in _parts(module, Memo):
            part.enabled = self.text_memo
        for part in _parts(module, Precise):
            part.fp32 = self.fp32_norms
        if self.compile:
            compile_blocks(module)
        return module

    def _check(self, module: nn.Module) -> None:
        if self.attention != "sdpa" and not _parts(module, Attend):
            raise ConfigError(
                f"attention: {type(module).__name__} has its own attention, which cannot be exchanged for "
                f"{self.attention}; leave it out"
            )
        kernel(self.attention)
        for name in ("weights", "offload", "compile"):
            if getattr(self, name):
                blocks_of(module, name)

    def report(self, module: nn.Module) -> dict[str, Any]:
        """What is on in `module`, as JSON: every switch by name, with what it found there to act on.

        attention.kernels: each kernel, and why it cannot run here ("" where it can). Bytes are of parameters.
        """
        attends, memos, precise = _parts(module, Attend), _parts(module, Memo), _parts(module, Precise)
        blocks = [block for block in getattr(module, "blocks", ()) if isinstance(block, nn.Module)]
        state = offloaded(module)
        weights = [parameter for parameter in module.parameters() if not parameter.is_meta]
        quantised = [parameter for parameter in weights if is_traceable_wrapper_subclass(parameter)]
        on: dict[str, Any] = {
            "attention": {
                "kernel": sorted({part.kernel for part in attends}),
                "parts": len(attends),
                "processes": max((part.size for part in _parts(module, Tokens)), default=1),
                "kernels": kernels(),
            },
            "weights": {
                "form": sorted({type(parameter.data).__name__ for parameter in quantised}),
                "quantised": len(quantised),
                "bytes": sum(stored_bytes(parameter) for parameter in weights),
            },
            "offload": state is not None and state.report(),
            "compile": {"blocks": sum(block._compiled_call_impl is not None for block in blocks), "of": len(blocks)},
            "text_memo": {"parts": len(memos), "on": sum(part.enabled for part in memos)},
            "fp32_norms": {"parts": len(precise), "on": sum(part.fp32 for part in precise)},
        }
        return {**asdict(self), **on}


def compile_blocks(module: nn.Module, mode: str | None = None) -> nn.Module:
    """Compile each block by itself, in place; names of weights stay. mode: as in torch.compile.

    Blocks of one kind share what is compiled: the first call costs seconds to minutes, once per number of tokens and,
    from the second number on, once for all. A graph break is an error. Raises ConfigError for no blocks.
    """
    for block in dict.fromkeys(blocks_of(module, "compile")):
        block.compile(fullgraph=True, mode=mode)
    return module


def forget(module: nn.Module) -> None:
    """Drop what memos keep of a clip's text, when the clip is done."""
    for part in _parts(module, Memo):
        part.forget()


def _parts(module: nn.Module, kind: type[P]) -> list[P]:
    return [part for part in module.modules() if isinstance(part, kind)]


def _meaning(word: str) -> tuple[str, Any]:
    """(field, value) of one word."""
    name, given, value = word.partition("=")
    if not given and name in WORDS:
        return WORDS[name]
    if given and name == "attention":
        if value not in KERNELS:
            raise one_of("accelerate: attention", value, KERNELS)
        return name, value
    if given and name == "tiles":
        if value in ("auto", "none"):
            return name, None if value == "none" else value
        if not value.isdigit() or int(value) == 0:
            raise ConfigError(f"accelerate: tiles={value} is not auto, none or a number of latent cells above 0")
        return name, int(value)
    known = [*WORDS, *(f"attention={each}" for each in KERNELS), "tiles=auto", "tiles=none", "tiles=N"]
    raise one_of("accelerate", word, known)
