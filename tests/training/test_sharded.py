"""Several processes give what one gives: gradients, runs, checkpoints that change hands, and a process that dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
from safetensors.torch import load_file
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.denoiser import Losses
from soundstage.core.errors import ConfigError, WeightsError
from soundstage.core.rng import Rng
from soundstage.models.discriminators import DiscriminatorConfig
from soundstage.models.text.bytes import ByteTextConfig
from soundstage.models.twin import TwinConfig
from soundstage.models.unified_dit import UnifiedDiTConfig
from soundstage.models.wan import WanConfig
from soundstage.objectives.base import Batch, Nets, Objective
from soundstage.objectives.consistency import Consistency, ContinuousConsistency
from soundstage.objectives.dmd import DMD
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.objectives.gan import GAN
from soundstage.objectives.mean_flow import MeanFlow
from soundstage.objectives.rcm import RCM
from soundstage.testing.tiny import GaussianLatents, ToyConfig
from soundstage.training import checkpoint, metrics
from soundstage.training.config import Optim, Role, Stage, TrainConfig
from soundstage.training.engine import RunError, total, train
from soundstage.training.parallel import LostError, Parallel, joined
from soundstage.training.state import Validation, build

Make = Callable[..., TrainConfig]
Together = Callable[[int, Callable[[int], Any]], list[Any]]

TOWER = WanConfig(32, 64, 4, 2, in_channels=4, out_channels=4, frequencies=16, text_width=12, text_length=6)
MODELS = {
    "unified": UnifiedDiTConfig(width=32, depth=2, num_heads=2, text=ByteTextConfig(width=32, depth=1)),
    "twin": TwinConfig(TOWER, replace(TOWER, in_channels=3, out_channels=3, patch=(1,))),
}
TAPS = ("blocks.0", "blocks.1")
METHODS: dict[str, Objective] = {
    "flow": FlowMatching(),
    "dmd": DMD(ratio=2),
    "gan": DMD(ratio=2, gan=GAN(TAPS, features="fake_score", alpha=0.1)),
    "consistency": Consistency(),
    "scm": ContinuousConsistency(),
    "rcm": RCM(),
    "mean_flow": MeanFlow(),
}
SHAPES = {"unified": AV((32, 2, 4, 4), (32, 5)), "twin": AV((4, 2, 4, 4), (3, 5))}


@dataclass(frozen=True)
class Stirred:
    """A network with no weight at zero: at the start the output of ours is zero, and so are most gradients."""

    model: Any

    def build(self) -> nn.Module:
        module = self.model.build()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.2 * torch.randn_like(parameter))
        return module


@pytest.fixture
def real(make: Make) -> Make:
    """A run of a real backbone cut to a toy's size, by one of the methods."""

    def config(kind: str, method: str = "flow", **changes: Any) -> TrainConfig:  # noqa: ANN401
        model = Stirred(MODELS[kind])
        objective = METHODS[method]
        roles = {name: Role(model, optim) for name, optim in (("teacher", None), ("fake_score", Optim(lr=1e-3)))}
        roles["discriminator"] = Role(DiscriminatorConfig(TAPS, AV(32, 32), hidden=8), Optim(lr=1e-3))
        moving = ("teacher", *objective.turn(0)) if method != "flow" else ()
        roles = {name: role for name, role in roles.items() if name in moving}
        settings = {"objective": objective, "roles": roles, "data": GaussianLatents(SHAPES[kind])}
        return make(model=model, **{**settings, "optim": Optim(lr=1e-3), **changes})

    return config


def whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().clone()


