"""What is written comes back: clicks and flashes to within a millisecond, sizes, channels, tags, bytes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from soundstage.media.clip import Clip
from soundstage.media.decode import read
from soundstage.media.encode import write
from soundstage.media.errors import MediaError
from soundstage.media.probe import probe
from soundstage.media.sync import audio_onsets, offset_ms

FPS = ("12.5", "23.976", "24", "25", "29.97", "30", "59.94")
RATES = (16000, 22050, 24000, 44100, 48000)
Flashes = Callable[..., tuple[Clip, np.ndarray]]
Noise = Callable[..., Clip]


def seen(clip: Clip) -> np.ndarray:
    """Seconds of the bright frames."""
    return clip.frame_times[clip.frames.mean(axis=(1, 2, 3)) > 140]


@pytest.mark.parametrize(("fps", "sample_rate"), list(product(FPS, RATES)))
def test_clicks_and_flashes_come_back_within_a_millisecond(
    fps: str, sample_rate: int, flashes: Flashes, tmp_path: Path
) -> None:
    clip, truth = flashes(fps, sample_rate)
    back = read(write(clip, tmp_path / "clip.mp4"))
    assert back.fps == clip.fps
    assert back.times is None
    assert back.sample_rate == sample_rate
    assert back.frames.shape == clip.frames.shape
    assert back.wave.shape == clip.wave.shape
    heard = audio_onsets(back.wave, sample_rate)
    assert np.abs(heard - truth).max() < 0.001
    assert np.abs(seen(back) - truth).max() < 1e-6
    assert abs(offset_ms(seen(back), heard).ms) < 1


@pytest.mark.parametrize(("fps", "sample_rate"), [("23.976", 16000), ("29.97", 44100), ("24", 48000)])
def test_webm_keeps_time_too(fps: str, sample_rate: int, flashes: Flashes, tmp_path: Path) -> None:
    clip, truth = flashes(fps, sample_rate)
    back = read(write(clip, tmp_path / "clip.webm"))
    assert (back.fps, back.times, back.sample_rate) == (clip.fps, None, 48000)  # opus always decodes to 48 kHz
    assert np.abs(seen(back) - truth).max() < 0.001
    assert np.abs(audio_onsets(back.wave, 48000) - truth).max() < 0.001
    assert abs(back.audio_duration - clip.audio_duration) < 0.001


def test_images_and_wav_are_lossless(noise: Noise, tmp_path: Path) -> None:
    clip = noise(0.5, fps="29.97")
    back = read(clip.save(tmp_path / "folder 100%d", metadata={"title": "née"}))
    np.testing.assert_array_equal(back.frames, clip.frames)
    np.testing.assert_allclose(back.wave, np.clip(clip.wave, -1, 1), atol=1 / 65536)
    assert back.fps == Fraction(30000, 1001)
    assert back.metadata == {"title": "née"}
    part = read(tmp_path / "folder 100%d", start=5 * 1001 / 30000, end=9 * 1001 / 30000)
    np.testing.assert_array_equal(part.frames, clip.frames[5:9])
    with pytest.raises(MediaError, match="not empty"):
        write(clip, tmp_path / "folder 100%d")


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".m4a"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_sound_files_keep_every_channel(suffix: str, channels: int, noise: Noise, tmp_path: Path) -> None:
    clip = noise(0.5, channels=channels)
    path = write(clip, tmp_path / f"sound{suffix}", audio_bitrate=96_000 * channels)
    info = probe(path)
    assert info.video is None
    assert (info.audio.channels, info.audio.sample_rate) == (channels, 16000)
    back = read(path, video=False)
    assert back.frames is None
    assert back.wave.shape == clip.wave.shape
    if suffix == ".m4a":  # the woofer (channel 3) is coded up to 120 Hz only
        full = [index for index in range(channels) if index != 3]
        for index in full:
            assert np.corrcoef(back.wave[index], clip.wave[index])[0, 1] > 0.9
    else:
        np.testing.assert_allclose(back.wave, np.clip(clip.wave, -1, 1), atol=1 / 65536)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_surround_and_missing_sound(suffix: str, noise: Noise, tmp_path: Path) -> None:
    clip = noise(0.5, channels=6, sample_rate=48000)
    back = read(write(clip, tmp_path / f"six{suffix}"))
    assert len(back.wave) == 6
    assert len(read(tmp_path / f"six{suffix}", channels=2).wave) == 2
    silent = read(write(clip.without("audio"), tmp_path / f"silent{suffix}"))
    assert (silent.wave, silent.sample_rate) == (None, None)
    np.testing.assert_array_equal(silent.frames, back.frames)


@pytest.mark.parametrize(
    ("suffix", "size"), [(".mp4", (34, 46)), (".webm", (33, 45)), (".gif", (33, 45)), ("", (33, 45))]
)
def test_odd_sizes(suffix: str, size: tuple[int, int], tmp_path: Path) -> None:
    frames = np.zeros((6, 33, 45, 3), np.uint8)
    frames[:, :16] = [255, 0, 0]
    frames[:, 16:] = [10, 90, 200]
    back = read(write(Clip(frames, Fraction(12)), tmp_path / f"odd{suffix}"))
    assert back.frames.shape == (6, *size, 3)
    assert np.abs(back.frames[:, 4:12, 4:40].astype(int) - [255, 0, 0]).max() <= 8
    assert np.abs(back.frames[:, 22:, 4:].astype(int) - [10, 90, 200]).max() <= 8  # the doubled last row and column too


def test_colours_survive_and_gif_palette_fits(noise: Noise, tmp_path: Path) -> None:
    clip = noise(0.5)
    back = read(write(clip, tmp_path / "clip.mp4", crf=4)).frames.astype(int)
    middles = np.s_[:, 3::8, 3::8]  # chroma is kept at half resolution, so look inside the 8 x 8 squares
    assert np.abs(back[middles] - clip.frames[middles]).mean() < 4
    flat = np.zeros((4, 16, 16, 3), np.uint8)
    flat[..., 0], flat[..., 2] = 200, np.arange(4)[:, None, None] * 60
    np.testing.assert_array_equal(read(write(Clip(flat, Fraction(10)), tmp_path / "a.gif")).frames, flat)


@pytest.mark.parametrize("suffix", [".mp4", ".m4a", ".webm", ".flac"])
def test_tags_survive(suffix: str, noise: Noise, tmp_path: Path) -> None:
    tags = {"title": "größer", "comment": 'soundstage generate "a ball"\n--seed 3', "soundstage": '{"seed": 3}'}
    back = read(write(noise(0.3), tmp_path / f"clip{suffix}", metadata=tags), video=suffix in (".mp4", ".webm"))
    assert back.metadata == tags


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".wav", ".flac", ".m4a"])
def test_the_same_clip_gives_the_same_bytes(suffix: str, noise: Noise, tmp_path: Path) -> None:
    first, second = (write(noise(0.4), tmp_path / f"{name}{suffix}", metadata={"comment": "x"}) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_unusual_rates_are_resampled_to_one_the_codec_has(noise: Noise, tmp_path: Path) -> None:
    clip = noise(0.5, sample_rate=14700)
    back = read(write(clip, tmp_path / "clip.mp4"))
    assert back.sample_rate == 16000
    assert abs(back.audio_duration - clip.audio_duration) < 0.001


def test_a_late_picture_stays_late(noise: Noise, tmp_path: Path) -> None:
    clip = noise(1.0, fps="25")
    late = Clip(clip.frames[:10], clip.fps, clip.wave, 16000, times=0.4 + np.arange(10) / 25)
    back = read(write(late, tmp_path / "late.mp4"))
    np.testing.assert_allclose(back.times, late.times, atol=1e-4)
    assert back.wave.shape == clip.wave.shape
    part = read(tmp_path / "late.mp4", start=0.48, end=0.6)
    assert (part.times, len(part.frames), part.wave.shape[1]) == (None, 3, round(0.12 * 16000))
    np.testing.assert_array_equal(part.frames, back.frames[2:5])
    np.testing.assert_array_equal(part.wave, back.wave[:, round(0.48 * 16000) : round(0.6 * 16000)])
