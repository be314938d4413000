from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from soundstage.core.errors import ConfigError, WeightsError
from soundstage.testing.tiny import ToyConfig
from soundstage.training.config import Optim, Role, TrainConfig
from soundstage.training.ema import Ema
from soundstage.training.optim import Optimizer, groups, rate
from soundstage.training.plan import plan


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.1]),
    ],
)
def test_rates_at_the_ends_and_the_middle(schedule: str, expected: list[float]) -> None:
    optim = Optim(lr=1.0, warmup=2, schedule=schedule, final=0.1, decay=0.5)  # type: ignore[arg-type]
    assert [rate(optim, step, 12) for step in (0, 1, 2, 7, 12)] == pytest.approx(expected)


def test_wsd_falls_only_in_its_tail() -> None:
    optim = Optim(lr=1.0, schedule="wsd", decay=0.2)
    assert [rate(optim, step, 100) for step in (0, 79, 90, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_muon_takes_hidden_matrices_only() -> None:
    module = ToyConfig(width=16, depth=3).build()
    found = groups(module, Optim(kind="muon"))
    assert list(found) == [("muon", 1.0), ("decay", 1.0), ("plain", 1.0)]
    assert [p.shape for p in found["muon", 1.0]] == [(16, 16)] * 3
    assert len(found["decay", 1.0]) == 4
    assert all(p.ndim == 1 for p in found["plain", 1.0])
    assert list(groups(module, Optim())) == [("decay", 1.0), ("plain", 1.0)]


def test_a_rate_of_its_own_for_what_a_pattern_finds() -> None:
    module = ToyConfig(width=4, depth=1).build()
    optimizer = Optimizer(module, Optim(weight_decay=0.0, scale={r"outputs\.audio": 0.5, "audio": 0.0}))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    moved = {name: (before[name] - p.detach()).abs().mean().item() for name, p in module.named_parameters()}
    assert moved.pop("inputs.audio.weight") == moved.pop("inputs.audio.bias") == 0
    assert [moved.pop(f"outputs.audio.{name}") for name in ("weight", "bias")] == pytest.approx([0.05] * 2, rel=1e-5)
    assert list(moved.values()) == pytest.approx([0.1] * 6, rel=1e-5)


@pytest.mark.parametrize(("pattern", "factor"), [("audoi", 0.5), ("audio(", 0.5), ("audio", -1.0)])
def test_a_pattern_that_says_nothing_is_refused(pattern: str, factor: float) -> None:
    with pytest.raises(ConfigError, match=r"optim\.scale"):
        Optimizer(ToyConfig().build(), Optim(scale={pattern: factor}))


def test_muon_moves_a_matrix_by_an_orthogonal_step() -> None:
    """With the RMS of AdamW: 0.2 sqrt(max(A, B)) lr times an orthogonal matrix (arXiv:2502.16982, eq. 4)."""
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(8, 8, bias=False)])
    before = module[0].weight.detach().clone()  # type: ignore[union-attr]
    module[0].weight.grad = torch.randn(8, 8)  # type: ignore[union-attr]
    Optimizer(module, Optim(kind="muon", lr=1.0, weight_decay=0.0)).step(0.1)
    moved = (before - module[0].weight).detach()  # type: ignore[union-attr, operator]
    singular = torch.linalg.svdvals(moved) / (0.1 * 0.2 * 8**0.5)
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_adamw_decays_matrices_and_leaves_the_rest() -> None:
    module = nn.Linear(2, 2)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(module, Optim(weight_decay=0.5)).step(0.1)
    assert torch.allclose(module.weight, torch.tensor(0.95))
    assert torch.equal(module.bias, torch.ones(2))


def test_clipping_reports_the_norm_before() -> None:
    module = nn.Linear(1, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    assert float(Optimizer(module, Optim(clip=1.0)).clip()) == pytest.approx(5.0)
    assert float(module.weight.grad.item()) == pytest.approx(0.6)


def test_state_of_another_optimizer_is_refused() -> None:
    module = ToyConfig().build()
    with pytest.raises(WeightsError, match=r"state of adamw .* does not fit muon"):
        Optimizer(module, Optim(kind="muon")).load_state_dict(Optimizer(module, Optim()).state_dict())


def test_the_average_follows_with_its_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, 0.5)
    nn.init.ones_(module.weight)
    ema.update(module, step=0)
    assert float(ema.module.weight.item()) == pytest.approx(0.9)  # type: ignore[union-attr]
    ema.update(module, step=1000)
    assert float(ema.module.weight.item()) == pytest.approx(0.95)  # type: ignore[union-attr]


def test_a_plan_counts_without_building(make: Callable[..., TrainConfig], tmp_path: Path) -> None:
    huge = ToyConfig(width=65536, depth=2)
    found = plan(make(model=huge, roles={"teacher": Role(huge)}, steps=3, batch_size=4, out=str(tmp_path)))
    count = found["roles"]["student"]["parameters"]
    assert count > 2 * 65536**2
    assert found["roles"]["student"]["bytes"] == 16 * count
    assert found["roles"]["teacher"] == {"parameters": count, "moving": 0, "bytes": 4 * count}
    assert found["bytes"] == (16 + 4 + 4) * count
    assert found["samples"] == 12
    assert found["config"]["model"]["width"] == 65536
