"""Roles on one frozen base, rates per modality, and what both cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError
from soundstage.models.adapters.lora import Lora, merged
from soundstage.models.twin import OVI, TwinConfig
from soundstage.models.wan import WanConfig
from soundstage.objectives.dmd import DMD
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.testing.tiny import GaussianLatents
from soundstage.training import checkpoint, metrics
from soundstage.training.config import Optim, Role, Stage, TrainConfig
from soundstage.training.engine import train
from soundstage.training.parallel import Parallel
from soundstage.training.plan import plan
from soundstage.training.state import State

TOWER = WanConfig(24, 48, 2, 1, in_channels=2, out_channels=2, frequencies=16, text_width=6, text_length=2)
TWIN = TwinConfig(video=TOWER, audio=replace(TOWER, in_channels=3, out_channels=3, patch=(1,)))
SMALL = Optim(lr=1e-2, betas=(0.0, 0.99), weight_decay=0.0)

Make = Callable[..., TrainConfig]
Together = Callable[[int, Callable[[int], Any]], list[Any]]


@pytest.fixture
def distil(make: Make, tmp_path: Path) -> Make:
    """Three steps of distribution matching in which student and critic share the teacher's network."""
    torch.manual_seed(7)
    teacher = TWIN.build()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")

    def config(**changes: Any) -> TrainConfig:  # noqa: ANN401
        roles = {
            "fake_score": Role(Lora(rank=2), SMALL),
            "teacher": Role(TWIN, init=str(tmp_path / "teacher.safetensors")),
        }
        settings: dict[str, Any] = {"model": Lora(rank=4), "roles": roles, "objective": DMD(ratio=1), "optim": SMALL}
        sizes = {"data": GaussianLatents(AV((2, 2, 2, 2), (3, 2))), "steps": 3, "batch_size": 2, "save_every": 1}
        return make(**{**settings, **sizes, **changes})

    return config


