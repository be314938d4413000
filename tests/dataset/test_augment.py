from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundstage.core.errors import ConfigError
from soundstage.data.augment import (
    REFUSED,
    Augmented,
    Crop,
    Flip,
    Loudness,
    Polarity,
    TimeCrop,
    change,
    mirrored,
    time_crop,
)
from soundstage.data.reading import Raw
from soundstage.data.records import ClipShape
from soundstage.media.waves import loudness
from soundstage.testing.records import Ramps

RATES = [Fraction(25, 2), Fraction(24000, 1001), Fraction(24), Fraction(30000, 1001), Fraction(60000, 1001)]


def click(fps: Fraction, rate: int, frame: int, num: int = 40, channels: int = 1) -> Raw:
    """Black but for one white frame, silent but for one sample at the moment it is shown."""
    frames = np.zeros((num, 8, 8, 3), np.uint8)
    frames[frame] = 255
    wave = np.zeros((channels, round(num / fps * rate)), np.float32)
    wave[:, round(frame / fps * rate)] = 1
    return Raw(frames, wave, "", "click", rate)


@settings(max_examples=80, deadline=None)
@given(
    fps=st.sampled_from(RATES),
    rate=st.sampled_from([16000, 22050, 44100, 48000]),
    start=st.integers(0, 20),
    at=st.integers(0, 19),
)
def test_a_click_stays_on_its_frame_to_less_than_a_sample(fps: Fraction, rate: int, start: int, at: int) -> None:
    cut = time_crop(click(fps, rate, start + at), fps, start, 20)
    assert cut.frames is not None and cut.wave is not None
    assert cut.frames[:, 0, 0, 0].argmax() == at
    heard, shown = int(cut.wave[0].argmax()), at / fps * rate
    assert abs(heard - shown) < 1 + 1e-9
    assert cut.wave.shape[1] in (int(20 / fps * rate), int(20 / fps * rate) + 1)


def test_a_crop_beyond_the_clip() -> None:
    with pytest.raises(ConfigError, match="frames 30 to 50 are not in a clip of 40"):
        time_crop(click(Fraction(24), 16000, 0), Fraction(24), 30, 20)
    with pytest.raises(ConfigError, match="the clip has not 50 frames"):
        TimeCrop(50)(click(Fraction(24), 16000, 0), np.random.default_rng(0), Fraction(24))


@pytest.mark.parametrize(
    ("channels", "order"),
    [(1, [0]), (2, [1, 0]), (3, [1, 0, 2]), (4, [1, 0, 3, 2]), (6, [1, 0, 2, 3, 5, 4]), (8, [1, 0, 2, 3, 5, 4, 7, 6])],
)
def test_a_mirror_image_exchanges_the_sides(channels: int, order: list[int]) -> None:
    frames = np.arange(4 * 2 * 6 * 3, dtype=np.uint8).reshape(4, 2, 6, 3)
    wave = np.arange(channels, dtype=np.float32)[:, None].repeat(5, 1)
    raw = Raw(frames, wave, "", "", 16000)
    flipped = mirrored(raw)
    assert np.array_equal(flipped.frames, frames[:, :, ::-1])
    assert flipped.wave[:, 0].tolist() == order
    again = mirrored(flipped)
    assert np.array_equal(again.frames, frames)
    assert np.array_equal(again.wave, wave)


def test_writing_is_not_mirrored() -> None:
    rng, raw = np.random.default_rng(0), click(Fraction(24), 16000, 3, channels=2)
    raw.frames[:, :, :4] = 9
    always = Flip(1.0)
    for facts, flipped in (({"scan": {"text": 0.0}}, True), ({"scan": {"text": 0.3}}, False), ({}, False)):
        out = always(replace(raw, facts=facts), rng, Fraction(24))
        assert np.array_equal(out.frames, raw.frames) != flipped
    assert not np.array_equal(Flip(1.0, unmeasured=True)(raw, rng, Fraction(24)).frames, raw.frames)
    with pytest.raises(ConfigError, match="which of 11 channels are left and right"):
        mirrored(Raw(None, np.zeros((11, 4), np.float32), "", "", 16000))


def test_the_sound_keeps_its_shape() -> None:
    rng = np.random.default_rng(1)
    wave = (0.02 * rng.standard_normal((2, 48000))).astype(np.float32)
    raw = Raw(None, wave, "", "", 48000)
    even = Loudness(-23)(raw, rng, Fraction(24)).wave
    assert loudness(even, 48000) == pytest.approx(-23, abs=0.1)
    assert np.allclose(even / even.std(), wave / wave.std(), atol=1e-5)
    assert np.array_equal(Polarity(1.0)(raw, rng, Fraction(24)).wave, -wave)
    silent = Raw(None, np.zeros((1, 100), np.float32), "", "", 48000)
    assert not Loudness()(silent, rng, Fraction(24)).wave.any()


def test_a_part_of_the_picture_is_the_same_part_in_every_frame() -> None:
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, 8:24, 12:36] = 200
    out = Crop(0.5)(Raw(frames, None, "", "", 16000), np.random.default_rng(2), Fraction(24)).frames
    assert out.shape == frames.shape
    assert np.array_equal(out[0], out[2])
    assert (out > 100).mean() > (frames > 100).mean()
    assert np.array_equal(
        Crop(1.0)(Raw(frames, None, "", "", 16000), np.random.default_rng(2), Fraction(24)).frames, frames
    )


def test_what_would_spoil_the_target_is_refused_with_the_reason() -> None:
    assert change("flip", 1.0) == Flip(1.0)
    for name in ("pitch_shift", "noise", "reverb", "temporal_subsample", "time_stretch", "channel_swap"):
        with pytest.raises(ConfigError, match=f"augment: {name} is refused: {REFUSED[name][:30]}"):
            change(name)
    with pytest.raises(ConfigError, match="'flipp' is unknown, is 'flip' meant"):
        change("flipp")


def test_variants_are_functions_of_the_index() -> None:
    shape = ClipShape(num_frames=4, size=(16, 16), num_samples=4000)
    config = Augmented(Ramps(size=5), (Polarity(1.0), Loudness(-30)), variants=3)
    source, again = config.build(shape), config.build(shape)
    assert source.size == 15
    for index in range(15):
        one, two = source.item(index), again.item(index)
        assert torch.equal(one.media["audio"], two.media["audio"])
        assert one.id == f"{index // 3}~{index % 3}"
        assert one.media["video"].shape == (3, 4, 16, 16)
        assert one.caption == f"level {index // 3}"
    whole, inverse = source.item(3).media["audio"], source.item(4).media["audio"]
    assert torch.allclose(whole, -inverse)
    cut = Augmented(Ramps(size=5), (), variants=2, longer=3).build(shape)
    assert cut.item(1).media["video"].shape == (3, 4, 16, 16)
