"""Adapters: several networks on one frozen base that never notice each other."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError, WeightsError
from soundstage.core.features import tap
from soundstage.models.adapters.lora import Adapted, Lora, load_adapter, merged, save_adapter
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.twin import Twin, TwinConfig
from soundstage.models.unified_dit import UnifiedDiT, UnifiedDiTConfig
from soundstage.models.wan import WanConfig

TOWER = WanConfig(24, 48, 2, 2, in_channels=4, out_channels=4, frequencies=16, text_width=6, text_length=3)
TWIN = TwinConfig(video=TOWER, audio=replace(TOWER, in_channels=5, out_channels=5, patch=(1,)))


def twin(seed: int = 0) -> Twin:
    """A frozen network of two small towers whose outputs are not zero."""
    torch.manual_seed(seed)
    module = TWIN.build()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval().requires_grad_(False)


def asked(seed: int = 1) -> tuple[AV[Tensor], AV[Tensor], Conditions]:
    generator = torch.Generator().manual_seed(seed)
    x = AV(torch.randn(2, 4, 2, 4, 4, generator=generator), torch.randn(2, 5, 6, generator=generator))
    text = torch.randn(2, 3, 6, generator=generator)
    return x, AV(torch.rand(2, generator=generator), torch.rand(2, generator=generator)), Conditions(AV(text, text))


def stirred(adapted: Adapted, seed: int) -> Adapted:
    """The adapter away from where it begins, where its change is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted


def plain(adapted: Adapted) -> Twin:
    """A network of its own with the same weights."""
    module = TWIN.build()
    module.load_state_dict(merged(adapted))
    return module.eval().requires_grad_(True)


def same(a: AV[Tensor], b: AV[Tensor]) -> bool:
    return all(torch.equal(x, b[name]) for name, x in a.items())


def close(a: AV[Tensor], b: AV[Tensor]) -> None:
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=1e-5, atol=1e-5)


