"""The recipes that distil the shipped model, cut down: train, resume, judge, pack, generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soundstage.core.errors import RequestError
from soundstage.inference.generator import Generator
from soundstage.recipes import world_distill as recipes
from soundstage.testing.tiny import tiny
from soundstage.training.config import TrainConfig
from soundstage.training.engine import train
from soundstage.training.metrics import read
from soundstage.training.state import Validation


def small(name: str, folder: Path, steps: int) -> TrainConfig:
    """The recipe on eight clips, in which the student moves at every step."""
    config = getattr(recipes, name)()
    changes = {"data": replace(config.data, num=8, cache=str(folder / "latents"))}
    return tiny(replace(config, **changes), folder / name, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(recipes.SAMPLINGS))
def test_a_student_trains_resumes_packs_and_generates(name: str, tmp_path: Path) -> None:
    train(small(name, tmp_path, 1), tensorboard=False)
    state = train(small(name, tmp_path, 2), tensorboard=False)
    assert state.step == 2
    assert [entry["step"] for entry in read(tmp_path / name) if "loss" in entry] == [1, 2]

    folder = recipes.pack(tmp_path / name, tmp_path / "model", recipes.SAMPLINGS[name])
    generator = Generator.load(folder)
    made = generator.generate("a red ball bounces twice")
    assert made.record["steps"] == 4
    assert made.record["model"] == "tiny-4step"
    assert generator.system.sampling.flow_map == (name == "mean_flow4")
    with pytest.raises(RequestError, match="guidance"):
        generator.generate("a red ball bounces twice", guidance=3.0)


def test_the_vital_signs_of_a_student_are_judged_beside_the_teachers(tmp_path: Path) -> None:
    filmed = recipes.Filmed()
    student = recipes.Shipped().build()
    made = filmed(Validation(1, student, {}, recipes.consistency4(), torch.device("cpu"), tmp_path))
    assert made["video"].shape == (16, 3, 33, 64, 64)
    assert made["audio"].shape == (16, 1, 33000)
    judge = recipes.judged()
    assert judge.teacher == recipes.Filmed(None)
    assert judge.sync is not None and judge.sync(made) > 0.1