def gradients(config: TrainConfig) -> dict[str, Tensor]:
    """Every gradient of the first step, whole, of all roles that move."""
    found = {}
    with joined(config.parallel, "cpu") as world:
        state = build(config, world)
        batch = config.data.batch(0, config.batch_size).part(world.part, world.parts)
        for role in config.objective.turn(0):
            for name, optimizer in state.optimizers.items():
                for parameter in optimizer.parameters:
                    parameter.requires_grad_(name == role)
            rng = Rng.of(0, len(batch), start=world.part * len(batch)).fold("step", 0, role)
            total(config.objective.loss(role, state.nets, batch, rng), {}).backward()
            world.average(state.optimizers[role].parameters)
            for name, parameter in state.nets[role].named_parameters():
                if parameter.grad is not None:
                    found[f"{role}/{name}"] = whole(parameter.grad)
            world.rest(state.nets.values())
    return found


def same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6 * max(1.0, largest)


def test_gradients_equal_those_of_one_process(real: Make, together: Together) -> None:
    ways = [
        (real("unified"), Parallel()),
        (real("twin"), Parallel(checkpointing=True)),
        (real("twin"), Parallel(context=2)),
        (real("twin"), Parallel(shard=1)),
        (real("twin", "dmd"), Parallel()),
    ]
    found = together(2, lambda _: [gradients(replace(config, parallel=parallel)) for config, parallel in ways])
    for i, (config, _) in enumerate(ways):
        one = gradients(config)
        assert len(one) > 20
        for each in found:
            same_gradients(one, each[i])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["consistency", "scm", "rcm", "mean_flow"])
def test_gradients_of_the_consistency_family(real: Make, together: Together, method: str) -> None:
    config = real("unified", method)
    one = gradients(config)
    for found in together(2, lambda _: gradients(config)):
        same_gradients(one, found)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow", "dmd", "gan"])
@pytest.mark.parametrize("kind", ["unified", "twin"])
def test_gradients_of_four_processes(real: Make, together: Together, kind: str, method: str) -> None:
    config = real(kind, method)
    ways = [Parallel(), Parallel(checkpointing=True), Parallel(shard=2), Parallel(shard=2, checkpointing=True)]
    ways += [Parallel(shard=1)]
    if kind == "twin" and method != "gan":
        ways += [Parallel(context=2), Parallel(shard=2, context=4, checkpointing=True)]
    one = gradients(config)
    for each in together(4, lambda _: [gradients(replace(config, parallel=parallel)) for parallel in ways]):
        for found in each:
            same_gradients(one, found)


def run(config: TrainConfig, out: Path, **changes: Any) -> int:  # noqa: ANN401
    return train(replace(config, **changes), out, device="cpu", tensorboard=False).step


def trace(folder: Path) -> list[dict[str, float]]:
    """What was logged, without the speed."""
    return [{k: v for k, v in entry.items() if k != "samples_per_second"} for entry in metrics.read(folder)]


def same_trace(one: Path, other: Path, tolerance: float = 2e-5) -> None:
    ours, theirs = trace(one), trace(other)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=1e-7)


def averaged(config: TrainConfig, folder: Path) -> dict[str, Tensor]:
    """The averaged student of a run, read back."""
    module = config.model.build()  # type: ignore[union-attr]
    checkpoint.load_weights(module, folder)
    return dict(module.state_dict())


def same_average(config: TrainConfig, one: Path, other: Path, tolerance: float = 2e-5) -> None:
    ours, theirs = averaged(config, one), averaged(config, other)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=tolerance, atol=tolerance)


