"""The shipped weights do what the card says, on a few prompts that training never draws."""

from __future__ import annotations

import numpy as np
import pytest

from soundstage.core.system import model_folder
from soundstage.evaluation.oracle import Oracle
from soundstage.evaluation.suite import stream_items
from soundstage.inference.generator import Generated, Generator

KINDS = ("bounce", "metronome", "drums")


@pytest.fixture(scope="module", params=["world-tiny", "tiny-4step"])
def made(request: pytest.FixtureRequest) -> list[tuple[Generated, dict[str, float]]]:
    items = stream_items(12, seed=3, kinds=KINDS)
    clips = Generator.load(request.param).generate(
        [item.caption for item in items], seed=[item.index for item in items]
    )
    oracle = Oracle()
    return [(clip, dict(oracle(clip.clip, item.wanted))) for clip, item in zip(clips, items, strict=True)]


def _mean(made: list[tuple[Generated, dict[str, float]]], key: str) -> float:
    return float(np.nanmean([scores.get(key, np.nan) for _, scores in made]))


@pytest.mark.parametrize("model", ["world-tiny", "tiny-4step"])
def test_the_folder_is_small(model: str) -> None:
    assert sum(path.stat().st_size for path in model_folder(model).iterdir()) <= 12e6


def test_what_was_asked_for_is_seen(made: list[tuple[Generated, dict[str, float]]]) -> None:
    assert _mean(made, "kind") >= 0.8
    assert _mean(made, "colour") >= 0.8


def test_sound_fits_the_picture_far_better_than_chance(made: list[tuple[Generated, dict[str, float]]]) -> None:
    assert _mean(made, "f1@45") >= _mean(made, "chance_f1@45") + 0.3