def run(config: TrainConfig, out: Path | None = None) -> State:
    return train(config, out, device="cpu", tensorboard=False)


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_student_and_critic_on_one_base(distil: Make, tmp_path: Path) -> None:
    """They move, the base does not, checkpoints hold the adapters alone, and a killed run resumes to the same bits."""
    state = run(distil(), tmp_path / "whole")
    assert list(state.nets) == ["student", "fake_score", "teacher"]
    assert equal(tensors(state.nets["teacher"]), load_file(tmp_path / "teacher.safetensors"))
    assert not any(parameter.requires_grad for parameter in state.nets["teacher"].parameters())
    for role in ("student", "fake_score"):
        moved = {name for name, value in state.nets[role].named_parameters() if "lora_B" in name and value.any()}
        assert 2 * len(moved) == len(list(state.nets[role].parameters()))  # B began at 0
    assert state.nets["student"]._base is state.nets["fake_score"]._base is state.nets["teacher"]
    assert state.student._base is state.nets["teacher"]
    assert state.ema is not None
    for role in ("student", "fake_score", "ema"):
        with safe_open(str(tmp_path / "whole/checkpoints/step-00000003" / f"{role}.safetensors"), "pt") as file:
            assert {name.split(".")[-2] for name in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118

    class Killed(BaseException):
        pass

    def kill(entry: Any) -> None:  # noqa: ANN401
        if entry["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(distil(), tmp_path / "cut", device="cpu", on_log=kill, tensorboard=False)
    again = run(distil(), tmp_path / "cut")
    assert all(equal(tensors(net), tensors(again.modules()[name])) for name, net in state.modules().items())
    traces = ([entry["loss"] for entry in metrics.read(tmp_path / name)] for name in ("whole", "cut"))
    assert next(traces) == next(traces)


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ({}, "student is to share the network of 'teacher'.* there are none: add one with optim=None"),
        ({"teacher": Role(TWIN, SMALL), "guide": Role(TWIN)}, "which is no frozen role .* there are guide"),
        ({"teacher": Role(Lora("other")), "other": Role(TWIN)}, "'teacher', which is no frozen role .* there are othe"),
    ],
)
def test_a_base_must_be_there_whole_and_still(distil: Make, roles: dict[str, Role], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        distil(roles=roles)


def test_a_plan_counts_the_base_once(distil: Make) -> None:
    shown = plan(distil())
    whole = sum(parameter.numel() for parameter in TWIN.build().parameters())
    student = sum(parameter.numel() for parameter in Lora(rank=4).on(TWIN.build(), "student").parameters())
    counted = {name: role["parameters"] for name, role in shown["roles"].items()}
    assert counted == {"student": student, "fake_score": student // 2, "teacher": whole, "ema": student}
    # fp32 weights; what moves also has a gradient and two moments
    assert shown["bytes"] == 4 * (whole + student) + 16 * (student + student // 2)
    assert shown["roles"]["teacher"]["moving"] == 0


@pytest.mark.slow
def test_one_base_and_its_adapters_at_ovis_size(distil: Make) -> None:
    """Resident parameters over those of one network, on the meta device; three copies and an average would be 4."""
    roles = {"teacher": Role(OVI), "fake_score": Role(Lora(), SMALL)}
    shown = plan(distil(model=Lora(), roles=roles))["roles"]
    whole = shown["teacher"]["parameters"]
    assert whole == 11_660_753_108
    assert sum(role["parameters"] for role in shown.values()) / whole == pytest.approx(1.0475, abs=1e-4)
    assert shown["student"]["parameters"] / whole == pytest.approx(0.0158, abs=1e-4)


def test_an_audio_only_continuation_is_a_stage(make: Make, tmp_path: Path) -> None:
    """The audio tower goes on alone at half its rate, then both again; moments stay with what moves."""
    stages = (
        Stage(2, {"optim.scale": {r"\bvideo\b": 0.0, r"\baudio\b": 0.5}, "weights": {"video": 0.0}}),
        Stage(4, {"optim.scale": {}, "weights": {}}),
    )
    config = make(
        model=TWIN,
        objective=FlowMatching(),
        data=GaussianLatents(AV((2, 2, 2, 2), (3, 2))),
        batch_size=2,
        save_every=1,
        stages=stages,
        ema=None,
        keep=10,
        optim=Optim(lr=1e-2),
    )
    whole = run(config, tmp_path / "whole")
    weights = []
    for step in (2, 4, 6):
        with safe_open(str(tmp_path / f"whole/checkpoints/step-0000000{step}/student.safetensors"), "pt") as file:
            weights.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    still = [{name for name, value in a.items() if torch.equal(value, b[name])} for a, b in zip(weights, weights[1:])]  # noqa: B905, RUF007
    assert {name for name in weights[0] if "video" in name} <= still[0]
    assert not still[1]
    moved = [name for name in weights[0] if "audio" in name and name not in still[0]]
    assert len(moved) == sum("audio" in name for name in weights[0])
    rates = {entry["step"]: entry["lr/student"] for entry in metrics.read(tmp_path / "whole")}
    assert rates[3] == rates[6] == 1e-2
    copied = run(replace(config, steps=5), tmp_path / "cut")
    assert copied.step == 5
    again = run(config, tmp_path / "cut")
    assert equal(tensors(again.nets["student"]), tensors(whole.nets["student"]))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_adapters_on_a_sharded_base(tmp_path: Path) -> None:
    """The base gathers its parameters in the adapters' calls as it does in its own (one process)."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    base = TWIN.build().eval().requires_grad_(False)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = AV(torch.randn(2, 2, 2, 2, 2), torch.randn(2, 3, 2))
    call = (x, AV(torch.rand(2), torch.rand(2)), GaussianLatents().batch(0, 1).cond)

    def step(module: torch.nn.Module) -> list[Tensor]:
        student = Lora(rank=2).on(module, "student")
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
        student.checkpointing = True
        given = student(*call)
        with torch.no_grad():
            taught = module(*call)
        (given - taught).map(lambda d: d.square().sum()).map(lambda d: d.backward(retain_graph=True))
        found = [*taught.values(), *given.values(), *(parameter.grad for parameter in student.parameters())]
        return [*found, *merged(student).values()]

    plain = step(copy.deepcopy(base))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for block in base.blocks:
            fully_shard(block)
        fully_shard(base)
        sharded = step(base)
    finally:
        torch.distributed.destroy_process_group()
    for one, two in zip(plain, sharded, strict=True):
        torch.testing.assert_close(one, two)


def test_two_processes_give_what_one_gives(distil: Make, together: Together, tmp_path: Path) -> None:
    """The base is divided over them, the adapters are whole on each."""
    optim = replace(SMALL, eps=1.0)  # near plain descent: no amplified rounding
    roles = {**distil().roles, "fake_score": Role(Lora(rank=2), optim)}
    config = distil(optim=optim, roles=roles, steps=2, parallel=Parallel(checkpointing=True))
    run(config, tmp_path / "one")
    assert together(2, lambda _: run(config, tmp_path / "two").step) == [2, 2]
    found = [load_file(checkpoint.export(tmp_path / name, tmp_path / f"{name}.safetensors")) for name in ("one", "two")]
    assert found[0].keys() == found[1].keys()
    assert all(name.startswith("base_model.model.blocks.0.") for name in found[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)
    assert any(value.any() for name, value in found[0].items() if "lora_B" in name)
