"""What students are judged by: sound in step with the picture, and clips of a published model's student."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from soundstage.core.av import AV, collate
from soundstage.data.records import ClipShape, to_media
from soundstage.recipes import ovi
from soundstage.recipes.judging import InStep, Shown
from soundstage.training.state import Validation
from soundstage.world import render, stream_item

SHAPE = AV(video=(6, 2, 4, 4), audio=(5, 10))


def test_real_clips_are_in_step_and_with_anothers_sound_they_are_not() -> None:
    scenes = [stream_item(5, index, kinds=("bounce",))[0] for index in range(12)]
    media = collate([to_media(render(scene).clip, ClipShape()) for scene in scenes])
    in_step = InStep(Fraction(16))
    real = in_step(media)
    shuffled = in_step(AV(media["video"], media["audio"].roll(1, 0)))
    late = in_step(AV(media["video"], media["audio"].roll(4000, 2)))
    assert real > 0.6
    assert shuffled < 0.5 * real
    assert late < 0.5 * real
    assert in_step(media.only("video")) == 0.0


@pytest.mark.filterwarnings("ignore::soundstage.core.errors.Caution")
@pytest.mark.usefixtures("here")
def test_a_published_student_and_its_teacher_are_shown(ovi_folder: Path, prompts: Path, tmp_path: Path) -> None:
    recipe = ovi.dmd4(str(ovi_folder), str(prompts))
    config = replace(recipe, data=replace(recipe.data, shape=SHAPE))
    nets = {"teacher": config.roles["teacher"].model.build()}
    student = config.model.build()
    validation = Validation(1, student, nets, config, torch.device("cpu"), tmp_path)
    judge = replace(
        config.validate,
        student=replace(config.validate.student, samples=2),
        teacher=replace(
            config.validate.teacher, samples=2, sampling=replace(config.validate.teacher.sampling, steps=2)
        ),
    )
    assert isinstance(judge.student, Shown)
    media = judge.student(validation)
    assert media["video"].shape[:3] == (2, 3, 5)
    assert media["audio"].shape[0] == 2
    found = judge(validation)
    assert {"sync", "teacher/sync", "brightness", "teacher/loudness", "diversity/video"} <= set(found)
    assert 0 <= found["sync"] <= 1
