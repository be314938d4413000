"""The renderer against its own physics: when things happen, how they sound, and what is never shown in training."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from soundstage.world import KINDS, Scene, is_held_out, render, sample_scene, stream_item
from soundstage.world.kinds.bounce import flight, impacts
from soundstage.world.kinds.metronome import LENGTH, PIVOT
from soundstage.world.kinds.roll import course
from soundstage.world.oracle.audio import centre_frequency, peak_frequency, spectrum
from soundstage.world.spec import COLOURS, HOLDOUT_KINDS, MATERIALS, SIZES, pitch
from soundstage.world.stage import FLOOR

BALL = Scene("bounce", seed=5, colour="red", size="small", material="metal", shape="disc", count=3)


@pytest.mark.parametrize("kind", KINDS)
def test_same_scene_same_clip(kind: str) -> None:
    scene, text = stream_item(3, 11, kinds=(kind,))
    again, same = stream_item(3, 11, kinds=(kind,))
    first, second = render(scene), render(again)
    assert (scene, text) == (again, same)
    assert np.array_equal(first.clip.frames, second.clip.frames)
    assert np.array_equal(first.clip.wave, second.clip.wave)
    assert first.events == second.events
    assert stream_item(3, 12, kinds=(kind,))[0] != scene


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [2, 4])
def test_events_are_as_many_as_named_and_apart(kind: str, seconds: int) -> None:
    for i in range(12):
        scene = stream_item(4, i, kinds=(kind,))[0]
        times = np.array([e.t for e in render(scene, size=16, fps=8, num_frames=8 * seconds).events])
        if scene.count is not None:
            assert len(times) == scene.count
        assert np.all(np.diff(times) > 0.15)
        assert np.all((times > 0) & (times < seconds))


def test_impact_times_are_those_of_free_flight() -> None:
    rendered = render(BALL, fps=Fraction(24), num_frames=50)
    times = np.array([e.t for e in rendered.events])
    e = max(MATERIALS["metal"].restitution, 0.0)
    flights = np.diff(times)
    assert flights[1] / flights[0] == pytest.approx(e, abs=1e-9)
    y, t = rendered.tracks["body"].y, rendered.tracks["body"].t
    inside = (t > times[0]) & (t < times[1])
    bend = np.polyfit(t[inside], y[inside], 2)[0]
    drop = FLOOR - SIZES["small"] - y[0]
    # A fall from rest over `drop` and the flight after it have the same gravity.
    assert bend == pytest.approx(drop / (flights[0] / (2 * e)) ** 2, rel=1e-9)
    roots = np.roots(np.polyfit(t[inside], y[inside], 2) - [0, 0, FLOOR - SIZES["small"]])
    assert np.sort(roots) == pytest.approx(times[:2], abs=1e-9)


def test_a_body_touches_the_floor_at_each_impact() -> None:
    times = impacts(0.1, 0.4, 0.8, 4)
    assert times == pytest.approx([0.5, 1.14, 1.652, 2.0616])
    assert flight(times[:-1], times, 0.4, 0.5) == pytest.approx(0, abs=1e-12)
    assert flight(np.array([0.0, 0.1, 0.82]), times, 0.4, 0.5) == pytest.approx([0.5, 0.5, 0.5 * 0.8**2])


@pytest.mark.parametrize("kind", ["bounce", "metronome", "typing", "offscreen", "drums"])
def test_sound_starts_at_its_event(kind: str) -> None:
    for i in range(8):
        rendered = render(stream_item(6, i, kinds=(kind,))[0], size=16)
        wave, first = rendered.clip.wave[0], rendered.events[0]
        assert np.flatnonzero(wave)[0] / 16000 - first.t == pytest.approx(0, abs=1.5 / 16000)
        loud = np.abs(wave).max()
        attack = wave[int(first.t * 16000) : int((first.t + 0.0015) * 16000)]
        assert np.abs(attack).max() > 0.3 * min(loud, 0.6)
        assert 0.2 < loud < 0.95


def test_pendulum_is_upright_at_each_tick() -> None:
    scene = Scene("metronome", seed=2, colour="blue", size="medium", material="wood", bpm=120)
    rendered = render(scene, fps=200, num_frames=410)
    bob, times = rendered.tracks["bob"], np.array([e.t for e in rendered.events])
    assert np.interp(times, bob.t, bob.x) == pytest.approx(PIVOT[0], abs=1e-4)
    assert np.hypot(bob.x - PIVOT[0], bob.y - PIVOT[1]) == pytest.approx(LENGTH)
    assert np.diff(times) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "offscreen"])
def test_colour_changes_the_picture_and_never_the_sound(kind: str) -> None:
    scene = stream_item(8, 1, kinds=(kind,))[0]
    colours = [c for c in COLOURS if c != scene.colour]
    clip = render(scene).clip
    for colour in colours[:3]:
        other = render(replace(scene, colour=colour)).clip
        assert np.array_equal(clip.wave, other.wave)
        assert not np.array_equal(clip.frames, other.frames)


@pytest.mark.parametrize("kind", ["bounce", "metronome", "roll"])
def test_material_and_size_set_the_pitch(kind: str) -> None:
    scene = replace(stream_item(8, 2, kinds=(kind,))[0], bpm=120 if kind == "metronome" else None)
    for material in MATERIALS:
        for size, radius in SIZES.items():
            rendered = render(replace(scene, material=material, size=size), size=16)
            f0 = MATERIALS[material].stiffness / radius
            assert pitch(material, size) == f0
            wave = rendered.clip.wave[0]
            if kind == "roll":
                assert centre_frequency(wave, 16000) == pytest.approx(f0, rel=0.05)
            else:
                t = rendered.events[0].t
                assert peak_frequency(*spectrum(wave, 16000, t, t + 0.12)) == pytest.approx(f0, rel=0.005)


def test_materials_look_different() -> None:
    frames = [render(replace(BALL, material=m)).clip.frames[0].astype(int) for m in MATERIALS]
    for i, a in enumerate(frames):
        for b in frames[i + 1 :]:
            assert np.abs(a - b).max() > 60


def test_the_picture_does_not_depend_on_what_is_heard_and_scales() -> None:
    small, large = render(BALL, size=32).clip.frames, render(BALL, size=128).clip.frames
    pooled = large.reshape(33, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(pooled - small).mean() < 1.5
    assert np.array_equal(render(BALL, sample_rate=8000).clip.frames, render(BALL).clip.frames)
    assert render(BALL, num_samples=33000).clip.wave.shape == (1, 33000)


def test_motion_below_a_pixel_is_visible() -> None:
    rendered = render(replace(BALL, seed=9), fps=500, num_frames=1000)
    track, frames = rendered.tracks["body"], rendered.clip.frames
    slow = np.flatnonzero(np.abs(np.diff(track.y)) * 64 > 0.05)[:20]
    assert all(not np.array_equal(frames[i], frames[i + 1]) for i in slow)


def test_engine_sound_and_wheel_share_one_speed() -> None:
    rendered = render(Scene("engine", seed=4, colour="red", size="large", trend="rev"))
    speed, f0 = rendered.envelopes["speed"], rendered.envelopes["f0"]
    assert f0.value / speed.value == pytest.approx(12.0 / SIZES["large"])
    turned = np.interp(rendered.tracks["wheel"].t, speed.t, np.cumsum(speed.value) * 0.001) * 2 * np.pi
    angle = rendered.tracks["wheel"].angle
    assert angle - angle[0] == pytest.approx(turned - turned[0], abs=0.02)


def test_a_rolling_ball_does_not_slide_and_is_loud_when_fast() -> None:
    rendered = render(Scene("roll", seed=4, colour="red", size="large", material="wood", trend="stop", side="left"))
    body = rendered.tracks["body"]
    assert np.diff(body.angle) * SIZES["large"] == pytest.approx(np.diff(body.x))
    assert np.all(np.diff(body.x) < 0)
    wave = rendered.clip.wave[0]
    assert np.abs(wave[-2000:-100]).max() < 0.02 < 0.3 < np.abs(wave[:4000]).max()
    assert course(np.array([0.0, 2.0]), "back", 1.0, 0.2) == pytest.approx([1, -1], abs=0.01)


def test_silent_is_silent_and_offscreen_is_unseen() -> None:
    silent = render(stream_item(1, 0, kinds=("silent",))[0])
    assert not silent.clip.wave.any()
    assert silent.events == ()
    unseen = render(stream_item(1, 0, kinds=("offscreen",))[0])
    assert np.all(unseen.clip.frames == unseen.clip.frames[0])
    assert unseen.clip.wave.any()


def test_a_duet_is_two_bodies_with_their_own_sounds_and_is_drawn_only_on_request() -> None:
    rng = np.random.default_rng(2)
    assert all(sample_scene(rng).kind in KINDS for _ in range(200))
    for i in range(10):
        scene = stream_item(2, i, kinds=("duet",))[0]
        rendered = render(scene, size=16)
        for source, body in (("left", scene), ("right", scene.other)):
            own = [e for e in rendered.events if e.source == source]
            assert len(own) == body.count
            assert {e.f0 for e in own} == {pitch(body.material, body.size)}
        times = np.array([e.t for e in rendered.events])
        assert np.all(np.diff(times) > 0.1)


def test_held_out_cells_are_disjoint_and_whole() -> None:
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(3000))
    kept = [sample_scene(rng, holdout=True) for _ in range(600)]
    assert all(is_held_out(scene) and scene.kind in HOLDOUT_KINDS for scene in kept)
    cells = {(s.material, s.size, s.colour) for s in kept}
    assert len(cells) == 12
    assert {c[0] for c in cells} == set(MATERIALS)
    assert {c[1] for c in cells} == set(SIZES)
    assert {c[2] for c in cells} == set(COLOURS)
    assert not is_held_out(BALL)


def test_values_of_every_field_are_used() -> None:
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, kinds=("bounce",)) for _ in range(400)]
    for field, values in (("colour", COLOURS), ("size", SIZES), ("material", MATERIALS), ("count", range(1, 6))):
        assert {getattr(s, field) for s in scenes} == set(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size: 8 pixels is not between 16 and 256"),
        ({"num_frames": 8}, "the nearest is 16"),
        ({"num_frames": 400}, "the nearest is 128"),
    ],
)
def test_impossible_options_name_the_nearest(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(BALL, **options)


def test_unknown_kinds_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'bouncing' is not one of bounce, metronome"):
        sample_scene(rng, kinds=("bouncing",))
    with pytest.raises(ValueError, match="'drums' is not one of bounce, metronome, roll"):
        sample_scene(rng, kinds=("drums",), holdout=True)
