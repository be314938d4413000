"""The blind oracle against the truth of rendered clips: what, when, how late, and when there is nothing."""

from dataclasses import replace

import numpy as np
import pytest

from soundstage.media.clip import Clip
from soundstage.world import KINDS, Scene, caption, render, stream_item
from soundstage.world.floors import DISTURBANCES, chance, disturb, floors, markdown, shift_error, shift_sound
from soundstage.world.oracle import evaluate_clip, observe
from soundstage.world.oracle.audio import onsets
from soundstage.world.oracle.score import EVENT_KINDS, LAG_KINDS, align, score

NUM = 5


@pytest.mark.parametrize("kind", KINDS)
def test_clean_clips_are_read_right_and_blind(kind: str) -> None:
    for i in range(NUM):
        rendered = render(stream_item(31, i, kinds=(kind,))[0])
        seen = observe(rendered.clip)
        figures = score(seen, rendered.scene)
        assert seen.kind == kind
        wanted = {*rendered.scene.fields, "count_heard", "pattern_heard", "silent"} & set(figures)
        assert {name: figures[name] for name in wanted} == dict.fromkeys(wanted, 1.0)
        assert figures.get("pitch_semitones", 0) < 0.6
        assert figures.get("pitch_radius_semitones", 0) < 0.8
        assert figures.get("tempo_error_pct", 0) < 0.1
        assert figures.get("f1@20", 1) == 1
        assert figures.get("abs_offset_ms", figures.get("abs_lag_ms", 0)) < 5


@pytest.mark.parametrize("kind", EVENT_KINDS)
@pytest.mark.parametrize(("size", "fps", "frames"), [(32, 8, 17), (128, 24, 49)])
def test_other_sizes_and_rates_are_read_too(kind: str, size: int, fps: int, frames: int) -> None:
    for i in range(2):
        rendered = render(stream_item(32, i, kinds=(kind,))[0], size=size, fps=fps, num_frames=frames)
        seen = observe(rendered.clip)
        truth = np.array([e.t for e in rendered.events])
        assert seen.kind == kind
        assert np.abs(seen.visual[:, None] - truth).min(1).max() < 0.004
        assert np.abs(seen.audio - truth).max() < 0.0015


def test_onsets_of_rendered_sounds_are_within_a_millisecond() -> None:
    errors = []
    for i in range(40):
        rendered = render(stream_item(33, i, kinds=("bounce", "metronome", "typing", "offscreen"))[0], size=16)
        found = onsets(rendered.clip.wave[0], 16000)
        truth = np.array([e.t for e in rendered.events])
        assert len(found) == len(truth)
        errors += list(np.abs(found - truth) * 1000)
    assert np.median(errors) < 0.3
    assert np.max(errors) < 1.5


@pytest.mark.parametrize("kind", EVENT_KINDS)
def test_injected_shifts_are_recovered_within_2_ms(kind: str) -> None:
    for i in range(3):
        rendered = render(stream_item(34, i, kinds=(kind,))[0])
        for shift in (-200, -40, 100, 200):
            assert abs(shift_error(rendered, shift)) < 2.2, (i, shift)


@pytest.mark.parametrize("kind", EVENT_KINDS)
@pytest.mark.parametrize("how", [how for how in DISTURBANCES if how != "clean"])
def test_shifts_are_recovered_within_10_ms_on_disturbed_pictures(kind: str, how: str) -> None:
    for i in range(2):
        rendered = render(stream_item(35, i, kinds=(kind,))[0])
        for shift in (-100, 200):
            assert abs(shift_error(rendered, shift, how, i)) < 10, (i, shift)


@pytest.mark.parametrize("kind", LAG_KINDS)
def test_lags_of_continuous_sounds_are_recovered(kind: str) -> None:
    errors = [
        abs(shift_error(render(stream_item(36, i, kinds=(kind,))[0]), shift)) for i in range(3) for shift in (-200, 40)
    ]
    assert np.median(errors) < 2
    assert np.max(errors) < 8


@pytest.mark.parametrize("how", DISTURBANCES)
def test_kind_and_colour_survive_disturbance(how: str) -> None:
    for i in range(len(KINDS)):
        scene = stream_item(37, i, kinds=(KINDS[i],))[0]
        seen = observe(disturb(render(scene).clip, how, i))
        assert seen.kind == scene.kind
        assert scene.colour is None or seen.colour == scene.colour


def test_permuted_sound_scores_at_chance() -> None:
    for row in chance(12, 38, kinds=("bounce", "drums")):
        assert row["own"] == 1.0
        assert row["permuted"] < max(row["uniform"], row["independent"]) + 3 * row["error"] + 0.02
        assert row["permuted"] < 0.45


