"""Captions say every field of their scene, in many ways, and can be read back."""

from dataclasses import replace

import numpy as np
import pytest

from soundstage.world import KINDS, Scene, caption, parse, stream_item
from soundstage.world.captions import TEMPLATES, TREND_PHRASES
from soundstage.world.spec import EXTRA_KINDS

BALL = Scene("bounce", colour="red", size="small", material="metal", shape="disc", count=3)


@pytest.mark.parametrize("kind", KINDS + EXTRA_KINDS)
def test_every_paraphrase_names_every_field(kind: str) -> None:
    seen = set()
    for i in range(400):
        scene, text = stream_item(21, i, kinds=(kind,))
        seen.add(text)
        for words in (text, caption(scene)):
            assert parse(words) == scene.fields, words
            assert words == words.lower()
            assert len(words.encode()) <= 120
            assert len(words.split()) <= 20
    assert len(seen) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_is_used(kind: str) -> None:
    scene = stream_item(21, 0, kinds=(kind,))[0]
    rng = np.random.default_rng(0)
    templates = TEMPLATES.get(kind) or TREND_PHRASES[kind][scene.trend]
    assert len({caption(scene, rng) for _ in range(200)}) >= len(templates)


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (BALL, "a small red metal ball bounces three times"),
        (
            Scene("metronome", colour="orange", size="large", material="wood", bpm=130),
            "a large orange wooden metronome ticks at 130 beats per minute",
        ),
        (
            Scene("drums", colour="red", bpm=100, pattern=("kick", "snare", "kick", "snare")),
            "red drums play kick snare kick snare at 100 beats per minute",
        ),
        (Scene("engine", colour="blue", size="large", trend="rev"), "a large blue engine revs up"),
        (
            Scene("typing", colour="red", material="wood", count=5, side="left"),
            "the left hand types five keys on a red wooden keyboard",
        ),
        (Scene("talker", colour="red", size="small", pattern=("ah", "ee")), "a small red face says ah ee"),
        (
            Scene("roll", colour="red", size="small", material="glass", trend="stop", side="right"),
            "a small red glass ball rolls to the right and stops",
        ),
        (Scene("silent", colour="red", size="small", shape="square"), "a small red cube floats silently"),
        (Scene("offscreen", material="wood", count=2), "something wooden knocks twice off screen"),
        (
            replace(BALL, kind="duet", other=replace(BALL, colour="blue", size="large", material="wood", count=2)),
            "a small red metal ball bounces three times and a large blue wooden ball bounces twice",
        ),
    ],
)
def test_canonical_captions(scene: Scene, text: str) -> None:
    assert caption(scene) == text
    assert parse(text) == scene.fields


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a metronome ticks at 120 beats per minute", {"kind": "metronome", "bpm": 120}),
        ("a metronome ticks very fast", {"kind": "metronome", "bpm": 200}),
        (
            "Kick snare kick snare at 100 bpm",
            {"kind": "drums", "bpm": 100, "pattern": ("kick", "snare", "kick", "snare")},
        ),
        ("kick, hi-hat, snare, hi-hat", {"kind": "drums", "pattern": ("kick", "hat", "snare", "hat")}),
        (
            "A tiny violet ball bounces 4 times!",
            {"kind": "bounce", "size": "small", "colour": "purple", "shape": "disc", "count": 4},
        ),
        ("a film of the sea", {}),
    ],
)
def test_free_text_gives_what_it_names(text: str, fields: dict[str, object]) -> None:
    assert parse(text) == fields


def test_what_a_caption_leaves_out_follows_the_seed() -> None:
    texts = {caption(Scene(**{**vars(BALL), "seed": seed})) for seed in range(5)}
    assert texts == {"a small red metal ball bounces three times"}
