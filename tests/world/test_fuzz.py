"""Garbage in, no warning and no exception out: warnings are errors here."""

from fractions import Fraction

import numpy as np
import pytest

from soundstage.media.clip import Clip
from soundstage.world.oracle import evaluate_clip, observe
from soundstage.world.spec import Scene

SCENES = {
    "bounce": Scene("bounce", colour="red", size="small", material="metal", shape="disc", count=3),
    "metronome": Scene("metronome", colour="red", size="small", material="metal", bpm=120),
    "drums": Scene("drums", colour="red", pattern=("kick", "snare"), bpm=120),
    "engine": Scene("engine", colour="red", size="small", trend="rev"),
    "typing": Scene("typing", colour="red", material="wood", count=3, side="left"),
    "talker": Scene("talker", colour="red", size="small", pattern=("ah", "oo")),
    "roll": Scene("roll", colour="red", size="small", material="wood", trend="stop", side="left"),
    "silent": Scene("silent", colour="red", size="small", shape="disc"),
    "offscreen": Scene("offscreen", material="wood", count=2),
}


def frames(how: str, num: int, size: int, rng: np.random.Generator) -> np.ndarray:
    shape = (num, size, size, 3)
    if how == "noise":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if how == "flicker":
        return np.broadcast_to(rng.integers(0, 256, (num, 1, 1, 1), dtype=np.uint8), shape).copy()
    if how == "blobs":
        coarse = rng.integers(0, 256, (num, 4, 4, 3), dtype=np.uint8)
        return coarse.repeat(-(-size // 4), 1).repeat(-(-size // 4), 2)[:, :size, :size]
    return np.full(shape, {"black": 0, "white": 255}[how], np.uint8)


def waves(how: str, num: int, rng: np.random.Generator) -> np.ndarray:
    wave = {
        "silence": lambda: np.zeros(num),
        "noise": lambda: rng.uniform(-1, 1, num),
        "clicks": lambda: (rng.random(num) < 0.002).astype(float),
        "constant": lambda: np.full(num, 0.5),
    }[how]()
    return wave.astype(np.float32)[None]


SCENES["duet"] = Scene(**{**vars(SCENES["bounce"]), "kind": "duet", "other": SCENES["bounce"]})


@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize("picture", ["noise", "flicker", "blobs", "black", "white"])
def test_any_picture_and_sound_can_be_read(kind: str, picture: str) -> None:
    rng = np.random.default_rng([list(SCENES).index(kind), len(picture)])
    for num, size, rate, sound in (
        (1, 8, 8000, "noise"),
        (2, 17, 16000, "clicks"),
        (9, 8, 8000, "clicks"),
        (9, 8, 8000, "silence"),
        (9, 8, 16000, "noise"),
        (17, 33, 16000, "constant"),
    ):
        fps = Fraction(8)
        clip = Clip(frames(picture, num, size, rng), fps, waves(sound, int(num / fps * rate), rng), rate)
        scores = evaluate_clip(clip, SCENES[kind])
        assert all(np.isfinite(value) for value in scores.values())


@pytest.mark.parametrize("kind", SCENES)
def test_picture_or_sound_may_be_absent(kind: str) -> None:
    rng = np.random.default_rng(3)
    picture = Clip(frames("blobs", 17, 32, rng), Fraction(8))
    sound = Clip(wave=waves("clicks", 16000, rng), sample_rate=16000)
    assert observe(picture, kind).audio.size == 0
    assert observe(sound).kind == "offscreen"
    for clip in (picture, sound):
        assert all(np.isfinite(value) for value in evaluate_clip(clip, SCENES[kind]).values())
