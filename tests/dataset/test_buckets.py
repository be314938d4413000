from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundstage.core.errors import ConfigError
from soundstage.data.buckets import Buckets
from soundstage.data.shapes import ClipShape

LIKE = ClipShape(fps="24000/1001", size=(512, 512), num_frames=49, sample_rate=48000, channels=2)


def test_shapes_lie_on_the_grid_of_the_codec() -> None:
    shapes = Buckets(spatial=32).shapes(LIKE)
    assert len(shapes) == 15
    for shape in shapes:
        assert all(side % 32 == 0 for side in shape.size)
        assert shape.size[0] * shape.size[1] == pytest.approx(512 * 512, rel=0.08)
        assert shape.num_frames % 4 == 1
        assert (shape.rate, shape.sample_rate, shape.channels) == (LIKE.rate, 48000, 2)
        assert shape.samples == round(shape.seconds * 48000)
    assert [shape.size for shape in shapes[:5]] == [(384, 672), (448, 576), (512, 512), (576, 448), (672, 384)]
    assert [shape.num_frames for shape in shapes[::5]] == [49, 121, 241]


def test_a_clip_gets_the_longest_window_and_the_nearest_aspect() -> None:
    buckets = Buckets(aspects=("16:9", "1:1", "9:16"), seconds=(2, 5))
    shapes = buckets.shapes(LIKE)
    width = np.array([1920, 1080, 1080, 640, np.nan, 640])
    height = np.array([1080, 1920, 1080, 480, np.nan, 480])
    found = buckets.assign(shapes, width, height, np.array([6.0, 6.0, 3.0, 2.05, 10.0, 1.0]))
    assert found.tolist()[:4] == [3, 5, 1, 1]
    assert shapes[found[4]].num_frames == 121
    assert found[5] == -1


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 64), multiple=st.sampled_from([1, 2, 8]), seconds=st.floats(0.5, 20))
def test_a_batch_costs_no_more_than_its_budget(size: int, multiple: int, seconds: float) -> None:
    buckets = Buckets(seconds=(seconds,), multiple=multiple, audio_tokens=25)
    for shape in buckets.shapes(LIKE):
        num = buckets.batch_size(shape, LIKE, size)
        budget = size * buckets.tokens(LIKE)
        assert num % multiple == 0
        assert num == multiple or num * buckets.tokens(shape) <= budget * 1.000001
        assert (num + multiple) * buckets.tokens(shape) > budget * 0.999999


def test_settings_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="'wide' is not width:height"):
        Buckets(aspects=("wide",))
    with pytest.raises(ConfigError, match="at least one aspect"):
        Buckets(seconds=())