def rewound(folder: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when it had written the checkpoint of a step."""
    shutil.copytree(folder, to)
    for path in (to / "checkpoints").iterdir():
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    return to


def test_a_run_on_two_processes_and_its_checkpoints_change_hands(
    real: Make, together: Together, tmp_path: Path
) -> None:
    config = real("unified", "dmd", steps=4, accumulate=2, ema=0.9, optim=Optim(lr=1e-3, clip=0.05, warmup=2))
    one, two = tmp_path / "one", tmp_path / "two"
    run(config, one)
    assert together(2, lambda _: run(config, two)) == [4, 4]
    exits = [[entry[f"exit/{k}"] for k in range(4)] for entry in trace(two) if "exit/0" in entry]
    assert exits and all(sorted(share) == [0.0, 0.0, 0.0, 1.0] for share in exits)
    assert min(entry["grad_norm/student"] for entry in trace(two) if "grad_norm/student" in entry) > 0.05
    same_trace(one, two)
    same_average(config, one, two)
    from_two, from_one = rewound(two, tmp_path / "from_two", 2), rewound(one, tmp_path / "from_one", 2)
    run(config, from_two)
    together(2, lambda _: run(config, from_one))
    for folder in (from_two, from_one):
        same_trace(one, folder)
        same_average(config, one, folder)


@dataclass(frozen=True)
class Noted:
    """An objective that writes down which samples it saw."""

    inner: Objective
    file: str

    def turn(self, step: int) -> tuple[str, ...]:
        return self.inner.turn(step)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        with Path(self.file + os.environ.get("RANK", "0")).open("a") as file:
            file.write("".join(f"{name}\n" for name in batch.ids))
        return self.inner.loss(role, nets, batch, rng)


def test_every_sample_comes_once_on_any_processes_in_batches_of_any_size(
    make: Make, together: Together, tmp_path: Path
) -> None:
    stages = (Stage(3, {"batch_size": 4}),)
    config, out = make(objective=Noted(make().objective, str(tmp_path / "ids")), save_every=1), tmp_path / "run"
    run(replace(config, steps=4, stages=stages), out)  # 3 of 8, 1 of 4
    assert together(2, lambda _: run(replace(config, steps=6, batch_size=2), out)) == [6, 6]
    run(replace(config, steps=7, batch_size=16), out)  # from sample 32 on
    run(replace(config, steps=8, batch_size=18), out)  # from 54 on, as 48 to 53 are no whole batch
    seen = [int(line) for file in tmp_path.glob("ids*") for line in file.read_text().split()]
    assert sorted(seen) == [*range(48), *range(54, 72)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(shard=2), Parallel(shard=2, checkpointing=True)])
def test_checkpoints_between_one_two_and_four(
    real: Make, together: Together, tmp_path: Path, parallel: Parallel
) -> None:
    config = real("twin", "dmd", steps=4, ema=0.9)
    divided = replace(config, parallel=parallel)
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    run(config, one)
    together(2, lambda _: run(config, two))
    together(4, lambda _: run(divided, four))
    ways = [(one, 4), (two, 4), (four, 1), (four, 2)]
    for number, (source, count) in enumerate(ways):
        folder = rewound(source, tmp_path / str(number), 2)
        if count == 1:
            run(config, folder)
        else:
            together(count, lambda _, to=folder, n=count: run(divided if n == 4 else config, to))
        same_trace(one, folder)
        same_average(config, one, folder)
    same_trace(one, four)


@pytest.mark.parametrize("kind", ["muon", "bf16", pytest.param("derivative", marks=pytest.mark.slow)])
def test_muon_and_bf16_on_two_processes(real: Make, together: Together, tmp_path: Path, kind: str) -> None:
    """Muon orthogonalises in bfloat16, which turns the last bit of a gradient into its eighth."""
    config = real("unified", steps=3, precision="fp32" if kind == "muon" else "bf16")
    if kind == "muon":
        config = replace(config, optim=Optim(kind="muon", lr=1e-3))
    if kind == "derivative":
        config = real("unified", "mean_flow", steps=3, precision="bf16", parallel=Parallel(gather="fp32"))
    run(config, tmp_path / "one")
    together(2, lambda _: run(config, tmp_path / "two"))
    same_trace(tmp_path / "one", tmp_path / "two", tolerance=5e-3)


@dataclass(frozen=True)
class Strikes:
    """An objective in which the second process gets a signal at a step."""

    inner: Objective
    at: int
    number: int

    def turn(self, step: int) -> tuple[str, ...]:
        return self.inner.turn(step)

    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        if os.environ.get("RANK") == "1" and rng.path[:2] == ("step", self.at):
            os.kill(os.getpid(), self.number)
        return self.inner.loss(role, nets, batch, rng)


def steps(folder: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in (folder / "checkpoints").iterdir() if path.suffix != ".part")


@pytest.mark.parametrize("moment", ["in a step", "while it writes"])
def test_a_killed_process_stops_all_and_the_same_command_goes_on(
    make: Make, together: Together, tmp_path: Path, moment: str
) -> None:
    config = make(ema=0.9)
    run(config, tmp_path / "whole")
    striking = config
    if moment == "in a step":
        striking = replace(config, objective=Strikes(config.objective, 5, signal.SIGKILL))

    def work(rank: int) -> int:
        if rank and moment == "while it writes":
            writer = torch.distributed.checkpoint.FileSystemWriter
            write, calls = writer.write_data, []

            def dying(*given: Any, **more: Any) -> Any:  # noqa: ANN401
                calls.append(1)
                if len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(*given, **more)

            writer.write_data = dying  # type: ignore[method-assign]
        return run(striking, tmp_path / "cut")

    told, dead = together(2, work)
    assert dead is None
    assert isinstance(told, LostError)
    assert str(told).startswith("process 0 stopped because another is gone (")
    assert str(told).endswith("the last whole checkpoint is kept: run the same command again and it goes on from there")
    assert "\n" not in str(told)
    # the checkpoint of step 4 was being written
    assert steps(tmp_path / "cut") in ([2], [2, 4] if moment == "in a step" else [2])
    assert together(2, lambda _: run(config, tmp_path / "cut")) == [6, 6]
    same_trace(tmp_path / "whole", tmp_path / "cut")
    same_average(config, tmp_path / "whole", tmp_path / "cut")


def test_a_signal_to_one_process_stops_all_after_the_same_step(make: Make, together: Together, tmp_path: Path) -> None:
    config = make(save_every=100)
    striking = replace(config, objective=Strikes(config.objective, 2, signal.SIGTERM))
    assert together(2, lambda _: run(striking, tmp_path / "cut")) == [3, 3]
    assert steps(tmp_path / "cut") == [3]
    assert together(2, lambda _: run(config, tmp_path / "cut")) == [6, 6]
    run(config, tmp_path / "whole")
    assert [entry["step"] for entry in trace(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    same_trace(tmp_path / "whole", tmp_path / "cut")


def scored(validation: Validation) -> Mapping[str, float]:
    """A call of the student, which needs every process, and a file."""
    (validation.folder / "sample.txt").write_text("a sample")
    x = AV(torch.ones(2, 2, 1, 2, 2), torch.ones(2, 3, 4))
    with torch.no_grad():
        v = validation.student(x, x.map(lambda z: torch.full((len(z),), 0.5)), None)
    return {"mean": float(v["video"].mean()), "rank": float(os.environ.get("RANK", "0"))}


def test_validation_runs_everywhere_and_is_kept_once(make: Make, together: Together, tmp_path: Path) -> None:
    config = make(validate=scored, validate_every=3, steps=3)
    assert together(2, lambda _: run(config, tmp_path / "two")) == [3, 3]
    run(config, tmp_path / "one")
    same_trace(tmp_path / "one", tmp_path / "two")
    assert trace(tmp_path / "two")[-1]["validate/rank"] == 0
    assert [path.name for path in (tmp_path / "two" / "samples").rglob("*.txt")] == ["sample.txt"]


@dataclass(frozen=True)
class Breaks(Strikes):
    def loss(self, role: str, nets: Nets, batch: Batch, rng: Rng) -> Losses:
        terms = self.inner.loss(role, nets, batch, rng)
        if os.environ.get("RANK") == "1" and rng.path[:2] == ("step", self.at):
            terms["flow/audio"] = terms["flow/audio"] * float("nan")
        return terms


def test_what_one_process_meets_all_are_told(make: Make, together: Together, tmp_path: Path) -> None:
    config = make()
    wrong = [
        replace(config, objective=Breaks(config.objective, 3, 0)),
        replace(config, batch_size=9),
        replace(config, probe_every=2),
        replace(config, parallel=Parallel(shard=3)),
        replace(config, parallel=Parallel(context=4)),
    ]

    def work(_: int) -> list[str]:
        told = []
        for number, each in enumerate(wrong):
            try:
                run(each, tmp_path / str(number))
            except (RunError, ConfigError) as error:
                told.append(str(error))
        return told

    for nan, size, probe, shard, context in together(2, work):
        assert nan.startswith("step 3: flow/audio is nan; the last checkpoint is kept.")
        assert size == "batch_size: 9 does not divide over 2 processes with accumulate=1; make it a multiple of 2"
        assert probe == "probe_every: gradients by noise level cannot be had of divided weights; set it to 0"
        assert shard == "parallel.shard: 2 processes are no multiple of 3; choose one of 1, 2"
        assert context == "parallel.context: 2 processes are no multiple of 4; choose one of 1, 2"
    assert steps(tmp_path / "0") == [2]
    with pytest.raises(ConfigError, match=r"parallel.shard: 0 is not at least 1, nor auto"):
        Parallel(shard=0)


def test_an_export_is_one_file_under_the_published_names(make: Make, together: Together, tmp_path: Path) -> None:
    config = make(steps=2)
    run(config, tmp_path / "one")
    together(2, lambda _: run(config, tmp_path / "two"))
    for name in ("one", "two"):
        file = checkpoint.export(tmp_path / name, tmp_path / f"{name}.safetensors", lambda key: f"model.{key}")
        found = load_file(str(file))
        wanted = averaged(config, tmp_path / name)
        assert found.keys() == {f"model.{key}" for key in wanted}
        assert all(torch.equal(found[f"model.{key}"], tensor) for key, tensor in wanted.items())
    with pytest.raises(WeightsError, match=r"tensors get only 1 names; give another name map"):
        checkpoint.export(tmp_path / "two", tmp_path / "wrong.safetensors", lambda _: "same")
    assert not (tmp_path / "wrong.safetensors").exists()
    with pytest.raises(WeightsError, match=r"these weights are of another model: .*of another shape"):
        checkpoint.load_weights(ToyConfig(width=8).build(), tmp_path / "two")


def test_blocks_computed_again_give_the_same_gradients_in_one_process(real: Make) -> None:
    config = real("unified")
    again = gradients(replace(config, parallel=Parallel(checkpointing=True)))
    one = gradients(config)
    assert all(torch.equal(one[name], again[name]) for name in one)


def recipe() -> TrainConfig:
    objective, data = FlowMatching(), GaussianLatents()
    return TrainConfig("toy", ToyConfig(), objective, data, steps=40, batch_size=4, log_every=1, save_every=4)


@pytest.mark.slow
def test_the_command_under_torchrun_killed_and_started_again(tmp_path: Path) -> None:
    """A process of the real launcher is killed; the launcher stops the rest, and the same command ends the run."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", "-m", "soundstage", "train", f"{Path(__file__).stem}:recipe"]
    package = str(Path(checkpoint.__file__).parents[2])
    places = os.pathsep.join([package, str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    cut = tmp_path / "cut"
    command = [*launch, "--out", str(cut)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (cut / "checkpoints" / "step-00000004").exists():
            time.sleep(0.01)
        os.kill(_last_child(process.pid), signal.SIGKILL)
        told = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in told
    assert 4 <= max(steps(cut)) < 40
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"trained toy for 40 steps: {cut}"]
    assert f"resuming {cut} at step" in done.stderr
    run(recipe(), tmp_path / "whole")
    same_trace(tmp_path / "whole", cut)


def _last_child(parent: int) -> int:
    """The process of highest number that the launcher started."""
    listed = subprocess.run(["ps", "--ppid", str(parent), "-o", "pid="], capture_output=True, text=True, check=True)
    return max(int(number) for number in listed.stdout.split())
