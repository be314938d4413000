"""Reading a clip blind: what is seen, what is heard, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from soundstage.media.clip import Clip
from soundstage.world.kinds.typing import COLUMNS, ROWS
from soundstage.world.oracle import audio, matching, motion, video
from soundstage.world.oracle.kind import look
from soundstage.world.spec import DRUMS, EXTRA_KINDS, KINDS, MATERIALS, SIZES, pitch

NONE = np.zeros(0)


@dataclass(frozen=True, eq=False)
class Observation:
    """What the oracle reads from a clip; a field is None where it cannot be read or the kind has no such thing.

    kind is what the clip was read as, looks what its picture shows (None where the kind was given).
    visual: (V,) seconds of visual events; seen: (V,) their label (drum number, key column, swing direction) or zeros.
    audio: (A,) seconds of sound onsets; pitches: (A,) Hz; levels: (A,) RMS; drums: the voice of each onset.
    tempo: beats per minute of the sound. f0: Hz, the pitch of the whole sound (at one turn per second for an engine).
    lag, correlation: of a continuous sound behind its picture in seconds, for engine, talker and roll.
    heard: the drums or vowels of the sound in order.
    other: the right body of a duet, read as a bounce; sources: (A,) 0 or 1, the body whose pitch each onset has.
    """

    kind: str
    duration: float
    looks: str | None = None
    colour: str | None = None
    radius: float | None = None
    size: str | None = None
    shape: str | None = None
    material: str | None = None
    count: int | None = None
    bpm: float | None = None
    pattern: tuple[str, ...] | None = None
    trend: str | None = None
    side: str | None = None
    visual: np.ndarray = field(default_factory=lambda: NONE)
    seen: np.ndarray = field(default_factory=lambda: NONE)
    audio: np.ndarray = field(default_factory=lambda: NONE)
    pitches: np.ndarray = field(default_factory=lambda: NONE)
    levels: np.ndarray = field(default_factory=lambda: NONE)
    drums: tuple[str, ...] = ()
    heard: tuple[str, ...] | None = None
    tempo: float | None = None
    f0: float | None = None
    lag: float | None = None
    correlation: float | None = None
    loudest: float = 0.0
    other: Observation | None = None
    sources: np.ndarray = field(default_factory=lambda: NONE)


@dataclass(frozen=True, eq=False)
class _Source:
    """The clip as the readers need it: frames and their times, a mono wave, and what is known so far."""

    frames: np.ndarray
    t: np.ndarray
    wave: np.ndarray
    rate: int
    duration: float
    colour: np.ndarray
    body: video.Body | None
    onsets: np.ndarray
    pitches: np.ndarray


def observe(clip: Clip, kind: str | None = None) -> Observation:
    """Read a clip of the world, rendered or generated, without its truth.

    kind: read it as this kind (when scoring against a prompt); by default the kind that the picture shows. Without a
    picture the clip is read as an off-screen sound; without sound nothing is heard.
    """
    if kind is not None and kind not in READERS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS + EXTRA_KINDS)}")
    wave = np.zeros(0, np.float32) if clip.wave is None else clip.wave.mean(0)
    rate = clip.sample_rate or 16000
    onsets = audio.onsets(wave, rate)
    heard = {
        "audio": onsets,
        "pitches": audio.pitches(wave, rate, onsets),
        "levels": audio.loudness_at(wave, rate, onsets),
        "drums": audio.drum_names(wave, rate, onsets),
        "loudest": float(audio.loudness(wave, rate)[1].max(initial=0)),
    }
    seen = Observation(kind="offscreen", duration=clip.duration, **heard)
    if clip.frames is None:
        source = _source(clip, wave, rate, seen, "offscreen", np.zeros((0, 1, 1, 3), np.uint8))
    else:
        looks = look(clip.frames) if kind is None else None
        seen = replace(seen, kind=kind or looks or "offscreen", looks=looks)
        source = _source(clip, wave, rate, seen, seen.kind, clip.frames)
    return READERS[seen.kind](source, seen)


def _source(clip: Clip, wave: np.ndarray, rate: int, seen: Observation, kind: str, frames: np.ndarray) -> _Source:
    followed = kind not in ("drums", "typing", "offscreen", "duet")
    colour = video.tone(frames, kind) if len(frames) and kind != "offscreen" else np.zeros(3)
    body = video.follow(frames, kind) if followed and len(frames) else None
    times = clip.frame_times if len(frames) else NONE
    return _Source(frames, times, wave, rate, clip.duration, colour, body, seen.audio, seen.pitches)


def _look(source: _Source, seen: Observation) -> Observation:
    """Colour, size and radius of a followed body."""
    body = source.body
    seen = replace(seen, colour=video.colour_name(source.colour))
    if body is None:
        return seen
    return replace(seen, radius=body.radius, size=video.size_name(body.radius, seen.kind))


def nearest_material(f0: float, radius: float) -> str | None:
    """The material whose stiffness is nearest to f0 * radius by ratio; None where there is no pitch."""
    if not np.isfinite(f0) or f0 <= 0:
        return None
    return min(MATERIALS, key=lambda name: abs(np.log(f0 * radius / MATERIALS[name].stiffness)))


def _struck(seen: Observation, radius: float | None) -> Observation:
    """Pitch of the whole sound, and the material that follows from it and the radius."""
    f0 = float(np.nanmedian(seen.pitches)) if np.isfinite(seen.pitches).any() else None
    material = nearest_material(f0, radius) if f0 is not None and radius is not None else None
    return replace(seen, f0=f0, material=material)


def _bounce(source: _Source, seen: Observation) -> Observation:
    seen = _look(source, seen)
    if source.body is None:
        return seen
    times = motion.impacts(source.t, source.body.y)
    seen = replace(seen, shape=source.body.shape, visual=times, seen=np.zeros(len(times)), count=len(times))
    return _struck(seen, seen.radius)


def _duet(source: _Source, seen: Observation) -> Observation:
    """Each half of the picture is read as a bounce; onsets are shared out by pitch, as fits the impacts best."""
    sides = []
    for frames in np.array_split(source.frames, 2, axis=2):
        half = replace(source, frames=frames, colour=video.tone(frames, "bounce"), body=video.follow(frames, "bounce"))
        sides.append(_bounce(half, replace(seen, kind="bounce", audio=NONE, pitches=NONE, levels=NONE, drums=())))
    times = np.concatenate([side.visual for side in sides])
    order = np.argsort(times)
    labels = np.repeat([0, 1], [len(side.visual) for side in sides])[order]
    times, log = times[order], np.log(np.where(np.isfinite(seen.pitches), seen.pitches, 1.0))
    middle = (log.min(initial=9) + log.max(initial=0)) / 2
    high = ((log > middle) & (log.max(initial=0) - log.min(initial=9) > 0.14)).astype(int)
    ways = [(matching.coarse_lag(times, seen.audio, labels[:, None] == own[None])[1], own) for own in (high, 1 - high)]
    sources = max(ways, key=lambda way: way[0])[1] if len(times) and len(high) else high
    left, right = (
        _struck(replace(side, pitches=seen.pitches[sources == k]), side.radius) for k, side in enumerate(sides)
    )
    return replace(
        left,
        kind="duet",
        audio=seen.audio,
        pitches=seen.pitches,
        levels=seen.levels,
        drums=seen.drums,
        visual=times,
        seen=labels,
        other=right,
        sources=sources,
    )


def _metronome(source: _Source, seen: Observation) -> Observation:
    seen = _look(source, seen)
    if source.body is None:
        return seen
    times, ways, bpm = motion.passages(source.t, source.body, source.duration)
    tempo = audio.tempo(seen.audio)
    return _struck(replace(seen, visual=times, seen=ways, bpm=bpm, tempo=tempo), seen.radius)


def _drums(source: _Source, seen: Observation) -> Observation:
    times, pads = motion.flashes(source.t, source.frames, video.PADS, source.colour)
    return replace(
        seen,
        colour=video.colour_name(source.colour),
        visual=times,
        seen=pads,
        pattern=tuple(DRUMS[p] for p in pads),
        heard=seen.drums,
        bpm=audio.tempo(times),
        tempo=audio.tempo(seen.audio),
    )


def _typing(source: _Source, seen: Observation) -> Observation:
    times, keys = motion.flashes(source.t, source.frames, video.KEYS, source.colour)
    columns = keys // ROWS
    side = None if not len(columns) else ("left" if columns.mean() < (COLUMNS - 1) / 2 else "right")
    seen = replace(
        seen, colour=video.colour_name(source.colour), visual=times, seen=columns, count=len(times), side=side
    )
    if not np.isfinite(seen.pitches).any():
        return seen
    # The six columns of a material span ten semitones and no two materials overlap: the pitch alone tells both.
    heard = seen.pitches[np.isfinite(seen.pitches)]
    material = nearest_material(float(np.median(heard)), SIZES["medium"])
    column = np.clip(np.round(6 * np.log2(heard / pitch(str(material))) + 2.5), 0, COLUMNS - 1)
    return replace(seen, f0=float(np.median(heard / 2 ** ((column - 2.5) / 6))), material=material)


def _engine(source: _Source, seen: Observation) -> Observation:
    seen = replace(_look(source, seen), audio=NONE, pitches=NONE, levels=NONE, drums=())
    if source.body is None:
        return seen
    angle = motion.turning(source.frames, source.body)
    angle = angle if angle[-1] > angle[0] else -angle
    speed = np.gradient(angle, source.t) / (2 * np.pi)
    third = max(2, len(speed) // 4)
    ratio = max(speed[-third:].mean(), 1e-3) / max(speed[:third].mean(), 1e-3)
    seen = replace(seen, trend="rev" if ratio > 1.7 else "brake" if ratio < 1 / 1.7 else "idle")
    t, f0 = audio.f0_track(source.wave, source.rate)
    voiced = np.isfinite(f0)
    if voiced.sum() < 20:
        return seen
    first, last = np.flatnonzero(voiced)[[0, -1]]
    t, f0 = t[first : last + 1], np.interp(t[first : last + 1], t[voiced], f0[voiced])
    phase = np.concatenate([[0.0], np.cumsum((f0[1:] + f0[:-1]) / 2 * np.diff(t))])
    lag, correlation, _ = motion.best_lag(source.t, angle, t, phase)
    inside = (source.t + lag >= t[0]) & (source.t + lag <= t[-1])
    turns = angle[inside] / (2 * np.pi)
    firing = float(np.polyfit(turns, np.interp(source.t[inside] + lag, t, phase), 1)[0])
    return replace(seen, f0=max(firing, 1.0), lag=lag, correlation=correlation)


def _talker(source: _Source, seen: Observation) -> Observation:
    seen = _look(source, seen)
    if source.body is None:
        return seen
    tall, wide = motion.mouth(source.frames, source.body)
    starts, vowels, openness = motion.syllables(source.t, tall, wide)
    seen = replace(seen, visual=starts, seen=np.zeros(len(starts)), pattern=vowels)
    fine, loud = audio.loudness(source.wave, source.rate)
    if loud.max(initial=0) < audio.ABSOLUTE or not len(starts):
        return replace(seen, audio=NONE, pitches=NONE, levels=NONE)
    lag, correlation, _ = motion.best_lag(source.t, openness, fine, loud)
    begins = audio.loud_starts(fine, loud)
    f0 = audio.f0_track(source.wave, source.rate)[1]
    f0 = f0[np.isfinite(f0)]
    return replace(
        seen,
        audio=begins,
        pitches=np.full(len(begins), np.nan),
        lag=lag,
        correlation=correlation,
        f0=float(np.median(f0)) if len(f0) else None,
        heard=audio.vowel_names(source.wave, source.rate, begins),
    )


def _roll(source: _Source, seen: Observation) -> Observation:
    seen = replace(_look(source, seen), audio=NONE, pitches=NONE, levels=NONE, drums=())
    if source.body is None:
        return seen
    known = np.isfinite(source.body.x)
    t, x = source.t[known], source.body.x[known]
    if len(t) < 8:
        return seen
    speed = np.gradient(np.convolve(np.pad(x, 1, mode="edge"), np.full(3, 1 / 3), "valid"), t)
    third = len(t) // 4
    first, last = speed[:third].mean(), speed[-third:].mean()
    turned = first * last < 0 and min(abs(first), abs(last)) > 0.25 * max(abs(first), abs(last))
    trend = "back" if turned else ("stop" if abs(first) > abs(last) else "start")
    side = "right" if (last if trend == "start" else first) > 0 else "left"
    seen = replace(seen, trend=trend, side=side)
    fine, loud = audio.loudness(source.wave, source.rate)
    if loud.max(initial=0) < audio.ABSOLUTE:
        return seen
    f0 = audio.centre_frequency(source.wave, source.rate)
    signed = loud
    if trend == "back":
        middle = (fine > 0.2 * fine[-1]) & (fine < 0.8 * fine[-1])
        smooth = np.convolve(loud, np.hanning(41) / np.hanning(41).sum(), "same")
        turn = fine[middle][np.argmin(smooth[middle])]
        signed = np.where(fine < turn, loud, -loud)
    way = np.concatenate([[0.0], np.cumsum((signed[1:] + signed[:-1]) / 2 * np.diff(fine))])
    # The way is read from the ball's place and from its turning, which a shaking camera does not disturb. Blur bends
    # the outline, so the centroid stands in for it where it leaves less than half as much unexplained.
    centre, angle = (reading[known] for reading in motion.rolling(source.frames, source.body))
    rests = [motion.best_lag(t, reading, fine, way)[2] for reading in (x, centre)]
    place = centre if rests[1] < 0.5 * rests[0] else x
    lag, correlation = motion.joint_lag(t, (place, angle), fine, way)
    return replace(seen, f0=f0, material=nearest_material(f0, seen.radius), lag=lag, correlation=correlation)


def _silent(source: _Source, seen: Observation) -> Observation:
    seen = _look(source, seen)
    return seen if source.body is None else replace(seen, shape=source.body.shape)


def _offscreen(source: _Source, seen: Observation) -> Observation:
    return _struck(replace(seen, count=len(source.onsets)), SIZES["medium"])


READERS: dict[str, Callable[[_Source, Observation], Observation]] = {
    "bounce": _bounce,
    "duet": _duet,
    "metronome": _metronome,
    "drums": _drums,
    "engine": _engine,
    "typing": _typing,
    "talker": _talker,
    "roll": _roll,
    "silent": _silent,
    "offscreen": _offscreen,
}
