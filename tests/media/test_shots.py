"""Shot boundaries in made films whose cuts, fades and flashes are known."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np

from soundstage.media.clip import Clip
from soundstage.media.encode import write
from soundstage.media.shots import shots

FPS = 24


def scene(rng: np.random.Generator, length: int, speed: float = 1.0) -> np.ndarray:
    """(length, 54, 96, 3) float: a moving window on smooth random texture with a colour of its own."""
    coarse = rng.normal(size=(20, 20, 3))
    texture = coarse.repeat(12, axis=0).repeat(12, axis=1) * 40 + rng.uniform(60, 190, 3)
    top, left = rng.integers(0, 60, 2)
    steps = (speed * np.arange(length)).astype(int) % 80
    return np.clip(np.stack([texture[top : top + 54, left + s : left + s + 96] for s in steps]), 0, 255)


def starts(frames: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Frame numbers at which shots are found to start, in the film with noise added."""
    noisy = np.clip(frames + rng.normal(0, 3, frames.shape), 0, 255).astype(np.uint8)
    return [round(shot.start * FPS) for shot in shots(Clip(noisy, Fraction(FPS)))]


def test_cuts_are_found_on_their_frame() -> None:
    rng = np.random.default_rng(0)
    found = missed = false = 0
    for _ in range(6):
        lengths = rng.integers(12, 50, 5)
        truth = [0, *accumulate(lengths.tolist())][:-1]
        got = starts(np.concatenate([scene(rng, n, speed=2) for n in lengths]), rng)
        found += len(set(got) & set(truth))
        missed += len(set(truth) - set(got))
        false += len(set(got) - set(truth))
    assert found >= 27
    assert (missed <= 3, false) == (True, 0)


def test_fades_count_once_in_their_middle() -> None:
    rng = np.random.default_rng(1)
    for black in (0, 4, 9):
        first, second = scene(rng, 48), scene(rng, 48)
        ramp = np.linspace(1, 0, 12)[:, None, None, None]
        first[-12:] *= ramp
        second[:12] *= ramp[::-1]
        got = starts(np.concatenate([first, np.zeros((black, *first.shape[1:])), second]), rng)
        assert len(got) == 2
        assert abs(got[1] - (48 + black / 2)) <= 2


def test_cross_fades() -> None:
    rng = np.random.default_rng(2)
    for length in (12, 18, 24):
        first, second = scene(rng, 60, 0), scene(rng, 60, 0)
        share = np.linspace(0, 1, length)[:, None, None, None]
        blend = first[-length:] * (1 - share) + second[:length] * share
        got = starts(np.concatenate([first[:-length], blend, second[length:]]), rng)
        assert len(got) == 2
        assert abs(got[1] - (60 - length / 2)) <= 6


def test_flashes_pans_and_changes_of_light_are_no_cuts() -> None:
    rng = np.random.default_rng(3)
    flash = scene(rng, 72)
    flash[30] = 255
    assert starts(flash, rng) == [0]
    assert starts(scene(rng, 72, speed=6), rng) == [0]
    assert starts(scene(rng, 96, 0) * np.linspace(0.3, 1, 96)[:, None, None, None], rng) == [0]


def test_a_dim_scene_in_which_a_lamp_flickers_is_one_shot() -> None:
    frames = np.full((96, 54, 96, 3), 30.0)
    frames[:, :, 48:] = 38.0  # 4 levels about the mean
    glow = 40 * np.exp(-(np.arange(96) % 20) / 3.0)
    frames[:, 20:32, 10:28] += glow[:, None, None, None]
    clip = Clip(frames.astype(np.uint8), Fraction(FPS))
    assert [shot.start for shot in shots(clip)] == [0]


def test_files_are_streamed_and_shots_tile_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    frames = np.concatenate([scene(rng, 30), scene(rng, 42)]).astype(np.uint8)
    path = write(Clip(frames, Fraction(FPS)), tmp_path / "film.mp4")
    first, second = shots(path)
    assert (first.start, first.end) == (0.0, second.start)
    assert abs(second.start - 30 / FPS) < 1e-6
    assert abs(second.end - 3.0) < 1e-6
