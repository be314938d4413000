"""Matching of events with onsets, on trains whose answer is known."""

import numpy as np
import pytest

from soundstage.world.oracle.matching import chance_f1, count_hits, match

TRAIN = np.array([0.31, 0.78, 1.12, 1.37, 1.9])


@pytest.mark.parametrize("shift", [-0.9, -0.2, -0.05, 0.0, 0.013, 0.2, 0.61])
def test_a_shift_is_recovered(shift: float) -> None:
    found = match(TRAIN, TRAIN + shift)
    assert found.median == pytest.approx(shift)
    assert found.spread == pytest.approx(0)
    assert found.drift == pytest.approx(0)
    assert len(found.pairs) == 5


def test_drift_misses_and_extras() -> None:
    heard = np.sort(np.append(np.delete(TRAIN * 1.02 + 0.01, 2), 0.55))
    found = match(TRAIN, heard)
    assert found.drift == pytest.approx(0.02, abs=1e-9)
    assert [tuple(p) for p in found.pairs] == [(0, 0), (1, 2), (3, 3), (4, 4)]


def test_labels_break_the_tie_of_a_periodic_train() -> None:
    beat, names = 0.3 * np.arange(1, 6), np.arange(5) % 2
    late = beat[:4] + 0.2  # the fifth has left the clip, so that being early by 0.1 s explains as many
    assert match(beat, late).median == pytest.approx(-0.1)
    agree = 0.15 + 0.85 * (names[:, None] == names[None, :4])
    assert match(beat, late, agree=agree).median == pytest.approx(0.2)


def test_pairs_are_one_to_one_and_gated() -> None:
    found = match(np.array([0.5, 0.52]), np.array([0.51, 1.3]))
    assert len(found.pairs) == 1
    assert match(np.zeros(0), TRAIN).pairs.shape == (0, 2)
    assert np.isnan(match(TRAIN, np.zeros(0)).median)


def test_hits_are_counted_without_a_shift() -> None:
    window = (0.0, 2.0)
    assert count_hits(TRAIN, TRAIN + 0.03, 0.045, window) == (5, 0, 0)
    assert count_hits(TRAIN, TRAIN + 0.05, 0.045, window) == (0, 5, 5)
    assert count_hits(np.array([0.5, 1.99]), np.array([0.5]), 0.045, (0.03, 1.9)) == (1, 0, 0)


def test_chance_is_what_random_onsets_score() -> None:
    rng = np.random.default_rng(0)
    events = np.array([0.3, 0.9, 1.5])
    scores = []
    for _ in range(4000):
        heard = np.sort(rng.uniform(0, 2, 4))
        hits, misses, extras = count_hits(events, heard, 0.045, (0, 2))
        scores.append(2 * hits / (2 * hits + misses + extras))
    assert chance_f1(events, np.zeros(4), 0.045, 2.0) == pytest.approx(np.mean(scores), abs=0.01)
