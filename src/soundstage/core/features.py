"""Taps: read what named submodules put out while a network runs, without a flag in its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from soundstage.core.errors import one_of


@contextmanager
def tap(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of submodules, by their names in module.named_modules().

    `with tap(net, ["blocks.3"]) as features: net(...)` leaves features["blocks.3"], the output of the last call, with
    its gradient. The hooks are gone after the block. Raises ConfigError for a name that is not there.
    """
    parts = {name: _part(module, name) for name in names}
    features: dict[str, Any] = {}

    def save(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: features.__setitem__(name, output)

    hooks = [part.register_forward_hook(save(name)) for name, part in parts.items()]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def _part(module: nn.Module, name: str) -> nn.Module:
    """A submodule, also one that stands behind an attribute and not in the registry, as in an adapted network."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise one_of("tap", name, filter(None, dict(module.named_modules()))) from None
