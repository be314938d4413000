"""The exact clock: identities of every count and time over the rates people use."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.media.errors import MediaError
from soundstage.media.geometry import Clock, frame_rate

FPS = ("12.5", "23.976", "24", "25", "29.97", "30", "59.94")
RATES = (16000, 22050, 24000, 44100, 48000)
HALF = Fraction(1, 2)

clocks = st.builds(
    Clock,
    fps=st.sampled_from(FPS),
    sample_rate=st.sampled_from(RATES),
    video_stride=st.sampled_from((1, 2, 4, 8)),
    audio_stride=st.sampled_from((1, 256, 512, 640)),
    causal_first_frame=st.booleans(),
)
durations = st.fractions(min_value=Fraction(1, 10), max_value=120, max_denominator=10_000)


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        ("23.976", Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (24000 / 1001, Fraction(24000, 1001)),
        ("24000/1001", Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (24, Fraction(24)),
        (12.5, Fraction(25, 2)),
        ("25", Fraction(25)),
        (Fraction(2997, 100), Fraction(2997, 100)),
    ],
)
def test_frame_rates_are_read_as_people_mean_them(value: float | str | Fraction, exact: Fraction) -> None:
    assert frame_rate(value) == exact


@pytest.mark.parametrize("value", [0, -24, "fast", float("nan"), float("inf"), "24/0", Fraction(0)])
def test_impossible_frame_rates_are_refused(value: float | str | Fraction) -> None:
    with pytest.raises(MediaError, match="fps"):
        frame_rate(value)


@given(clocks, st.integers(0, 200_000))
def test_times_and_counts_are_inverse_and_never_drift(clock: Clock, frame: int) -> None:
    assert clock.frame_time(frame) * clock.fps == frame
    sample = clock.samples_for_frames(frame)
    assert abs(clock.sample_time(sample) - clock.frame_time(frame)) <= HALF / clock.sample_rate
    assert frame == 0 or clock.frames_for(clock.frame_time(frame)) == frame
    base = Fraction(1, 90_000)
    assert abs(clock.frame_pts(frame, base) * base - clock.frame_time(frame)) <= base / 2
    assert clock.frame_pts(frame, 1 / clock.fps) == frame
    assert clock.sample_pts(sample, Fraction(1, clock.sample_rate)) == sample


@given(clocks, durations)
def test_a_duration_gives_the_nearest_clip_on_both_grids(clock: Clock, duration: Fraction) -> None:
    plan = clock.plan(duration)
    step = clock.video_stride / clock.fps
    shortest = clock.frame_time(1 if clock.causal_first_frame else clock.video_stride)
    assert plan.duration == shortest or abs(plan.duration - duration) <= step / 2
    sound = clock.sample_time(plan.num_samples)
    assert abs(sound - plan.duration) <= max(HALF * clock.audio_stride, HALF) / clock.sample_rate or (
        plan.num_samples == clock.audio_stride
    )
    assert clock.plan(num_frames=plan.num_frames) == plan
    assert clock.plan(num_frames=plan.num_frames, num_samples=plan.num_samples) == plan


@given(clocks, durations)
def test_latent_steps_tile_the_clip(clock: Clock, duration: Fraction) -> None:
    plan = clock.plan(min(duration, Fraction(3)))
    count = plan.video_latents
    assert plan.num_frames == (
        1 + (count - 1) * clock.video_stride if clock.causal_first_frame else count * clock.video_stride
    )
    assert plan.audio_latents * clock.audio_stride == plan.num_samples
    bounds = [clock.video_step(i) for i in range(count)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == plan.duration
    assert all(end == start for (_, end), (start, _) in pairwise(bounds))
    video = plan.video_steps
    assert len(video.start) == count
    np.testing.assert_array_equal(video.start, [float(start) for start, _ in bounds])
    np.testing.assert_array_equal(video.middle, [float((start + end) / 2) for start, end in bounds])
    audio = clock.audio_steps(3)
    ends = [float(Fraction(k * clock.audio_stride, clock.sample_rate)) for k in (1, 2, 3)]
    np.testing.assert_array_equal(audio.end, ends)
    if clock.causal_first_frame and count > 1:
        assert bounds[0][1] == clock.frame_time(1)
        assert bounds[1][1] - bounds[1][0] == clock.video_stride / clock.fps


@given(clocks, durations, durations)
def test_crops_keep_picture_and_sound_together(clock: Clock, start: Fraction, length: Fraction) -> None:
    window = clock.crop(start, start + length)
    plan = clock.plan(length)
    assert window.frames.stop - window.frames.start == plan.num_frames
    assert window.samples.stop - window.samples.start == plan.num_samples
    assert abs(window.start - start) <= HALF / clock.fps
    assert abs(clock.sample_time(window.samples.start) - window.start) <= HALF / clock.sample_rate


def test_published_shapes_of_ovi() -> None:
    clock = Clock(24, 16000, video_stride=4, audio_stride=512)
    five = clock.plan(num_frames=121, num_samples=80384)
    assert (five.video_latents, five.audio_latents) == (31, 157)
    ten = clock.plan(num_frames=241, num_samples=160768)
    assert (ten.video_latents, ten.audio_latents) == (61, 314)
    assert clock.plan(5).num_frames == 121
    assert clock.audio_latents(80_000) == 156


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_frames": 48, "num_samples": 160_000}, "2 s of video with 10 s of sound.*48 frames with 32000 samples"),
        ({"duration": 2, "num_samples": 160_000}, "2 s of clip with 10 s of sound.*240 frames"),
        ({"duration": 0}, "0 s of clip is not above 0.*1 frames"),
        ({"num_frames": -3}, "video is not above 0"),
        ({"duration": "long"}, "not a finite number"),
        ({}, "nothing asked"),
    ],
)
def test_impossible_requests_name_the_nearest_possible(asked: dict, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        Clock(24, 16000).plan(**asked)


def test_counts_off_the_codec_grid_name_the_nearest_count() -> None:
    clock = Clock(24, 16000, video_stride=4, audio_stride=512)
    with pytest.raises(MediaError, match=r"120 is not on the codec's grid 1 \+ k \* 4; the nearest is 121"):
        clock.plan(num_frames=120)
    with pytest.raises(MediaError, match=r"80000 is not on the codec's grid.*79872"):
        clock.plan(num_samples=80_000)
    with pytest.raises(MediaError, match="not a window"):
        clock.crop(2, 1)
    with pytest.raises(MediaError, match="sample_rate"):
        Clock(24, 0)
