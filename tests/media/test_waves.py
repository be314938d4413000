"""Resampling, channels, loudness against the EBU's own signals, and mel spectrograms against the recorded one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from soundstage.media.errors import MediaError
from soundstage.media.waves import (
    MMAUDIO_16K,
    MelConfig,
    hann,
    loudness,
    mel_basis,
    mel_spectrogram,
    normalise_loudness,
    resample,
    resampler,
    to_channels,
)


def tone(level: float, seconds: float, rate: int = 48000, channels: int = 2) -> np.ndarray:
    """A 1 kHz sine with its peak at `level` dBFS."""
    wave = 10 ** (level / 20) * np.sin(2 * np.pi * 1000 * np.arange(int(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


@pytest.mark.parametrize(("rate", "new_rate"), [(48000, 16000), (16000, 44100), (22050, 48000), (44100, 24000)])
def test_resampling_keeps_the_tone_and_its_phase(rate: int, new_rate: int) -> None:
    out = resample(tone(-6, 0.5, rate), rate, new_rate)
    expected = tone(-6, 0.5, new_rate)
    assert out.shape == expected.shape
    assert out.dtype == np.float32
    middle = np.s_[:, new_rate // 50 : -new_rate // 50]
    np.testing.assert_allclose(out[middle], expected[middle], atol=2e-4)


def test_resampling_in_chunks_equals_the_whole() -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, (2, 20_000)).astype(np.float32)
    whole = resample(wave, 44100, 16000)
    convert = resampler(44100, 16000, 2)
    cuts = [0, 1, 700, 701, 9000, 20_000]
    parts = [convert(wave[:, a:b], b == 20_000) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1)[:, : whole.shape[1]], whole)
    np.testing.assert_array_equal(resample(wave, 16000, 16000), wave)


def test_channels() -> None:
    left, right, centre, woofer, back_left, back_right = np.eye(6, dtype=np.float32)
    six = np.stack([left, right, centre, woofer, back_left, back_right])
    stereo = to_channels(six, 2)
    half = np.sqrt(0.5)
    total = 1 + 2 * half
    np.testing.assert_allclose(stereo[0], np.array([1, 0, half, 0, half, 0]) / total, rtol=1e-6)
    np.testing.assert_allclose(stereo[1], np.array([0, 1, half, 0, 0, half]) / total, rtol=1e-6)
    np.testing.assert_allclose(to_channels(six, 1)[0], stereo.mean(axis=0), rtol=1e-6)
    pair = np.array([[1.0, 0.5], [0.0, 0.5]], np.float32)
    np.testing.assert_allclose(to_channels(pair, 1), [[0.5, 0.5]])
    np.testing.assert_array_equal(to_channels(pair[:1], 2), pair[[0, 0]])
    assert np.abs(to_channels(np.ones((6, 5), np.float32), 2)).max() <= 1 + 1e-6
    with pytest.raises(MediaError, match="cannot make 3 of 6"):
        to_channels(six, 3)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(-23, 4)], -23.0),
        ([(-33, 4)], -33.0),
        ([(-36, 2), (-23, 12), (-36, 2)], -23.0),
        ([(-72, 2), (-36, 2), (-23, 12), (-36, 2), (-72, 2)], -23.0),
        ([(-26, 4), (-20, 4.02), (-26, 4)], -23.0),
    ],
)
def test_loudness_of_the_signals_of_ebu_tech_3341_in_a_fifth_of_the_time(
    parts: list[tuple[float, float]], expected: float
) -> None:
    wave = np.concatenate([tone(level, seconds) for level, seconds in parts], axis=1)
    assert loudness(wave, 48000) == pytest.approx(expected, abs=0.1)


def test_loudness_of_five_channels_in_ebu_tech_3341() -> None:
    levels = (-28, -28, -24, None, -30, -30)
    wave = np.concatenate([tone(level, 4, channels=1) if level else 0 * tone(0, 4, channels=1) for level in levels])
    assert loudness(wave, 48000) == pytest.approx(-23.0, abs=0.1)


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100])
def test_loudness_at_other_rates_short_and_silent(rate: int) -> None:
    assert loudness(tone(-23, 4, rate), rate) == pytest.approx(-23.0, abs=0.1)
    assert loudness(tone(-23, 0.2, rate), rate) == pytest.approx(-23.0, abs=0.3)
    assert loudness(np.zeros((1, rate), np.float32), rate) == float("-inf")
    assert loudness(np.zeros((1, 0), np.float32), rate) == float("-inf")


def test_normalising_reaches_the_target_or_the_peak() -> None:
    wave = tone(-40, 2)
    assert loudness(normalise_loudness(wave, 48000, target=-20), 48000) == pytest.approx(-20, abs=0.01)
    loud = normalise_loudness(wave, 48000, target=10, peak=-1)
    assert 20 * np.log10(np.abs(loud).max()) == pytest.approx(-1, abs=0.01)
    silence = np.zeros((2, 1000), np.float32)
    np.testing.assert_array_equal(normalise_loudness(silence, 48000), silence)


def test_mel_equals_the_recorded_one() -> None:
    data = np.load(Path(__file__).parents[1] / "data" / "mmaudio_mel.npz")
    np.testing.assert_allclose(mel_basis(MMAUDIO_16K), data["basis"], atol=1e-7)
    np.testing.assert_allclose(hann(1024), data["window"], atol=1e-6)
    np.testing.assert_allclose(mel_spectrogram(data["waveform"]), data["mel"], rtol=1e-4, atol=1e-4)


def test_mel_equals_the_golden_vectors(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--golden", default=None)
    files = sorted(Path(folder).glob("mmaudio_vae_*.safetensors")) if folder else []
    if not files:
        pytest.skip("no mmaudio_vae_*.safetensors in the folder of --golden")
    from safetensors.numpy import load_file

    for file in files:
        data = load_file(file)
        np.testing.assert_allclose(mel_spectrogram(data["in.waveform"]), data["out.mel"], rtol=1e-4, atol=1e-4)


def test_mel_has_one_frame_per_hop_and_names_a_wave_that_is_too_short() -> None:
    wave = np.zeros((2, 16000), np.float32)
    assert mel_spectrogram(wave).shape == (2, 80, 62)
    silent = np.log10(np.maximum(mel_basis(MMAUDIO_16K).sum(axis=1) * np.sqrt(1e-9), 1e-5))
    np.testing.assert_allclose(mel_spectrogram(wave)[0, :, 30], silent, atol=1e-4)
    small = MelConfig(n_fft=256, hop=64, num_mels=20, pad=96)
    assert mel_spectrogram(wave[:, :6400], small).shape == (2, 20, 100)
    with pytest.raises(MediaError, match="give more than 384"):
        mel_spectrogram(wave[:, :384])
