from __future__ import annotations

import numpy as np
import pytest
import torch

from soundstage.core.errors import Caution, ConfigError
from soundstage.data.batches import Batches, Labels, phases_of
from soundstage.data.buckets import Buckets
from soundstage.data.mixture import CATEGORIES, DURATIONS, Mixture, Phase
from soundstage.data.shapes import ClipShape

LIKE = ClipShape(fps=16, size=(64, 64), num_frames=33)


def labels(num: int, seed: int = 0, shapes: int = 1) -> Labels:
    """Clips of every category and length, in proportions of their own."""
    rng = np.random.default_rng(seed)
    category = rng.choice([*CATEGORIES, "sport"], num, p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]).tolist()
    seconds = 3 * np.exp(rng.uniform(0, np.log(40), num))
    return Labels((LIKE,) * shapes, rng.integers(0, shapes, num), category, seconds)


def chi_square(drawn: np.ndarray, wanted: np.ndarray) -> float:
    expected = wanted * drawn.sum()
    return float(((drawn - expected) ** 2 / expected).sum())


def test_quotas_of_100_thousand_draws_pass_chi_square() -> None:
    about = labels(20_000)
    batches = Batches(20_000, 3, about, (Phase(0, Mixture()),))
    drawn = torch.cat([batches.take(step, 2000) for step in range(50)]).numpy()
    assert len(drawn) == 100_000
    category = np.array([name if name in CATEGORIES else "other" for name in about.category])[drawn]
    counts = np.array([(category == name).sum() for name in CATEGORIES])
    # 5 and 3 degrees of freedom: 1 % of fair draws lie above 15.1 and 11.3
    assert chi_square(counts, np.array([*CATEGORIES.values()]) / 100) < 15.1
    edges = [3, 10, 30, 60, np.inf]
    counts = np.histogram(about.seconds[drawn], edges)[0]
    assert chi_square(counts, np.array([*DURATIONS.values()]) / 100) < 11.3
    # both tables at once, and every clip of a combination as often as its neighbours
    cells = Mixture().cells(about.category, about.seconds)
    for cell in range(24):
        times = np.bincount(drawn, minlength=20_000)[cells == cell]
        assert times.max() - times.min() <= 1


def test_every_block_keeps_the_shares() -> None:
    about = labels(500)
    mixture = Mixture({"music": 3, "speech": 1}, {"0+": 1})
    with pytest.warns(Caution, match=r"\d+ of 500 samples are of no category"):
        batches = Batches(500, 0, about, (Phase(0, mixture),))
    music = np.array(about.category) == "music"
    for step in range(20):
        assert int(music[batches.take(step, 1000).numpy()].sum()) == pytest.approx(750, abs=2)


def test_what_the_data_lacks_is_made_up_for_and_told() -> None:
    mixture = Mixture({"a": 1, "b": 1}, {"0-10": 1, "10+": 1})
    assert mixture.shares(np.array([5, 5, 5, 5])).tolist() == pytest.approx([0.25] * 4)
    # b has no long clips: a is shown long only, so that both tables hold
    assert mixture.shares(np.array([5, 5, 5, 0])).tolist() == pytest.approx([0, 0.5, 0.5, 0], abs=0.01)
    with pytest.warns(Caution, match=r"a 0.0% instead of 50.0%.*10\+ 0.0% instead of 50.0%"):
        assert mixture.shares(np.array([0, 0, 5, 0])).tolist() == pytest.approx([0, 0, 1, 0])
    with pytest.raises(ConfigError, match="no clip is of a, b and of 0-10, 10"):
        mixture.shares(np.zeros(4))


def test_tables_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="'10' is not a span of seconds"):
        Mixture(durations={"10": 1})
    with pytest.raises(ConfigError, match="are no shares"):
        Mixture(categories={"a": 0})
    with pytest.raises(ConfigError, match="tells neither category nor length"):
        Batches(4, 0, None, (Phase(0, Mixture()),))
    with pytest.raises(ConfigError, match="do not ascend from 0"):
        phases_of(None, (Phase(10, Mixture()),))


def test_a_curriculum_goes_on_where_it_was() -> None:
    num = 90
    about = Labels((LIKE,), np.zeros(num, np.int64), ["a", "b", "c"] * 30, np.full(num, 5.0))
    early, late = Mixture({"a": 1, "b": 1, "c": 0}, {"0+": 1}), Mixture({"a": 1, "b": 0, "c": 2}, {"0+": 1})
    batches = Batches(num, 1, about, phases_of(early, (Phase(5, late),)))
    first = torch.cat([batches.take(step, 8) for step in range(5)]).tolist()
    then = torch.cat([batches.take(step, 8) for step in range(5, 9)]).tolist()
    kinds = np.array(about.category)
    assert {kind: int((kinds[first] == kind).sum()) for kind in "abc"} == {"a": 20, "b": 20, "c": 0}
    assert abs(int((kinds[then] == "c").sum()) - 21) <= 1
    assert "b" not in kinds[then]
    # 20 + about 11 of the 30 clips of a: none twice but for the last
    shown = [i for i in first + then if kinds[i] == "a"]
    assert len(set(shown)) == min(30, len(shown))
    assert torch.equal(batches.take(7, 8), Batches(num, 1, about, phases_of(early, (Phase(5, late),))).take(7, 8))


def test_batches_of_several_shapes_are_whole_and_complete() -> None:
    buckets = Buckets(aspects=("16:9", "1:1"), seconds=(2, 4), area=64 * 64, spatial=8, temporal=4, multiple=2)
    shapes = buckets.shapes(LIKE)
    rng = np.random.default_rng(0)
    number = rng.integers(0, len(shapes), 101)
    batches = Batches(101, 4, Labels(shapes, number, [""] * 101, np.ones(101)), (), buckets.batch_size, LIKE)
    seen: list[int] = []
    for step in range(400):
        found = batches.take(step, 8).tolist()
        assert len({int(number[i]) for i in found}) == 1
        shape = shapes[number[found[0]]]
        assert len(found) % 2 == 0
        assert len(found) * buckets.tokens(shape) <= 8 * buckets.tokens(LIKE) or len(found) == 2
        seen += found
    for shape in range(len(shapes)):
        mine = [i for i in seen if number[i] == shape]
        held = int((number == shape).sum())
        for epoch in range(len(mine) // held):
            assert sorted(mine[epoch * held : (epoch + 1) * held]) == np.flatnonzero(number == shape).tolist()
    # shapes advance together: no bucket is an epoch ahead of another
    times = np.array([np.mean([seen.count(i) for i in np.flatnonzero(number == s)]) for s in range(len(shapes))])
    assert times.max() - times.min() < 1
    assert batches.epochs(400, 8)["all"] == pytest.approx(len(seen) / 101)
