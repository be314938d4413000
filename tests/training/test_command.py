from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from soundstage.cli import app as cli
from soundstage.core.errors import ConfigError
from soundstage.objectives.flow_matching import FlowMatching
from soundstage.testing.tiny import GaussianLatents, ToyConfig, tiny
from soundstage.training import checkpoint, metrics
from soundstage.training.config import Stage, TrainConfig
from soundstage.training.engine import train

RECIPE = f"{__name__}:recipe"


def recipe() -> TrainConfig:
    return TrainConfig("toy", ToyConfig(), FlowMatching(), GaussianLatents(), steps=4, batch_size=4, log_every=2)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of this file, by the name that the command imports."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[recipe.__module__])


def invoke(*words: str) -> str:
    done = CliRunner().invoke(cli.app, ["train", RECIPE, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_and_the_same_command_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert f"trained toy for 4 steps: {out}" in invoke("--out", str(out))
    assert [entry["step"] for entry in metrics.read(out)] == [2, 4]
    assert json.loads((out / "config.json").read_text())["batch_size"] == 4
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__
    assert (out / "diff.txt").is_file()
    assert f"resuming {out} at step 4 of 6" in invoke("steps=6", "--out", str(out))
    assert checkpoint.step_of(checkpoint.latest(out / "checkpoints") or Path()) == 6


def test_json_has_one_object_per_logged_step(tmp_path: Path) -> None:
    lines = [line for line in invoke("--json", f"out={tmp_path}").splitlines() if line.startswith("{")]
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown = invoke("--dry-run", "optim.lr=1e-5", "--out", str(out))
    assert "optim.lr = 1e-05" in shown
    assert "student: 0.001 M parameters" in shown
    assert not out.exists()
    assert json.loads(invoke("--dry-run", "--json"))["samples"] == 16


def test_another_model_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    invoke(f"out={tmp_path}")
    with pytest.raises(ConfigError, match=r"holds a run of another model; choose another folder"):
        invoke(f"out={tmp_path}", "model.width=32")


def test_any_recipe_can_be_made_tiny(tmp_path: Path) -> None:
    big = replace(recipe(), steps=1000, stages=(Stage(500, {"batch_size": 8}),), validate=lambda _: {})
    small = tiny(big, tmp_path)
    assert (small.steps, small.batch_size, small.stages, small.validate) == (2, 2, (), None)
    assert tiny(big, tmp_path, batch_size=4).batch_size == 4


def newest(checkpoints: Path) -> int:
    return checkpoint.step_of(checkpoint.latest(checkpoints) or Path("step-0"))


@pytest.mark.slow
def test_killed_at_any_time_the_run_reaches_the_same_weights(tmp_path: Path) -> None:
    long = replace(recipe(), model=ToyConfig(width=128, depth=4), steps=40, save_every=1, log_every=1)
    train(long, tmp_path / "whole", device="cpu", tensorboard=False)
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from dataclasses import replace\n"
        "from test_command import ToyConfig, recipe, train\n"
        "run = replace(recipe(), model=ToyConfig(width=128, depth=4), steps=40, save_every=1, log_every=1)\n"
        f"train(run, {str(tmp_path / 'cut')!r}, device='cpu', tensorboard=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    rng, reached, checkpoints = random.Random(0), 0, tmp_path / "cut" / "checkpoints"
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program], env=environment)
        while process.poll() is None and newest(checkpoints) == reached:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = newest(checkpoints)
    assert 0 < reached < 40
    train(long, tmp_path / "cut", device="cpu", tensorboard=False)
    files = [tmp_path / name / "checkpoints" / "step-00000040" / "ema.safetensors" for name in ("whole", "cut")]
    one, two = (load_file(str(file)) for file in files)
    assert all(torch.equal(one[name], two[name]) for name in one)
    traces = ([entry["loss"] for entry in metrics.read(tmp_path / name)] for name in ("whole", "cut"))
    assert next(traces) == next(traces)