def test_silence_and_faint_noise_have_no_onsets() -> None:
    rng = np.random.default_rng(0)
    assert onsets(np.zeros(33000, np.float32), 16000).size == 0
    assert onsets((0.003 * rng.standard_normal(33000)).astype(np.float32), 16000).size == 0
    assert onsets(np.sin(np.arange(33000) * 0.2).astype(np.float32), 16000).size == 0


def test_a_mute_bounce_has_only_misses_and_a_loud_silence_is_noticed() -> None:
    ball = render(Scene("bounce", seed=1, colour="red", size="small", material="metal", shape="disc", count=3))
    mute = replace(ball.clip, wave=np.zeros_like(ball.clip.wave))
    figures = evaluate_clip(mute, ball.scene)
    assert (figures["f1@45"], figures["recall@45"], figures["misses"], figures["count"]) == (0, 0, 3, 1)
    assert "offset_ms" not in figures
    nothing = Clip(np.zeros_like(ball.clip.frames), ball.clip.fps, mute.wave, 16000)
    assert evaluate_clip(nothing, ball.scene)["f1@45"] == 0
    floating = render(stream_item(1, 0, kinds=("silent",))[0])
    loud = evaluate_clip(replace(floating.clip, wave=ball.clip.wave), floating.scene)
    assert (loud["silent"], loud["hallucinations"]) == (0, 3)


def test_a_large_highlight_is_not_taken_for_the_colour() -> None:
    scene = Scene("metronome", seed=364581898, colour="green", size="large", material="metal", bpm=220)
    assert observe(render(scene).clip).colour == "green"


def test_wrong_things_are_noticed() -> None:
    ball = Scene("bounce", seed=1, colour="red", size="small", material="metal", shape="disc", count=3)
    clip = render(ball).clip
    asked = replace(ball, colour="blue", size="large", material="wood", shape="square", count=4)
    figures = evaluate_clip(clip, caption(asked))
    assert figures["kind"] == 1
    assert not any(figures[n] for n in ("colour", "size", "material", "shape", "count", "count_heard"))
    assert figures["pitch_semitones"] == pytest.approx(12 * np.log2(900 / 480 * 10 / 5), abs=0.1)
    assert evaluate_clip(clip, {"kind": "roll"})["kind"] == 0


def test_sound_of_the_wrong_material_is_off_by_its_interval() -> None:
    ball = Scene("bounce", seed=1, colour="red", size="small", material="metal", shape="disc", count=3)
    glass = render(replace(ball, material="glass"))
    figures = evaluate_clip(replace(render(ball).clip, wave=glass.clip.wave), ball)
    assert figures["pitch_radius_semitones"] == pytest.approx(12 * np.log2(1650 / 900), abs=0.2)
    assert figures["material"] == 0


def test_two_sources_are_told_apart_and_bound_to_their_sounds() -> None:
    for i in range(4):
        scene, text = stream_item(40, i, kinds=("duet",))
        clip = render(scene).clip
        seen = observe(clip)
        figures = score(seen, text)
        assert seen.kind == "duet"
        assert all(figures[name] == 1 for name in ("colour", "material", "count", "count_heard", "binding", "f1@20"))
        swapped = replace(
            scene,
            material=scene.other.material,
            size=scene.other.size,
            other=replace(scene.other, material=scene.material, size=scene.size),
        )
        assert evaluate_clip(clip, swapped)["binding"] == 0
        assert abs(shift_error(render(scene), 100)) < 2


def test_causality_and_sign() -> None:
    rendered = render(stream_item(39, 0, kinds=("bounce",))[0])
    early = align(observe(shift_sound(rendered.clip, -0.06)))
    assert np.all(early.offsets < -0.055)


def test_a_caption_without_a_kind_is_refused() -> None:
    clip = Clip(wave=np.zeros((1, 16000), np.float32), sample_rate=16000)
    with pytest.raises(ValueError, match="names no kind of the world"):
        evaluate_clip(clip, "a film of the sea")
    with pytest.raises(ValueError, match="'sea' is not one of bounce"):
        observe(clip, "sea")


@pytest.mark.slow
def test_floors_are_as_published() -> None:
    rows = floors(8, 9001)
    for row in rows:
        limit = 2.5 if row["picture"] == "clean" else 10
        assert row["max_ms"] < limit, row
        assert row["colour"] == row["kind_read"] == 1.0
        assert row.get("f1@45", 1.0) > 0.99
    assert markdown(rows).count("\n") == len(rows) + 2
