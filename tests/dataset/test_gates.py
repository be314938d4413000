"""Limits at their edges, whole tables at once, and injected defects under their own names."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item
from soundstage.data.gates import LIMITS, Gate, Limit, calibrate, judge, report, table
from soundstage.data.scan import measure, scan
from soundstage.media.clip import Clip
from soundstage.media.encode import write
from soundstage.testing.spoil import SPOILT
from soundstage.world.render import render, stream_item

FINE = {
    "seconds": 5.0, "lines": 720, "fps": 24000 / 1001, "cuts": 0, "black": 0, "blank": 0, "bright": 0, "dark": 0,
    "static": 0, "motion": 0.1, "shake": 0.1, "bars": 0, "blur": 0.8, "blocks": 0.01, "text": 0, "sample_rate": 48000,
    "loudness": -20, "silence": 0, "bandwidth": 24000, "clipped": 0, "dc": 0, "phase": 0.5, "balance": 1,
    "snr": 30, "speech": 1,
}  # fmt: skip


def verdict(**changed: float) -> str:
    facts = {"scan": {name: value for name, value in (FINE | changed).items() if value is not None}}
    return judge(table([facts])).reason[0] or "kept"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "kept"),
        ({"lines": 480}, "kept"),
        ({"lines": 478}, "small"),
        ({"seconds": 60.0}, "kept"),
        ({"seconds": 60.1}, "long"),
        ({"seconds": 2.9}, "short"),
        ({"fps": 23.976}, "kept"),
        ({"fps": 22}, "few frames"),
        ({"sample_rate": 16_000, "bandwidth": 8_000}, "kept"),
        ({"sample_rate": 15_999}, "low rate"),
        ({"sample_rate": None}, "no sound"),
        ({"bandwidth": 4_000}, "muffled"),
        ({"silence": 0.51}, "pausing"),
        ({"snr": 9.9}, "noisy"),
        ({"snr": 0, "speech": 0.1}, "kept"),
        ({"snr": None}, "kept"),
        ({"phase": None, "balance": None}, "kept"),
    ],
)
def test_edges(changed: dict, expected: str) -> None:
    assert verdict(**changed) == expected


def test_the_first_failing_limit_is_the_reason(tmp_path: Path) -> None:
    item = Item(facts={"scan": FINE | {"lines": 100, "clipped": 0.5}, "sync": None})
    (drop,) = Gate()(item, tmp_path)
    assert isinstance(drop, Drop)
    assert (drop.reason, drop.score) == ("small", 100)
    assert next(iter(Gate()(Item(facts={"scan": FINE}), tmp_path))).facts["scan"] == FINE


def test_sync_is_asked_only_when_it_is_sure() -> None:
    rows = [{"scan": FINE, "sync": {"lag_ms": -300.0, "confidence": sure}} for sure in (0.5, 0.95)]
    assert judge(table(rows)).reason.tolist() == [None, "out of sync"]


def test_a_wrong_measure_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'blur'"):
        Limit("blurr", most=1)


def test_ten_thousand_clips_are_judged_anew_within_a_second() -> None:
    rng = np.random.default_rng(0)
    rows = [{"scan": FINE | {"blur": float(b), "snr": float(s)}, "sync": None} for b, s in rng.random((10_000, 2)) * 20]
    start = time.process_time()
    columns = table(rows)
    counted = report(columns, {**LIMITS, "blurred": replace(LIMITS["blurred"], most=2.0)})
    assert time.process_time() - start < 1
    assert sum(counted.values()) == 10_000
    blur, snr = np.array([[row["scan"]["blur"], row["scan"]["snr"]] for row in rows]).T
    assert counted == {"kept": int(((blur <= 2) & (snr >= 10)).sum()), "blurred": int((blur > 2).sum())} | {
        "noisy": int(((blur <= 2) & (snr < 10)).sum())
    }
    (row,) = [row for row in calibrate(columns) if row["reason"] == "blurred"]
    assert row["percentiles"]["50"] == pytest.approx(10, abs=0.5)
    assert row["rejected"] == pytest.approx((blur > 3).mean())


@pytest.fixture(scope="module")
def good() -> Clip:
    """A clip of the world as a camera would deliver it: 480 lines, 24 frames a second, 48 kHz in stereo."""
    scene, _ = stream_item(11, 0, kinds=["bounce"])
    clip = render(scene, size=240, fps=24, num_frames=72, sample_rate=48_000).clip
    wave = np.concatenate([clip.wave, 0.8 * clip.wave + 0.1 * np.roll(clip.wave, 20, axis=1)])
    wave += np.random.default_rng(0).normal(0, 5e-4, wave.shape)  # a microphone at -66 dB full scale
    return replace(clip, frames=clip.frames.repeat(2, axis=1).repeat(2, axis=2), wave=wave.astype(np.float32))


@pytest.mark.parametrize("name", [None, "muffled", "barred"])
def test_a_spoilt_clip_is_rejected_by_its_name(name: str | None, good: Clip, tmp_path: Path) -> None:
    path = write(SPOILT[name](good) if name else good, tmp_path / "a.mp4", preset="ultrafast", threads=1)
    columns = table([measure(scan(path)[0])])
    failed = [reason for reason, limit in LIMITS.items() if judge(columns, {reason: limit}).reason[0]]
    assert failed == ([name] if name else [])
