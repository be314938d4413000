from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soundstage.core.denoiser import Losses
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.objectives.base import Batch, Nets
from soundstage.objectives.consistency import Consistency
from soundstage.objectives.flow_map import Grid
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.training import metrics
from soundstage.training.config import Optim, Role, Stage, TrainConfig
from soundstage.training.engine import RunError, train
from soundstage.training.state import State

Make = Callable[..., TrainConfig]
TIMING = {"samples_per_second"}


def run(config: TrainConfig, out: Path | None = None) -> State:
    return train(config, out, device="cpu", tensorboard=False)


def trace(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in metrics.read(folder)]


def tensors(state: State) -> dict[str, Tensor]:
    found = {f"{role}.{k}": v for role, module in state.modules().items() for k, v in module.state_dict().items()}
    for role, optimizer in state.optimizers.items():
        for part in optimizer.state_dict()["parts"]:
            for index, moments in part["state"].items():
                found |= {f"{role}.{index}.{k}.{id(0)}": v for k, v in moments.items() if isinstance(v, Tensor)}
    return found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resume_is_bit_exact(make: Make, tmp_path: Path, kind: str) -> None:
    config = make(model=ToyConfig(dropout=0.2), optim=Optim(kind=kind, lr=1e-2, warmup=2, schedule="cosine"), ema=0.9)
    whole = run(config, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(entry: Mapping[str, float]) -> None:
        if entry["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "cut", device="cpu", on_log=kill, tensorboard=False)
    resumed = run(config, tmp_path / "cut")
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert [entry["step"] for entry in trace(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    one, two = tensors(whole), tensors(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_loss_falls_to_the_irreducible_part(make: Make) -> None:
    config = make(
        steps=150,
        batch_size=128,
        model=ToyConfig(width=32),
        data=GaussianLatents(mean=1.0, std=0.1),
        save_every=150,
        optim=Optim(lr=2e-2, schedule="cosine", warmup=5),
        log_every=50,
    )
    run(config)
    first, *_, last = trace(Path(config.out or ""))
    assert last["flow/video"] < 0.15 < first["flow/video"]


def test_accumulation_equals_a_big_batch(make: Make, tmp_path: Path) -> None:
    config = make(optim=Optim(lr=1e-2, clip=None))
    big = run(config, tmp_path / "big")
    small = run(replace(config, accumulate=4), tmp_path / "small")
    for name, value in big.nets["student"].state_dict().items():
        torch.testing.assert_close(small.nets["student"].state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_keeps_weights_in_fp32_and_trains(make: Make) -> None:
    state = run(make(precision="bf16"))
    assert {p.dtype for p in state.nets["student"].parameters()} == {torch.float32}


@dataclass(frozen=True)
class Breaks:
    at: int

    def turn(self, step: int) -> tuple[str, ...]:
        del step
        return ("student",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        terms = FlowMatching().loss(role, nets, batch, rng)
        if ("step", self.at) == rng.path[:2]:
            terms["flow/audio"] = terms["flow/audio"] * float("nan")
        return terms


def test_a_nan_stops_the_run_and_keeps_the_checkpoint(make: Make) -> None:
    config = make(objective=Breaks(at=3))
    with pytest.raises(RunError, match=r"step 3: flow/audio is nan.*Lower optim.lr"):
        run(config)
    folder = Path(config.out or "")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(replace(config, objective=FlowMatching())).step == 6


def test_out_of_memory_says_what_to_change(make: Make) -> None:
    @dataclass(frozen=True)
    class Greedy(Breaks):
        def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
            raise torch.OutOfMemoryError(f"tried to allocate for {role}, {nets}, {batch}, {rng}")

    with pytest.raises(RunError, match=r"8 samples at a time; use precision=bf16, accumulate=2"):
        run(make(objective=Greedy(0)))


def test_a_stop_signal_saves_and_the_run_goes_on(make: Make, tmp_path: Path) -> None:
    config = make(save_every=100)
    whole = run(config, tmp_path / "whole")

    def interrupt(entry: Mapping[str, float]) -> None:
        if entry["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    state = train(config, tmp_path / "cut", device="cpu", on_log=interrupt, tensorboard=False)
    assert state.step == 3
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = run(config, tmp_path / "cut")
    assert resumed.step == 6
    assert all(torch.equal(tensors(whole)[k], v) for k, v in tensors(resumed).items())


def test_a_stage_changes_settings_from_its_step_on(make: Make, tmp_path: Path) -> None:
    stages = (Stage(2, {"batch_size": 4, "optim.lr": 5e-3}), Stage(4, {"optim.kind": "muon"}))
    config = make(stages=stages, optim=Optim(lr=1e-2), save_every=4)
    state = run(config, tmp_path / "whole")
    rates = [entry["lr/student"] for entry in trace(tmp_path / "whole")]
    assert rates == [1e-2, 1e-2, 5e-3, 5e-3, 5e-3, 5e-3]
    assert state.optimizers["student"].optim.kind == "muon"

    class Killed(BaseException):
        pass

    def kill(entry: Mapping[str, float]) -> None:
        if entry["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "cut", device="cpu", on_log=kill, tensorboard=False)
    resumed = run(config, tmp_path / "cut")
    assert all(torch.equal(tensors(state)[k], v) for k, v in tensors(resumed).items())


def test_a_stage_cannot_change_the_network(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"stage at step 2 cannot change model.width"):
        run(make(stages=(Stage(2, {"model.width": 8}),)))


@dataclass(frozen=True)
class Duel:
    """The critic follows the student; the student moves every second step."""

    def turn(self, step: int) -> tuple[str, ...]:
        return ("fake_score", "student") if step % 2 else ("fake_score",)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        del rng
        t = batch.x0.map(lambda x: torch.ones(x.shape[0]))
        out = {name: nets[name](batch.x0, t, batch.cond) for name in ("student", "fake_score", "teacher")}
        goal = out["fake_score"] if role == "student" else out["teacher"]
        return {f"duel/{k}": v.pow(2).mean() for k, v in (out[role] - goal).items()}


def test_roles_move_in_turn_and_the_frozen_one_stays(make: Make) -> None:
    roles = {"fake_score": Role(ToyConfig(), Optim(lr=1e-3)), "teacher": Role(ToyConfig())}
    config = make(objective=Duel(), roles=roles, steps=1, save_every=1)
    start = run(replace(config, out=f"{config.out}-a"))
    more = run(replace(config, steps=2, out=f"{config.out}-b"))

    def same(role: str) -> bool:
        pairs = zip(start.nets[role].parameters(), more.nets[role].parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    assert same("teacher")
    assert not same("student")
    assert not same("fake_score")
    assert sorted(more.modules()) == ["ema", "fake_score", "student"]


def test_a_stage_of_many_roles_renews_the_student(make: Make) -> None:
    roles = {"fake_score": Role(ToyConfig(), Optim(lr=1e-3)), "teacher": Role(ToyConfig())}
    stages = (Stage(3, {"optim.lr": 1e-4}),)
    state = run(make(objective=Duel(), roles=roles, stages=stages, optim=Optim(lr=1e-2)))
    assert state.optimizers["student"].optim.lr == 1e-4
    assert len(state.optimizers["student"].parameters) == len(list(state.nets["student"].parameters()))


def test_a_role_without_optimizer_is_named(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"objective moves 'fake_score'.*student: give it an optim"):
        run(make(objective=Duel(), roles={"fake_score": Role(ToyConfig()), "teacher": Role(ToyConfig())}))


def test_weights_scale_a_term_or_a_modality(make: Make, tmp_path: Path) -> None:
    state = run(make(weights={"audio": 0.0}, optim=Optim(weight_decay=0.0), ema=None), tmp_path / "a")
    torch.manual_seed(0)
    fresh = ToyConfig().build()
    assert torch.equal(state.nets["student"].outputs["audio"].weight, fresh.outputs["audio"].weight)
    assert not torch.equal(state.nets["student"].outputs["video"].weight, fresh.outputs["video"].weight)
    entry = trace(tmp_path / "a")[0]
    assert entry["loss"] == pytest.approx(entry["flow/video"])


def test_gradient_norms_by_noise_level(make: Make, tmp_path: Path) -> None:
    run(make(probe_every=2, batch_size=64), tmp_path / "a")
    first, second = trace(tmp_path / "a")[:2]
    probed = {name for name in first if name.startswith("grad_norm/flow/")}
    assert {"grad_norm/flow/video/t0.25-0.50", "grad_norm/flow/audio/t0.50-0.75"} <= probed
    assert not [name for name in second if name.startswith("grad_norm/flow/")]


def test_validation_runs_on_the_average_and_is_logged(make: Make, tmp_path: Path) -> None:
    seen = []

    def validate(validation: object) -> dict[str, float]:
        seen.append(validation)
        return {"score": float(validation.step)}  # type: ignore[attr-defined]

    state = run(make(validate=validate, validate_every=4), tmp_path / "a")
    assert [entry["validate/score"] for entry in trace(tmp_path / "a") if "validate/score" in entry] == [4.0, 6.0]
    assert seen[-1].student is state.student
    assert (tmp_path / "a" / "samples" / "step-00000004").is_dir()


def test_video_only_and_audio_only_data(make: Make, tmp_path: Path) -> None:
    for name in ("video", "audio"):
        data = GaussianLatents().shape.only(name)
        run(make(data=GaussianLatents(shape=data), ema=None, steps=1), tmp_path / name)
        entry = trace(tmp_path / name)[0]
        assert [key for key in entry if key in ("flow/video", "flow/audio")] == [f"flow/{name}"]


def test_an_objective_sees_the_average(make: Make) -> None:
    """Consistency to the average: the run differs from one to the student itself, and the average takes no gradient."""
    config = make(objective=Consistency(Grid(4), teacher=False, target="ema"), ema=0.9)
    state = run(config)
    assert not any(parameter.requires_grad for parameter in state.players["ema"].parameters())
    other = run(
        replace(config, objective=replace(config.objective, target="student"), out=str(config.folder) + "-other")
    )
    assert any(not torch.equal(one, tensors(other)[name]) for name, one in tensors(state).items())
    with pytest.raises(ConfigError, match="needs 'ema'"):
        run(replace(config, ema=None, out=str(config.folder) + "-none"))