def test_the_base_stays_what_it_was_bit_by_bit() -> None:
    base = twin()
    before, names = base(*asked()), list(base.state_dict())
    student, critic = Lora(rank=4).on(base, "student"), Lora(rank=2).on(base, "fake_score")
    assert same(student(*asked()), before)  # B is 0
    stirred(student, 2)
    stirred(critic, 3)
    after = [student(*asked()), base(*asked()), critic(*asked()), base(*asked()), student(*asked())]
    assert same(after[1], before)
    assert same(after[3], before)
    assert same(after[0], after[4])
    assert not same(after[0], before)
    assert not same(after[0], after[2])
    assert list(base.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_its_tensors_are_the_adapters_alone() -> None:
    base = twin()
    student = Lora(rank=4).on(base, "student")
    owned = {id(parameter) for parameter in base.parameters()}
    assert not owned & {id(parameter) for parameter in student.parameters()}
    linear = [name for name, part in base.blocks.named_modules() if isinstance(part, nn.Linear)]
    wanted = {f"base_model.model.blocks.{name}.lora_{side}.weight" for name in linear for side in "AB"}
    assert set(student.state_dict()) == wanted == {name for name, _ in student.named_parameters()}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert list(student.buffers()) == []


def test_gradients_in_turns_are_those_of_separate_copies() -> None:
    """The student's graph stays open while teacher and critic run, as in every step of distribution matching."""
    base = twin()
    student, critic = stirred(Lora(rank=4).on(base, "student"), 2), stirred(Lora(rank=4).on(base, "fake_score"), 3)

    def loss(student: nn.Module, teacher: nn.Module, critic: nn.Module) -> Tensor:
        x = student(*asked())
        with torch.no_grad():
            aim = x - 0.1 * (critic(x, *asked()[1:]) - teacher(x, *asked()[1:]))
        return torch.stack([(value - aim[name]).square().mean() for name, value in x.items()]).sum()

    copies = plain(student), twin(), plain(critic)
    for checkpointing in (False, True):
        student.zero_grad()
        copies[0].zero_grad()
        student.checkpointing = critic.checkpointing = checkpointing
        assert base.checkpointing is False
        one, two = loss(student, base, critic), loss(*copies)
        one.backward()
        two.backward()
        torch.testing.assert_close(one, two)
        for name, layer in student._layers():
            gradient = copies[0].get_submodule(name).weight.grad
            a, b = layer.lora_A["student"].weight, layer.lora_B["student"].weight
            torch.testing.assert_close(a.grad, b.detach().T @ gradient, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(b.grad, gradient @ a.detach().T, rtol=1e-4, atol=1e-7)
        assert all(parameter.grad is None for parameter in (*critic.parameters(), *base.parameters()))


def test_a_block_computed_again_is_its_own() -> None:
    """With activation checkpointing the blocks run once more in a backward pass that both networks share."""
    base = twin()
    networks = [stirred(Lora(rank=4).on(base, role), seed) for seed, role in enumerate(("student", "fake_score"))]
    found = []
    for checkpointing in (False, True):
        for network in networks:
            network.checkpointing = checkpointing
        outputs = [network(*asked()) for network in (*networks, base)]
        torch.stack([x.square().sum() for output in outputs for x in output.values()]).sum().backward()
        found.append([parameter.grad for network in networks for parameter in network.parameters()])
        for network in networks:
            network.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_copy_is_another_adapter_on_the_same_base() -> None:
    base = twin()
    student = stirred(Lora(rank=4).on(base, "student"), 2)
    state = torch.get_rng_state()
    other = copy.deepcopy(student)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(other(*asked()), student(*asked()))
    before = student(*asked())
    stirred(other, 5)
    assert same(student(*asked()), before)
    assert not same(other(*asked()), before)
    assert other._base is base
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in student.parameters())


def test_what_is_asked_of_the_base_is_answered_by_the_view() -> None:
    base = twin()
    student = stirred(Lora(rank=4).on(base, "student"), 2)
    assert student.config is TWIN
    assert len(student.blocks) == 2
    everything = student.skipping((0, 1))(*asked())
    assert same(everything, base.skipping((0, 1))(*asked()))  # nothing of the ends is adapted
    assert not same(student.skipping((0,))(*asked()), base.skipping((0,))(*asked()))
    with tap(student, ["blocks.1"]) as features, tap(base, ["blocks.1"]) as others:
        student(*asked())
    assert set(features) == {"blocks.1"}
    assert not others
    with pytest.raises(AttributeError, match="no attribute 'blokcs'"):
        _ = student.blokcs


def test_a_merged_state_dict_is_a_plain_network() -> None:
    student = stirred(Lora(rank=4, alpha=2.0).on(twin(), "student"), 2)
    close(plain(student)(*asked()), student(*asked()))


def test_an_adapter_file_is_one_of_peft(tmp_path: Path) -> None:
    import peft

    student = stirred(Lora(rank=4, alpha=8.0).on(twin(), "student"), 2)
    save_adapter(student, tmp_path / "made")
    assert set(load_file(tmp_path / "made" / "adapter_model.safetensors")) == set(student.state_dict())
    assert json.loads((tmp_path / "made" / "adapter_config.json").read_text())["lora_alpha"] == 8.0
    theirs = peft.PeftModel.from_pretrained(twin(), str(tmp_path / "made"))
    assert same(theirs(*asked()), student(*asked()))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    other = Lora(rank=4, alpha=8.0).on(twin(), "student")
    load_adapter(other, tmp_path / "theirs")
    assert same(other(*asked()), student(*asked()))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(stirred(Lora(rank=4).on(twin(0), "student"), 2), tmp_path)
    load_adapter(Lora(rank=4).on(twin(0), "student"), tmp_path)
    other = Lora(rank=4).on(twin(1), "student")
    with pytest.raises(WeightsError, match=r"adapter of other weights \(SHA-256 .*any_base=True"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, any_base=True)
    with pytest.raises(WeightsError, match=r"fits this adapter in part only"):
        load_adapter(Lora(rank=3).on(twin(0), "student"), tmp_path)


def test_a_base_in_half_precision_carries_an_adapter_in_float32() -> None:
    base = twin().to(torch.bfloat16)
    student = stirred(Lora(rank=4).on(base, "student"), 2)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert {x.dtype for x in student(*asked()).values()} == {torch.float32}
    assert merged(student)["blocks.0.video.ffn.0.weight"].dtype == torch.bfloat16


def test_on_the_trunk_of_both_modalities() -> None:
    config = UnifiedDiTConfig(width=32, depth=2, num_heads=2, text=ByteTextConfig(width=16, depth=1, num_heads=2))
    torch.manual_seed(0)
    base: UnifiedDiT = config.build().eval().requires_grad_(False)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.1)
    student = stirred(Lora(rank=2, targets=r"attention\.qkv|^head").on(base, "student"), 1)
    x = AV(torch.randn(1, 32, 2, 2, 2), torch.randn(1, 32, 3))
    t, cond = AV(torch.rand(1), torch.rand(1)), tokenize(["a red ball"], config.text.max_bytes)
    other = config.build().eval()
    other.load_state_dict(merged(student))
    close(other(x, t, cond), student(x, t, cond))
    assert {name.split(".")[2] for name in student.state_dict()} == {"blocks", "head"}


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"targets": "blokcs"}, "'blokcs' is found in no name of a Linear layer; there are "),
        ({"targets": ("blocks.0.video.ffn.0", "ffn")}, "'ffn' is no Linear layer"),
        ({"rank": 0}, "rank: 0 is not at least 1"),
    ],
)
def test_a_wrong_setting_is_told(lora: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Lora(**lora).on(twin(), "student")  # type: ignore[arg-type]
