"""Measures of sound on signals whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from soundstage.data.sound import SoundMeter, from_levels, spectrogram, to_levels
from soundstage.data.traces import Traces
from soundstage.media.waves import loudness, resample
from soundstage.world.render import render, stream_item

RATE = 48_000


def summary(wave: np.ndarray, rate: int = RATE) -> dict[str, float]:
    """Of (channels, samples), fed in pieces of odd length."""
    meter = SoundMeter(rate)
    for begin in range(0, wave.shape[1], 12_347):
        meter.add(wave[:, begin : begin + 12_347].astype(np.float32))
    return Traces(meter.close(), sample_rate=rate, channels=len(wave)).summary()


def world(kind: str, seconds: int = 4, rate: int = 16_000, index: int = 0) -> np.ndarray:
    scene, _ = stream_item(3, index, kinds=[kind])
    return render(scene, size=16, fps=8, num_frames=8 * seconds, sample_rate=rate).clip.wave


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, count))


def test_a_row_of_the_spectrogram_sums_to_its_power() -> None:
    wave = 0.1 * noise(2 * RATE)[0].astype(np.float32)
    assert spectrogram(wave, RATE).sum(axis=1).mean() == pytest.approx(0.01, rel=0.02)


def test_levels_in_a_byte_keep_half_a_decibel() -> None:
    power = 10 ** np.linspace(-11, 0, 50)
    assert np.abs(from_levels(to_levels(power)) - 10 * np.log10(power)).max() <= 0.26


@pytest.mark.parametrize("kind", ["talker", "bounce"])
def test_snr_within_a_decibel_and_a_half(kind: str) -> None:
    wave = world(kind)
    for snr in (0, 10, 25):
        dirt = noise(wave.shape[1], snr) * np.sqrt(np.square(wave).mean() / 10 ** (snr / 10))
        assert summary((wave + dirt) / 4, 16_000)["snr"] == pytest.approx(snr, abs=1.5)


def test_a_tone_that_never_pauses_has_no_snr() -> None:
    time = np.arange(4 * RATE) / RATE
    tone = sum(np.sin(2 * np.pi * 110 * n * time) / n for n in range(1, 40))[None]
    assert "snr" not in summary(0.2 * tone + 1e-4 * noise(tone.shape[1]))


def test_speech_is_told_from_what_is_struck() -> None:
    assert summary(world("talker"), 16_000)["speech"] > 0.8
    assert summary(world("bounce"), 16_000)["speech"] < 0.2


def test_loudness_agrees_with_the_exact_filters() -> None:
    wave = np.concatenate([0.3 * world("talker", rate=RATE), 0.2 * world("engine", rate=RATE)])
    assert summary(wave)["loudness"] == pytest.approx(loudness(wave.astype(np.float32), RATE), abs=0.3)


def test_an_upsampled_track_is_seen_and_a_dull_one_is_not() -> None:
    wave = 0.5 * world("typing", rate=RATE) + 0.001 * noise(4 * RATE)
    low = resample(resample(wave.astype(np.float32), RATE, 8_000), 8_000, RATE)
    assert summary(wave)["bandwidth"] == RATE / 2
    assert summary(low)["bandwidth"] == pytest.approx(4_000, abs=800)
    spectrum = np.fft.rfft(noise(4 * RATE)) / (1 + (np.fft.rfftfreq(4 * RATE, 1 / RATE) / 800) ** 2)
    dull = np.fft.irfft(spectrum)
    assert summary(0.2 * dull / np.abs(dull).max())["bandwidth"] == RATE / 2


def test_clipping_offset_and_peak() -> None:
    wave = world("talker", rate=RATE)
    clean, bad = summary(wave), summary((8 * wave / np.abs(wave).max()).clip(-1, 1))
    assert clean["clipped"] == 0
    assert bad["clipped"] > 0.05
    assert bad["peak"] == pytest.approx(0, abs=0.01)
    assert summary(0.5 * wave + 0.1)["dc"] == pytest.approx(0.1, abs=0.02)


def test_stereo_is_described() -> None:
    one, other = 0.2 * noise(3 * RATE, 1), 0.2 * noise(3 * RATE, 2)
    same, apart = summary(np.concatenate([one, one])), summary(np.concatenate([one, other]))
    assert same["side"] < -60 < apart["side"]
    assert same["phase"] == pytest.approx(1)
    assert apart["phase"] == pytest.approx(0, abs=0.02)
    assert summary(np.concatenate([one, -one]))["phase"] == pytest.approx(-1)
    assert summary(np.concatenate([one, 1e-4 * one]))["balance"] == pytest.approx(80, abs=0.5)


def test_only_long_silences_count() -> None:
    wave = 0.1 * noise(6 * RATE)
    gaps = wave.copy()
    for begin in range(0, 6 * RATE, RATE):
        gaps[:, begin + RATE // 5 : begin + RATE] = 0
    assert summary(gaps)["quiet"] == pytest.approx(0.8, abs=0.03)
    assert summary(gaps)["silence"] == 0
    wave[:, RATE : 4 * RATE] = 0
    assert summary(wave)["silence"] == pytest.approx(0.5, abs=0.02)
