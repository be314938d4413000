"""The scan on made films whose cuts, blur, bars, motion and lag are known."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from soundstage.data.flow import Item, Poison
from soundstage.data.picture import flow, focus, text_blocks
from soundstage.data.scan import Scan, measure, scan
from soundstage.data.traces import MEASURES, Traces
from soundstage.media.clip import Clip
from soundstage.media.encode import write
from soundstage.media.shots import shots
from soundstage.media.sync import clip_offset
from soundstage.testing.spoil import blur, write_over
from soundstage.world.render import render, stream_item

FPS = 24


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: patches with sharp edges on a colour of its own."""
    coarse = rng.normal(size=(height // 12 + 1, width // 12 + 1, 3)).repeat(12, axis=0).repeat(12, axis=1)
    return np.clip(coarse[:height, :width] * 40 + rng.uniform(60, 190, 3), 0, 255).astype(np.uint8)


def take(rng: np.random.Generator, length: int, size: tuple[int, int] = (120, 160), speed: int = 1) -> np.ndarray:
    """(length, H, W, 3) uint8: a camera that moves `speed` pixels a frame over a texture."""
    wide = texture(rng, size[0], size[1] + speed * length)
    return np.stack([wide[:, n * speed : n * speed + size[1]] for n in range(length)])


def world(kind: str, index: int = 0) -> Clip:
    scene, _ = stream_item(5, index, kinds=[kind])
    return render(scene, size=128, fps=FPS, num_frames=3 * FPS, sample_rate=16_000).clip


def seen(frames: np.ndarray, path: Path, fps: int = FPS) -> dict[str, float]:
    return scan(write(Clip(frames, Fraction(fps)), path))[0].summary()


def test_cuts_are_those_of_a_close_comparison(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(14, 40, 7)
    clip = Clip(np.concatenate([take(rng, n) for n in lengths]), Fraction(FPS))
    path = write(clip, tmp_path / "film.mp4")
    traces, _ = scan(path)
    truth = (np.cumsum(lengths)[:-1] / FPS).tolist()
    assert [shot.start for shot in traces.shots()][1:] == pytest.approx(truth, abs=1e-3)
    assert [shot.start for shot in shots(path)][1:] == pytest.approx(truth, abs=1e-3)
    assert traces.summary()["cuts"] == len(truth)
    assert traces.summary(0, truth[0])["cuts"] == 0


def test_blur_is_measured_in_pixels() -> None:
    image = texture(np.random.default_rng(1), 360, 480)
    for sigma in (1.0, 2.0, 3.0):
        luma = blur(image[None], sigma)[0].mean(axis=2).astype(np.float32)
        noisy = luma + np.random.default_rng(2).normal(0, 1, luma.shape).astype(np.float32)
        for picture in (luma, noisy):
            assert focus([picture[::4], picture[:, ::4].T]) == pytest.approx(sigma, abs=0.35)
    assert np.isnan(focus([np.full((40, 200), 90, np.float32)]))


def test_motion_is_measured_in_picture_heights() -> None:
    rng = np.random.default_rng(3)
    smooth = blur(texture(rng, 45, 160)[None], 3.0)[0].mean(axis=2).astype(np.float32)
    for speed in (0, 1, 3):
        moved, share = flow(np.stack([smooth[:, n * speed : n * speed + 80] for n in range(6)]))
        assert moved.mean() == pytest.approx(speed / 45, rel=0.3, abs=0.001)
        assert (share > 0.9).all() == (speed > 0)


def test_bars_black_static_and_exposure(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    frames = take(rng, 30)
    plain = seen(frames, tmp_path / "a.mp4")
    assert (plain["bars"], plain["black"], plain["static"]) == (0, 0, 0)
    barred = frames.copy()
    barred[:, :15] = barred[:, -15:] = 0
    assert seen(barred, tmp_path / "b.mp4")["bars"] == pytest.approx(0.25, abs=0.03)
    room = frames * np.clip(1.6 - np.hypot(*np.mgrid[-1:1:120j, -1:1:160j]) * 2.2, 0, 1)[None, :, :, None]
    assert seen(room.astype(np.uint8), tmp_path / "r.mp4")["bars"] == 0, "a dark room fades, and has no bars"
    dark = frames.copy()
    dark[:12] = 0
    found = seen(dark, tmp_path / "c.mp4")
    assert found["black"] == pytest.approx(0.4, abs=0.04)
    assert found["bars"] == 0
    assert seen(frames[:1].repeat(30, axis=0), tmp_path / "d.mp4")["static"] > 0.9
    assert seen(np.full_like(frames, 255), tmp_path / "e.mp4")["bright"] == 1


def test_writing_is_told_from_texture() -> None:
    frames = take(np.random.default_rng(5), 1, (360, 640))
    rows = [image[0, ::4].mean(axis=2).astype(np.float32) for image in (frames, write_over(frames))]
    assert text_blocks(rows[0]).mean() < 0.01
    assert text_blocks(rows[1]).mean() > 0.04


def test_uneven_frames_keep_their_times(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(6).choice([1, 2, 3], 40)) / 30.0
    frames = take(np.random.default_rng(7), 40)
    clip = Clip(frames, Fraction(30), times=times - times[0])
    traces, media = scan(write(clip, tmp_path / "vfr.mp4"))
    assert traces.times == pytest.approx(times - times[0], abs=1e-4)
    assert media["variable_rate"]
    assert traces.summary()["fps"] == pytest.approx(39 / (times[-1] - times[0]), rel=1e-3)


def test_the_traces_tell_the_lag_as_the_clip_does(tmp_path: Path) -> None:
    clip = world("bounce", 1)
    shifted = np.pad(clip.wave, ((0, 0), (1_600, 0)))[:, : clip.wave.shape[1]]
    for wave, late in ((clip.wave, 0), (shifted, 100)):
        spoken = Clip(clip.frames, clip.fps, wave, clip.sample_rate)
        found = measure(scan(write(spoken, tmp_path / "m.mp4"))[0])["sync"]
        assert found["lag_ms"] == pytest.approx(late, abs=50)
        assert found["lag_ms"] == pytest.approx(clip_offset(spoken).ms, abs=12)


def test_the_stage_adds_its_file_and_facts(tmp_path: Path) -> None:
    item = Item({"media": write(world("bounce"), tmp_path / "b.mp4")}, {"licence": "cc0"})
    (out,) = Scan()(item, tmp_path)
    assert out.facts["licence"] == "cc0"
    assert out.facts["media"]["fps"] == "24"
    assert (out.facts["media"]["height"], out.facts["media"]["sample_rate"]) == (128, 16_000)
    assert set(out.facts["scan"]) <= set(MEASURES)
    first = out.files["traces"].read_bytes()
    traces = Traces.load(out.files["traces"])
    assert traces.summary() == out.facts["scan"]
    assert traces.save(tmp_path / "again.npz").read_bytes() == first
    (tmp_path / "more").mkdir()
    (again,) = Scan()(item, tmp_path / "more")
    assert (again.facts, again.files["traces"].read_bytes()) == (out.facts, first)


def test_sound_alone_and_picture_alone(tmp_path: Path) -> None:
    clip = world("bounce")
    traces, media = scan(clip.without("video").save(tmp_path / "s.wav"))
    assert "width" not in media
    assert "motion" not in traces.summary()
    assert traces.duration == pytest.approx(3, abs=0.01)
    traces, media = scan(clip.without("audio").save(tmp_path / "p.mp4"))
    assert "sample_rate" not in media
    assert traces.sync() is None


def test_damaged_files_are_poison(tmp_path: Path) -> None:
    path = write(world("bounce"), tmp_path / "whole.mp4")
    content = path.read_bytes()
    for name, cut in (("short.mp4", content[: len(content) * 2 // 3]), ("empty.mp4", b""), ("junk.mp4", b"x" * 999)):
        bad = tmp_path / name
        bad.write_bytes(cut)
        with pytest.raises(Poison):
            list(Scan()(Item({"media": bad}), tmp_path))


def test_an_even_beat_is_not_held_against_a_clip(tmp_path: Path) -> None:
    """A flash and a click twice a second agree at many lags; the sound is told to be with the picture."""
    frames = take(np.random.default_rng(8), 1).repeat(72, axis=0)
    wave = np.zeros((1, 48_000), np.float32)
    for beat in range(1, 6):
        frames[12 * beat] = 250
        wave[:, 8_000 * beat : 8_000 * beat + 400] = 0.5 * np.exp(-np.arange(400) / 80) * np.cos(np.arange(400))
    together = scan(write(Clip(frames, Fraction(FPS), wave, 16_000), tmp_path / "a.mp4"))[0].sync()
    assert together["lag_ms"] == pytest.approx(0, abs=25)
    assert together["confidence"] > 0.9
    between = np.roll(wave, 4_000, axis=1)
    apart = scan(write(Clip(frames, Fraction(FPS), between, 16_000), tmp_path / "b.mp4"))[0].sync()
    assert apart["confidence"] < 0.9


def test_a_lone_knock_is_not_held_against_a_lone_flash(tmp_path: Path) -> None:
    """One sound and one movement always agree at some lag."""
    frames = take(np.random.default_rng(9), 1).repeat(60, axis=0)
    frames[36:] = 250
    wave = np.zeros((1, 40_000), np.float32)
    knock = 0.5 * np.exp(-np.arange(2_000) / 300) * np.cos(np.arange(2_000) / 5)
    for at, sure in ((24_000, True), (10_400, False)):
        struck = wave.copy()
        struck[:, at : at + 2_000] = knock
        found = scan(write(Clip(frames, Fraction(FPS), struck, 16_000), tmp_path / "a.mp4"))[0].sync()
        assert found["lag_ms"] == pytest.approx(1000 * (at - 24_000) / 16_000, abs=60)
        assert (found["confidence"] > 0.9) == sure, found
