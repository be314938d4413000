"""Onsets, motion events and offsets on made clips whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from soundstage.media.clip import Clip
from soundstage.media.errors import MediaError
from soundstage.media.geometry import frame_rate
from soundstage.media.sync import (
    audio_onsets,
    clip_offset,
    match,
    mel_onsets,
    motion_energy,
    motion_events,
    motion_impulse,
    offset_ms,
)
from soundstage.media.waves import mel_spectrogram

RATE = 16000


def spread_events(rng: np.random.Generator, seconds: float, count: int | None = None) -> np.ndarray:
    """Sorted times at least 150 ms apart."""
    count = count or int(rng.integers(3, 7))
    while True:
        times = np.sort(rng.uniform(0.15, seconds - 0.15, count))
        if np.diff(times).min(initial=1.0) > 0.15:
            return times


def strokes(rng: np.random.Generator, times: np.ndarray, seconds: float) -> np.ndarray:
    """(1, samples): a decaying tone at every time, over faint noise."""
    wave = rng.normal(0, 10 ** rng.uniform(-5, -2.5), int(seconds * RATE))
    clock = np.arange(RATE // 4) / RATE
    for time in times[(times >= 0) & (times < seconds - 0.01)]:
        tone = np.sin(2 * np.pi * rng.uniform(200, 2000) * clock) * np.exp(-clock / rng.uniform(0.02, 0.1))
        tone *= rng.uniform(0.2, 0.6) * np.minimum(1, clock / 0.0005)
        start = round(time * RATE)
        wave[start : start + len(tone)] += tone[: len(wave) - start]
    return np.clip(wave, -1, 1).astype(np.float32)[None]


def bouncing(rng: np.random.Generator, times: np.ndarray, seconds: float, fps: int, noise: float = 0.0) -> np.ndarray:
    """(F, 48, 48, 3): a disc that touches the floor at every time."""
    moments = np.arange(int(seconds * fps)) / fps
    bounds = np.r_[times[0] - 0.5, times, times[-1] + 0.5]
    step = np.clip(np.searchsorted(bounds, moments, side="right") - 1, 0, len(bounds) - 2)
    span = np.diff(bounds)[step]
    phase = (moments - bounds[step]) / span
    height = 4 * phase * (1 - phase) * np.minimum(1, span / 0.5) * 28
    rows, columns = np.mgrid[:48, :48]
    y, x = (40 - height)[:, None, None], (10 + 28 * moments / seconds)[:, None, None]
    disc = (rows - y) ** 2 + (columns - x) ** 2 < 36
    frames = 60 + 120.0 * disc[..., None].repeat(3, -1)
    return np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8)


def flashing(rng: np.random.Generator, times: np.ndarray, seconds: float, fps: int, noise: float = 0.0) -> np.ndarray:
    """(F, 48, 48, 3): a lamp that is lit in the first frame after every time."""
    frames = np.full((int(seconds * fps), 48, 48, 3), 60.0)
    frames[np.minimum(np.ceil(times * fps).astype(int), len(frames) - 1), 10:30, 10:30] = 180
    return np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8)


def test_onsets_are_found_below_a_millisecond_and_by_mel_within_ten() -> None:
    rng = np.random.default_rng(0)
    late, late_mel = [], []
    for _ in range(20):
        truth = spread_events(rng, 2.0)
        wave = strokes(rng, truth, 2.0)
        found = audio_onsets(wave, RATE)
        assert len(found) == len(truth)
        late.extend(found - truth)
        pairs = match(truth, mel_onsets(mel_spectrogram(wave)[0]))
        assert len(pairs) >= len(truth) - 1
        late_mel.extend(mel_onsets(mel_spectrogram(wave)[0])[pairs[:, 1]] - truth[pairs[:, 0]])
    assert np.abs(late).max() < 0.001
    assert abs(np.median(late_mel)) < 0.003
    assert np.median(np.abs(late_mel)) < 0.01


def test_steady_sound_and_silence_have_no_onsets() -> None:
    clock = np.arange(2 * RATE) / RATE
    for frequency in (60, 440, 3000):
        wave = 0.3 * np.sin(2 * np.pi * frequency * clock)[None].astype(np.float32)
        assert (audio_onsets(wave, RATE) < 0.02).all()
    assert len(audio_onsets(np.zeros((2, RATE), np.float32), RATE)) == 0
    assert len(audio_onsets(np.zeros((1, 0), np.float32), RATE)) == 0


def test_motion_events_of_bounces_and_flashes() -> None:
    rng = np.random.default_rng(1)
    late = []
    for _ in range(15):
        truth = spread_events(rng, 2.0)
        found = motion_events(bouncing(rng, truth, 2.0, 24, noise=4), np.arange(48) / 24)
        pairs = match(truth, found, gate=1.5 / 24)
        assert len(pairs) >= len(truth) - 1
        late.extend(found[pairs[:, 1]] - truth[pairs[:, 0]])
    assert abs(np.median(late)) < 0.006
    assert np.median(np.abs(late)) < 0.015
    flash = np.full((20, 32, 32, 3), 40, np.uint8)
    flash[[6, 13]] = 200
    np.testing.assert_allclose(motion_events(flash, np.arange(20) / 10), [0.6, 1.3])
    assert motion_energy(flash)[6] == pytest.approx(160, abs=1)


def test_steady_motion_has_no_impulse_and_stillness_no_events() -> None:
    columns = np.arange(96)
    frames = np.stack([np.where(abs(columns - 10 - 2 * i) < 8, 200, 40) for i in range(30)])
    frames = np.broadcast_to(frames[:, None, :, None], (30, 48, 96, 3)).astype(np.uint8)
    assert motion_energy(frames)[1:].min() > 1
    assert motion_impulse(frames).max() < 0.01 * motion_energy(frames).max()
    still = np.broadcast_to(frames[:1], frames.shape)
    assert len(motion_events(still, np.arange(30) / 24)) == 0
    assert len(motion_events(frames[:1], np.zeros(1))) == 0


def test_matching_is_one_to_one_and_optimal() -> None:
    pairs = match(np.array([0.0, 1.0, 2.0]), np.array([0.1, 0.15, 1.2, 5.0]))
    np.testing.assert_array_equal(pairs, [[0, 0], [1, 2]])
    np.testing.assert_array_equal(match(np.array([0.0]), np.array([0.6]), lag=0.5), [[0, 0]])
    assert match(np.zeros(0), np.array([1.0])).shape == (0, 2)


@pytest.mark.parametrize("shift", [-400, -200, -90, -45, -10, 0, 10, 45, 90, 200, 400, 800])
def test_offsets_of_event_lists_are_recovered(shift: float) -> None:
    rng = np.random.default_rng(abs(shift))
    visual = spread_events(rng, 5.0, count=6)
    audio = np.delete(visual, 2) + shift / 1000 + rng.normal(0, 0.0005, 5)
    result = offset_ms(visual, np.r_[audio, 4.99])  # one event is not heard, one sound is not seen
    assert result.ms == pytest.approx(shift, abs=2)
    assert result.spread_ms < 2
    assert result.confidence > 0.8
    assert (result.num_visual, result.num_audio) == (6, 6)
    assert result.matched in (5, 6)


def test_unrelated_events_are_rarely_believed() -> None:
    rng = np.random.default_rng(5)
    believed = [offset_ms(spread_events(rng, 4.0), spread_events(rng, 4.0)).confidence > 0.9 for _ in range(200)]
    assert np.mean(believed) <= 0.1
    nothing = offset_ms(np.zeros(0), np.array([1.0]))
    assert np.isnan(nothing.ms)
    assert (nothing.confidence, nothing.matched) == (0.0, 0)


def test_clip_offset_recovers_injected_shifts() -> None:
    rng = np.random.default_rng(6)
    for shift in (-0.2, -0.05, 0.0, 0.05, 0.2):
        times = spread_events(rng, 3.0, count=5)
        frames = bouncing(rng, times, 3.0, 24, noise=2)
        clip = Clip(frames, frame_rate(24), strokes(rng, times + shift, 3.0), RATE)
        result = clip_offset(clip)
        assert result.ms == pytest.approx(1000 * shift, abs=15)
        assert result.confidence > 0.4
    silent = Clip(frames, frame_rate(24), np.zeros((1, RATE), np.float32), RATE)
    assert np.isnan(clip_offset(silent).ms)
    with pytest.raises(MediaError, match="lacks picture or sound"):
        clip_offset(clip.without("audio"))


@pytest.mark.slow
def test_the_confidence_of_clip_offset_is_calibrated() -> None:
    """Among clips given a confidence, about that share is right within a frame (or 45 ms)."""
    confidence, right = offsets_of_made_clips(np.random.default_rng(7), 250)
    for low, high in ((0, 0.2), (0.2, 0.8), (0.8, 1.0)):
        inside = (confidence >= low) & (confidence < high)
        assert inside.sum() > 20
        assert abs(right[inside].mean() - confidence[inside].mean()) < 0.15


def offsets_of_made_clips(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, whether right within a frame or 45 ms) of clips of which four in ten have unrelated sound."""
    confidence, right = [], []
    for _ in range(count):
        fps, seconds = int(rng.choice([8, 12, 16, 24, 30])), float(rng.choice([2, 3, 4]))
        times, shift = spread_events(rng, seconds, int(rng.integers(1, 7))), rng.uniform(-0.4, 0.4)
        related = rng.random() < 0.6
        heard = times + shift if related else spread_events(rng, seconds, int(rng.integers(1, 7)))
        picture = bouncing if rng.random() < 0.67 else flashing
        frames = picture(rng, times, seconds, fps, float(rng.choice([0, 2, 6])))
        result = clip_offset(Clip(frames, frame_rate(fps), strokes(rng, heard, seconds), RATE))
        confidence.append(result.confidence)
        right.append(related and abs(result.ms - 1000 * shift) < max(45, 1000 / fps))
    return np.array(confidence), np.array(right)
