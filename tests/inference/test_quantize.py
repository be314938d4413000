"""Weights in 8 bits: how much they change, how much they weigh, and what they leave alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, MissingExtra
from soundstage.inference.quantize import FORMS, linear_layers, parts, quantize, stored_bytes
from soundstage.models.twin import Twin, TwinConfig
from soundstage.models.wan import WanConfig

pytest.importorskip("torchao")
TOWER = WanConfig(64, 128, 4, 2, in_channels=4, out_channels=4, frequencies=16, text_width=12, text_length=6)
CONFIG = TwinConfig(TOWER, replace(TOWER, in_channels=3, out_channels=3, patch=(1,)))
ERRORS = {"int8": (1e-3, 1e-2), "fp8": (5e-3, 4e-2)}
"""Relative error, between: int8 rounds to 1/254 of the largest weight of a row, fp8 to 1/16 of each weight."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(dtype: torch.dtype = torch.float32) -> Twin:
    """A tiny twin with nothing zero."""
    torch.manual_seed(0)
    module = CONFIG.build().eval()
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.to(dtype)


def run(module: nn.Module) -> torch.Tensor:
    """The velocity of both modalities in one row."""
    generator = torch.Generator().manual_seed(1)
    x = AV(torch.randn(1, 4, 3, 4, 6, generator=generator), torch.randn(1, 3, 7, generator=generator))
    text = torch.randn(1, 5, 12, generator=generator)
    t = torch.tensor([0.9])
    v = module(x, AV(t, t), Conditions(text=AV(text, text)))
    return torch.cat([part.flatten() for part in v.values()]).float()


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_moves_by_the_rounding_of_the_weights(form: str, dtype: torch.dtype) -> None:
    wanted = run(build(dtype))
    module = build(dtype)
    names = list(module.state_dict())
    quantize(module, form)
    low, high = ERRORS[form]
    assert low < error(run(module), wanted) < high
    assert list(module.state_dict()) == names


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_moves_by_its_own_rounding(form: str) -> None:
    before, after = build(), build()
    quantize(after, form)
    low, high = ERRORS[form]
    for one, other in zip(linear_layers(before), linear_layers(after), strict=True):
        x = torch.randn(32, one.in_features)
        assert low < error(other(x) - other.bias, x @ one.weight.T) < high


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_takes_a_byte_and_a_scale_per_row(form: str) -> None:
    module = build(torch.bfloat16)
    layers = linear_layers(module)
    done = quantize(module, form)
    assert done.layers == len(layers) == 2 * 2 * 12
    assert done.before == sum(2 * layer.in_features * layer.out_features for layer in layers)
    rows = sum(layer.out_features for layer in layers)
    assert done.before // 2 < done.after <= done.before // 2 + 8 * rows
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}, "the working type"


def test_only_linear_layers_of_blocks_are_changed() -> None:
    before, after = build(), build()
    quantize(after, "int8")
    inside = {f"blocks.{name}.weight" for name, part in after.blocks.named_modules() if isinstance(part, nn.Linear)}
    for name, value in after.state_dict().items():
        assert (len(parts(value)) > 1) == (name in inside), name
        if name not in inside:
            assert torch.equal(value, before.state_dict()[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_are_saved_and_loaded_bit_by_bit(form: str, tmp_path: Path) -> None:
    module = build(torch.bfloat16)
    quantize(module, form)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    loaded = CONFIG.build().eval()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), assign=True)
    assert torch.equal(run(loaded), run(module))
    assert sum(map(stored_bytes, loaded.parameters())) == sum(map(stored_bytes, module.parameters()))


def test_what_cannot_be_quantised_is_told() -> None:
    module = build()
    with pytest.raises(ConfigError, match="'int7' is not one of fp8, int8; did you mean 'int8'"):
        quantize(module, "int7")
    with pytest.raises(ConfigError, match="Linear has no blocks"):
        quantize(nn.Linear(2, 2), "int8")
    with torch.device("meta"):
        empty = CONFIG.build()
    with pytest.raises(ConfigError, match="meta device; load them first"):
        quantize(empty, "int8")
    quantize(module, "int8")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(module, "fp8")


def test_without_torchao_the_command_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingExtra, match=r'torchao is not installed: run pip install "soundstage\[models\]"'):
        quantize(build(), "int8")


@pytest.mark.slow
def test_nothing_is_said_on_the_way() -> None:
    script = (
        "import torch\n"
        "from soundstage.inference.quantize import quantize\n"
        "module = torch.nn.Module()\n"
        "module.blocks = torch.nn.ModuleList([torch.nn.Linear(32, 32)])\n"
        "quantize(module, 'fp8')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
