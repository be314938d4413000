"""A causal student divided over processes goes on from its cache as it does alone, and so does an adapter on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from soundstage.core import AV, Conditions, Rng
from soundstage.core.causal import Chunking
from soundstage.models.adapters.lora import Lora
from soundstage.models.causal import CausalDiTConfig
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.twin import TwinConfig
from soundstage.models.unified_dit import SMALL, UnifiedDiTConfig
from soundstage.models.wan import WanConfig
from soundstage.objectives.rollout import Given
from soundstage.objectives.self_forcing import SelfForcing
from soundstage.training.parallel import shard

CONFIG = UnifiedDiTConfig(width=32, depth=2, num_heads=2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)


TOWER = WanConfig(32, 56, 2, 2, in_channels=32, out_channels=32, frequencies=32, text_width=24, text_length=12)
TWIN = TwinConfig(TOWER, replace(TOWER, patch=(1,)), 0.3)
CONFIGS = {"unified": CausalDiTConfig.of(CONFIG), "twin": TWIN.as_causal(Chunking(Fraction(1, 2)), SMALL)}


def rolled(student: nn.Module, told: Conditions) -> list[torch.Tensor | None]:
    """What a rollout makes, and the gradients that it leaves."""
    x0 = Rng.of(0, 2).normal_like(AV(torch.empty(2, 32, 5, 4, 4), torch.empty(2, 32, 16)))
    given = Given(x0, x0.map(lambda z: torch.ones(2, z.shape[2])), told)
    made = SelfForcing()(student, given, Rng.of(1, 2), torch.ones(2, dtype=torch.int64)).x0
    torch.stack([x.square().mean() for x in made.values()]).sum().backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    whole = [getattr(g, "full_tensor", lambda g=g: g)() if g is not None else None for g in gradients]
    return [*(x.detach() for x in made.values()), *whole]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_make_the_chunks_and_gradients_of_one(kind: str, together: Callable[..., list[Any]]) -> None:
    torch.manual_seed(0)
    told = tokenize(["a red ball", "drums"]) if kind == "unified" else Conditions()
    alone: nn.Module = CONFIGS[kind].build()  # type: ignore[attr-defined]
    for parameter in alone.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)

    def adapted(base: nn.Module) -> nn.Module:
        network = Lora(rank=2).on(base, "student")
        for index, parameter in enumerate(network.parameters()):
            parameter.data.copy_(Rng.of(index, 1).normal(*parameter.shape)[0] * 0.1)
        return network

    def work(rank: int) -> list[torch.Tensor | None]:  # noqa: ARG001
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        divided = shard(copy.deepcopy(alone), mesh)
        found = rolled(divided, told)
        return found + rolled(adapted(divided.requires_grad_(False)), told)

    found = together(2, work)
    expected = rolled(copy.deepcopy(alone), told)
    expected += rolled(adapted(copy.deepcopy(alone).requires_grad_(False)), told)
    assert sum(each is not None for each in expected) > 20
    for process in found:
        assert isinstance(process, list), process
        for a, b in zip(process, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or float((a - b).abs().max()) < 1e-6  # type: ignore[operator]
