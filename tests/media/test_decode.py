"""Ranges equal the whole, timestamps rule, pictures stand upright, memory follows the range."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from soundstage.media.clip import Clip
from soundstage.media.decode import frames, read
from soundstage.media.encode import write
from soundstage.media.probe import probe

Noise = Callable[..., Clip]
AS_IS: dict = {}
CHANGED = {"fps": 10, "sample_rate": 22050, "channels": 1, "size": (20, 30)}


@pytest.mark.parametrize("options", [AS_IS, CHANGED], ids=["native", "resampled"])
@pytest.mark.parametrize(
    ("suffix", "fps", "sample_rate"),
    [
        (".mp4", "24", 16000),
        (".mp4", "29.97", 44100),
        (".webm", "23.976", 48000),
        (".gif", "25", 16000),
        ("", "30", 16000),
    ],
)
def test_ranges_join_to_the_whole(
    suffix: str, fps: str, sample_rate: int, options: dict, noise: Noise, tmp_path: Path
) -> None:
    path = write(noise(2.6, fps, sample_rate), tmp_path / f"clip{suffix}")
    whole = read(path, **options)
    parts = [read(path, start=a, end=b, **options) for a, b in pairwise([0, 0.5, 1.3, 2.25, None])]
    np.testing.assert_array_equal(np.concatenate([part.frames for part in parts]), whole.frames)
    if whole.wave is not None:
        np.testing.assert_array_equal(np.concatenate([part.wave for part in parts], axis=1), whole.wave)
        # Each part keeps picture and sound together to within half a sample.
        assert all(abs(part.video_duration - part.audio_duration) < 0.6 / part.sample_rate for part in parts[:3])


def test_single_frames_are_exact(noise: Noise, tmp_path: Path) -> None:
    clip = noise(2.2, "29.97")
    path = write(clip, tmp_path / "clip.mp4")
    whole = read(path)
    for index in (0, 1, 29, 30, 31, 59, 60, 64):
        time = index * 1001 / 30000
        one = read(path, start=time, end=time + 0.03)
        np.testing.assert_array_equal(one.frames, whole.frames[index : index + 1])
    held = read(path, start=0.34, end=0.35)  # between frames 10 and 11
    np.testing.assert_array_equal(held.frames, whole.frames[10:11])
    streamed = list(frames(path, start=1))
    np.testing.assert_array_equal([frame for _, frame in streamed], whole.frames[30:])
    np.testing.assert_allclose([time for time, _ in streamed], whole.frame_times[30:], atol=1e-9)


def uneven_clip() -> Clip:
    """Twenty frames, frame i with brightness 20 + 10 i, at irregular times."""
    rng = np.random.default_rng(0)
    times = np.r_[0.0, np.cumsum(rng.uniform(0.02, 0.15, 19))]
    images = np.broadcast_to((20 + 10 * np.arange(20, dtype=np.uint8))[:, None, None, None], (20, 32, 48, 3))
    wave = rng.normal(0, 0.1, (1, int(16000 * times[-1]))).astype(np.float32)
    return Clip(images, Fraction(12), wave, 16000, times=times)


@pytest.mark.parametrize(("suffix", "tick"), [(".mp4", 1 / 90_000), (".webm", 0.001), (".gif", 0.01)])
def test_uneven_frames_keep_their_timestamps(suffix: str, tick: float, tmp_path: Path) -> None:
    clip = uneven_clip()
    path = write(clip, tmp_path / f"uneven{suffix}")
    assert probe(path).video.variable_rate
    back = read(path)
    np.testing.assert_allclose(back.times, clip.times, atol=tick)
    np.testing.assert_allclose(back.frames.mean(axis=(1, 2, 3)), 20 + 10 * np.arange(20), atol=2)
    part = read(path, start=0.5, end=1.0)
    inside = (back.times >= 0.5) & (back.times < 1.0)
    np.testing.assert_array_equal(part.frames, back.frames[inside])
    np.testing.assert_allclose(part.frame_times, back.times[inside] - 0.5, atol=1e-9)


def test_on_a_grid_every_frame_is_within_half_a_step_of_its_time(tmp_path: Path) -> None:
    path = write(uneven_clip(), tmp_path / "uneven.mp4")
    times = read(path).times
    grid = read(path, fps=30)
    assert (grid.fps, grid.times) == (Fraction(30), None)
    shown = np.rint((grid.frames.mean(axis=(1, 2, 3)) - 20) / 10).astype(int)
    slots = np.floor(times * 30 + 0.5)
    expected = [np.flatnonzero(slots <= index)[-1] for index in range(len(shown))]
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_pictures_are_upright(degrees: int, mirrored: bool, tmp_path: Path) -> None:
    image = np.full((32, 48, 3), 40, np.uint8)
    image[:16, :24] = [230, 30, 30]
    image[16:, :16] = [30, 30, 230]
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(degrees, hflip=mirrored)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    # The picture is turned counter-clockwise, then mirrored.
    expected = np.rot90(image, degrees // 90)[:, :: -1 if mirrored else 1]
    back = read(path)
    info = probe(path).video
    assert (info.height, info.width) == expected.shape[:2] == back.frames.shape[1:3]
    if not mirrored:
        assert info.rotation == degrees
    assert np.abs(back.frames[1].astype(int) - expected).mean() < 6
    small = read(path, size=(24, 20))
    assert small.frames.shape == (3, 24, 20, 3)


def test_ten_bit_video_is_read_as_eight(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 1, 3))
    path = tmp_path / "ten.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ramp, format="rgb24")))
        container.mux(stream.encode())
    assert (probe(path).video.bit_depth, probe(path).video.pixel_format) == (10, "yuv420p10le")
    assert np.abs(read(path).frames.astype(int) - ramp).max() <= 4


def test_probe_reads_the_header(noise: Noise, tmp_path: Path) -> None:
    clip = noise(1.001, "29.97", 44100, channels=2, size=(32, 48))
    info = probe(write(clip, tmp_path / "clip.mp4", metadata={"title": "t"}))
    video, audio = info.video, info.audio
    assert (video.codec, video.height, video.width, video.rotation) == ("h264", 32, 48, 0)
    assert (video.fps, video.variable_rate, video.bit_depth) == (Fraction(30000, 1001), False, 8)
    assert (video.declared_frames, audio.codec, audio.sample_rate) == (30, "aac", 44100)
    assert (audio.channels, audio.layout, info.num_streams) == (2, "stereo", 2)
    assert (info.metadata, info.format.split(",")[0]) == ({"title": "t"}, "mov")
    assert video.duration == pytest.approx(1.001, abs=1e-4)
    assert info.duration == pytest.approx(1.001, abs=1e-3)


def test_memory_follows_the_range_not_the_file(tmp_path: Path) -> None:
    images = np.zeros((300, 96, 128, 3), np.uint8)
    images[:, :, :, 0] = np.arange(300)[:, None, None] % 250
    path = write(Clip(images, Fraction(30), np.zeros((1, 160_000), np.float32), 16000), tmp_path / "long.mp4")
    del images
    read(path, start=7, end=7.2)
    tracemalloc.start()
    clip = read(path, start=7, end=7.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    count = sum(1 for _ in frames(path))
    streaming = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(clip.frames), count) == (15, 300)
    assert clip.wave.shape == (1, 8000)
    assert peak < 3 * clip.frames.nbytes < 300 * 96 * 128 * 3 / 6
    assert streaming < clip.frames.nbytes + 10 * 96 * 128 * 3
    assert list(clip.frames[:, 50, 50, 0] // 8) == pytest.approx(list(np.arange(210, 225) // 8), abs=1)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".flac"])
def test_late_ranges_seek_and_still_sound_the_same(
    suffix: str, noise: Noise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(noise(7.0, sample_rate=48000, channels=1).without("video"), tmp_path / f"sound{suffix}")
    whole = read(path, video=False, sample_rate=16000).wave
    monkeypatch.setattr("soundstage.media.decode.SOUND_FROM_START", 3)
    part = read(path, start=5.25, end=6, video=False, sample_rate=16000).wave
    np.testing.assert_allclose(part, whole[:, 84_000:96_000], atol=1e-6)


def test_late_sound_begins_with_silence(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    wave = np.full((1, 24_000), 0.5, np.float32)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream("flac", rate=48000, layout="mono")
        for _ in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 48000, 12_000, Fraction(1, 48000)
        container.mux([*video.encode(), *audio.encode(sound), *audio.encode()])
    back = read(path)
    assert back.wave.shape == (1, 36_000)
    assert not back.wave[0, :12_000].any()
    np.testing.assert_allclose(back.wave[0, 12_000:], 0.5, atol=1e-4)
    np.testing.assert_array_equal(read(path, start=0.2, end=0.5).wave, back.wave[:, 9_600:24_000])


@pytest.mark.parametrize("width", [47, 48])
def test_scaled_colours_are_those_of_every_pixel(width: int, tmp_path: Path) -> None:
    """Held against the file's own luma and chroma, scaled and turned to RGB in floating point."""
    y, x = np.mgrid[:48, :96] / 16.0
    waves = np.stack([np.sin(x + y), np.cos(1.3 * x), np.sin(0.7 * x - y)], axis=-1)
    path = Clip(np.uint8(127.5 + 100 * waves)[None].repeat(3, 0), Fraction(8)).save(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        planes = frame.reformat(width=width, height=24, format="yuv444p", interpolation="BICUBIC").to_ndarray()
    luma, blue, red = (planes[0] - 16.0) / 219, (planes[1] - 128.0) / 224, (planes[2] - 128.0) / 224
    kr, kb = (0.2126, 0.0722) if frame.colorspace == 1 else (0.299, 0.114)
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    exact = 255 * np.stack([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], axis=-1)
    found = read(path, size=(24, width)).frames
    assert found is not None
    assert np.abs(found[0] - exact.clip(0, 255)).mean() < 0.6
    assert found.transpose(3, 0, 1, 2).flags.c_contiguous
