"""Scores: intervals that cover, and a descriptor that tells clips apart."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from soundstage.evaluation.features import describe
from soundstage.evaluation.metric import Figure, bootstrap, summarise
from soundstage.media.clip import Clip


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    """For N(0, 1) and N = 400 the 95 % interval of the mean is about 2 x 1.96 / 20 wide."""
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.12)
    assert low < values.mean() < high


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    for statistic, truth in (("mean", 0.0), ("median", 0.0)):
        hits = 0
        for trial in range(200):
            low, high = bootstrap(rng.normal(size=60), statistic, seed=trial)
            hits += low <= truth <= high
        assert 0.88 <= hits / 200 <= 0.99


def test_a_median_ignores_an_outlier() -> None:
    score = summarise(Figure("x", "x", "ms", "median", "lower"), [1, 2, 3, 4, 1000], floor=0.5)
    assert (score.value, score.num, score.floor) == (3, 5, 0.5)
    assert summarise(Figure("x", "x"), []) is None
    assert summarise(Figure("x", "x"), [1, 2, 3, 6]).value == 3


def test_the_descriptor_tells_picture_and_sound() -> None:
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 255, (16, 32, 32, 3)).astype(np.uint8)
    t = np.arange(16000) / 16000
    tone = np.sin(2 * np.pi * 600 * t).astype(np.float32)[None]
    clip = Clip(frames=frames, fps=Fraction(16), wave=tone, sample_rate=16000)
    whole = describe(clip)
    assert whole.shape == (38,)
    assert np.all(np.isfinite(whole))
    assert np.all(describe(clip.without("audio"))[14:] == 0)
    assert np.all(describe(clip.without("video"))[:14] == 0)
    np.testing.assert_allclose(whole[:3], frames.mean((0, 1, 2)) / 255)
    level = np.log10(np.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(whole[30:], level, atol=1e-3)
    assert whole[14:22].argmax() == np.searchsorted(np.geomspace(80, 8000, 9), 600) - 1
