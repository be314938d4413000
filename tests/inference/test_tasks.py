"""Presets: which task the inputs ask for, its grids, its masks, and what is refused."""

from __future__ import annotations

import pytest
import torch

from soundstage.core.av import AV
from soundstage.core.errors import RequestError
from soundstage.core.system import Sampling
from soundstage.inference.tasks import TASKS, grids, plan, prefix_mask, range_mask, resolve

BOTH = ("video", "audio")
HALF = AV(0.5, 0.5)


@pytest.mark.parametrize(
    ("inputs", "task"),
    [((), "t2av"), (("image",), "i2av"), (("audio",), "a2v"), (("image", "audio"), "a2v"), (("video",), "v2a")],
)
def test_the_inputs_name_the_task(inputs: tuple[str, ...], task: str) -> None:
    assert resolve(None, inputs).name == task


@pytest.mark.parametrize(
    ("name", "inputs", "modalities", "sentence"),
    [
        ("a2v", (), BOTH, "task a2v needs a sound: give audio"),
        ("v2a", ("audio",), BOTH, "task v2a needs a clip: give video"),
        ("i2av", (), BOTH, "task i2av needs an image"),
        ("t2a", ("image",), BOTH, "task t2a has no use for an image"),
        ("t2v", (), ("audio",), "generates only audio"),
        ("v2a", ("video",), ("audio",), "needs a model that knows video"),
        (None, ("audio", "video"), BOTH, "audio and video are given and no task"),
        ("t2x", (), BOTH, "'t2x' is not one of a2v, edit, extension"),
    ],
)
def test_impossible_requests(
    name: str | None, inputs: tuple[str, ...], modalities: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        resolve(name, inputs, modalities)


def test_a_model_of_one_modality_makes_what_it_can() -> None:
    assert resolve(None, (), ("video",)).generates == ("video",)
    assert resolve("i2av", ("image",), ("video",)).generates == ("video",)


def test_grids_of_held_edited_and_generated_modalities() -> None:
    how = Sampling(steps=4, shift=AV(1.0, 3.0))
    free = grids(TASKS["t2av"], how, AV(), HALF, BOTH)
    torch.testing.assert_close(free["video"], torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    torch.testing.assert_close(free["audio"], torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))
    held = grids(TASKS["a2v"], how, AV(audio=torch.zeros(1, 1, 1)), HALF, BOTH)
    assert held["audio"].tolist() == [0] * 5
    assert torch.equal(held["video"], free["video"])
    latents = AV(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1))
    edited = grids(TASKS["edit"], how, latents, AV(0.5, 0.0), BOTH)
    assert edited["video"].tolist() == [0.5, 0.375, 0.25, 0.125, 0]
    assert edited["audio"].tolist() == [0] * 5
    silent = grids(TASKS["edit"], how, latents.only("video"), HALF, BOTH)
    assert silent["audio"][0] == 1


def test_the_listed_times_of_a_student() -> None:
    how = Sampling("renoise", 2, times=AV(video=(1.0, 0.8, 0.0), audio=(1.0, 0.4, 0.0)))
    assert grids(TASKS["t2a"], how, AV(), HALF, ("audio",))["audio"].tolist() == [1, 0.4, 0]
    made = grids(TASKS["t2av"], how, AV(), HALF, BOTH)
    assert made.map(lambda grid: grid.tolist()).as_dict() == how.times.map(list).as_dict()
    alone = Sampling("renoise", 2, times=AV(video=(1.0, 0.8, 0.0)))
    held = grids(TASKS["a2v"], alone, AV(audio=torch.zeros(1, 1, 1)), HALF, BOTH)
    assert held.map(lambda grid: grid.tolist()).as_dict() == {"video": [1, 0.8, 0], "audio": [0, 0, 0]}


def test_an_edit_asks_a_student_only_at_times_it_knows() -> None:
    how = Sampling("renoise", 3, times=AV(video=(1.0, 0.8, 0.6, 0.0), audio=(1.0, 0.8, 0.6, 0.0)))
    latents = AV(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1))
    edited = grids(TASKS["edit"], how, latents, AV(0.75, 0.2), BOTH)
    assert edited["video"].tolist() == [0.8, 0.8, 0.6, 0]
    assert edited["audio"].tolist() == [0.6, 0.6, 0.6, 0]


def test_an_edit_starts_part_of_the_way() -> None:
    noise, clean = AV(torch.full((1, 1, 1, 1, 1), 8.0)), AV(torch.full((1, 1, 1, 1, 1), 4.0))
    times = AV(torch.tensor([0.25, 0.0], dtype=torch.float64))
    assert plan(noise, times, clean, AV()).x["video"].item() == pytest.approx(5)
    assert plan(noise, times, AV(), AV()).x["video"].item() == 8


def test_masks() -> None:
    assert prefix_mask(5, 2).tolist() == [0, 0, 1, 1, 1]
    starts, ends = [0, 0.1, 0.3, 0.5], [0.1, 0.3, 0.5, 0.7]
    assert range_mask(starts, ends, [(0.3, 0.5)]).tolist() == [0, 0, 1, 0]
    assert range_mask(starts, ends, [(0.0, 0.05), (0.29, 0.31)]).tolist() == [1, 1, 1, 0]
    assert range_mask(starts, ends, []).tolist() == [0, 0, 0, 0]
