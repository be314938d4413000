"""Scores of a clip against the sentence or scene it was made from: is it what was asked, and is it in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from soundstage.media.clip import Clip
from soundstage.world.captions import parse
from soundstage.world.kinds.engine import firing
from soundstage.world.kinds.talker import voice
from soundstage.world.kinds.typing import key_pitch
from soundstage.world.oracle.audio import ABSOLUTE
from soundstage.world.oracle.kind import look
from soundstage.world.oracle.matching import TOLERANCES_MS, Match, chance_f1, count_hits, match
from soundstage.world.oracle.observe import Observation, observe
from soundstage.world.sound import DRUM_PITCH
from soundstage.world.spec import DRUMS, MATERIALS, Scene, pitch

EVENT_KINDS = ("bounce", "metronome", "drums", "typing")
LAG_KINDS = ("engine", "talker", "roll")
EDGE = 0.03  # seconds at each end of a clip in which an event may lack its partner


def agreement(seen: Observation) -> np.ndarray | None:
    """(V, A) in [0, 1], how well each sound fits each event by drum, key column or swing; None without labels."""
    shape = (len(seen.visual), len(seen.audio))
    if seen.kind == "drums" and all(shape):
        named = np.array([DRUMS.index(name) for name in seen.drums])
        return 0.15 + 0.85 * (seen.seen[:, None] == named[None])
    if seen.kind == "duet" and all(shape):
        return 0.15 + 0.85 * (seen.seen[:, None] == seen.sources[None])
    if seen.kind == "typing" and all(shape) and seen.f0:
        columns = 6 * np.log2(seen.pitches / seen.f0) + 2.5
        return 0.15 + 0.85 * (np.abs(seen.seen[:, None] - columns[None]) < 0.75)
    if seen.kind == "metronome" and shape[1] > 1 and shape[0]:
        low, high = np.percentile(seen.levels, (25, 75))
        loud = np.where(seen.levels > np.sqrt(low * high), 1, -1) if high > 1.25 * low else np.zeros(shape[1])
        return 1.0 - 0.5 * (seen.seen[:, None] * loud[None] < 0)
    return None


def align(seen: Observation) -> Match:
    """The matching of an observation's visual events with its onsets."""
    return match(seen.visual, seen.audio, agree=agreement(seen))


def window(duration: float) -> tuple[float, float]:
    """Seconds between which an event without a partner counts: the last frame of a clip shows nothing after it."""
    return EDGE, duration - EDGE - 1 / 16


def event_f1(visual: np.ndarray, audio: np.ndarray, duration: float, tolerance: float = 0.045) -> float:
    """F1 of two trains of times in seconds; 0 where both are empty, since something should have happened."""
    hits, misses, extras = count_hits(visual, audio, tolerance, window(duration))
    return 2 * hits / (2 * hits + misses + extras) if hits else 0.0


def sync(seen: Observation) -> dict[str, float]:
    """Event sync: f1@20 .. f1@125 with precision and recall, chance, offsets, spread, drift, misses, hallucinations.

    Times in milliseconds, drift in milliseconds per second. Absent keys could not be measured. Nothing seen and nothing
    heard scores 0: a kind with events has some.
    """
    out: dict[str, float] = {}
    for ms in TOLERANCES_MS:
        hits, misses, extras = count_hits(seen.visual, seen.audio, ms / 1000, window(seen.duration))
        out[f"precision@{ms}"] = hits / (hits + extras) if hits else 0.0
        out[f"recall@{ms}"] = hits / (hits + misses) if hits else 0.0
        out[f"f1@{ms}"] = event_f1(seen.visual, seen.audio, seen.duration, ms / 1000)
    out["chance_f1@45"] = chance_f1(seen.visual, seen.audio, 0.045, seen.duration)
    found = align(seen)
    out["misses"] = float(len(seen.visual) - len(found.offsets))
    out["hallucinations"] = float(len(seen.audio) - len(found.offsets))
    values = {
        "offset_ms": found.median,
        "abs_offset_ms": float(np.median(np.abs(found.offsets))) if len(found.offsets) else float("nan"),
        "spread_ms": found.spread,
        "drift_ms_per_s": found.drift,
    }
    return out | {name: 1000 * value for name, value in values.items() if np.isfinite(value)}


def semitones(measured: np.ndarray | float, expected: np.ndarray | float) -> np.ndarray:
    """Interval in semitones, positive when sharp."""
    return 12 * np.log2(np.asarray(measured, float) / expected)


def pitch_errors(seen: Observation, fields: Mapping[str, object]) -> dict[str, float]:
    """Median absolute error in semitones of the sound's pitch against that of the named body (pitch_semitones), and
    against stiffness / detected radius of the named material (pitch_radius_semitones)."""
    kind, material, size = seen.kind, fields.get("material"), fields.get("size")
    out: dict[str, float] = {}
    if kind in ("bounce", "metronome", "offscreen", "duet") and material and seen.f0 and (size or kind == "offscreen"):
        heard = seen.pitches[np.isfinite(seen.pitches) & ((seen.sources == 0) if kind == "duet" else True)]
        out["pitch_semitones"] = float(np.median(np.abs(semitones(heard, pitch(str(material), size)))))
    if kind in ("roll", "typing") and material and seen.f0:
        expected = pitch(str(material), size if kind == "roll" else None)
        out["pitch_semitones"] = float(abs(semitones(seen.f0, expected)))
    if kind in ("engine", "talker") and size and seen.f0:
        expected = (firing if kind == "engine" else voice)(str(size))
        out["pitch_semitones"] = float(abs(semitones(seen.f0, expected)))
    if kind in ("bounce", "metronome", "roll", "duet") and material and seen.f0 and seen.radius:
        out["pitch_radius_semitones"] = float(abs(semitones(seen.f0, MATERIALS[str(material)].stiffness / seen.radius)))
    if kind == "drums":
        tones = [
            semitones(hz, DRUM_PITCH[name])
            for hz, name in zip(seen.pitches, seen.drums, strict=True)
            if name in DRUM_PITCH and np.isfinite(hz)
        ]
        if tones:
            out["pitch_semitones"] = float(np.median(np.abs(tones)))
    if kind == "typing" and material and len(seen.visual):
        pairs = align(seen).pairs
        wanted = np.array([key_pitch(str(material), int(seen.seen[v])) for v, _ in pairs])
        off = np.abs(semitones(seen.pitches[pairs[:, 1]], wanted)) if len(pairs) else np.zeros(0)
        out["pitch_semitones"] = float(np.median(off[np.isfinite(off)])) if np.isfinite(off).any() else float("nan")
    return {name: value for name, value in out.items() if np.isfinite(value)}


def _follows(words: tuple[str, ...] | None, pattern: tuple[str, ...], kind: str) -> float:
    """1 if the words are the pattern: drums repeat it for as long as they play, at least twice three beats in four."""
    if not words:
        return 0.0
    if kind != "drums":
        return float(words == pattern)
    enough = len(words) >= min(3, len(pattern))
    return float(enough and all(w == pattern[k % len(pattern)] for k, w in enumerate(words)))


def content(seen: Observation, fields: Mapping[str, object]) -> dict[str, float]:
    """Is it what was asked: 1 or 0 for each named field, tempo errors in percent, pitch errors in semitones."""
    out = {
        name: float(getattr(seen, name) == fields[name])
        for name in ("colour", "size", "shape", "material", "count", "trend", "side")
        if name in fields
    }
    if seen.looks is not None:
        out["kind"] = float(seen.looks == fields["kind"])
    if "count" in fields:
        out["count_heard"] = float(len(seen.audio) == fields["count"])
    if "bpm" in fields:
        for name, value in (("tempo_error_pct", seen.bpm), ("tempo_heard_error_pct", seen.tempo)):
            if value is not None and np.isfinite(value):
                out[name] = 100 * abs(float(value) / float(fields["bpm"]) - 1)  # type: ignore[arg-type]
    if "pattern" in fields:
        pattern = tuple(fields["pattern"])  # type: ignore[arg-type]
        out["pattern"] = _follows(seen.pattern, pattern, seen.kind)
        out["pattern_heard"] = _follows(seen.heard, pattern, seen.kind)
    return out | pitch_errors(seen, fields)


def score(seen: Observation, wanted: Scene | Mapping[str, object] | str) -> dict[str, float]:
    """All figures of an observation against a scene, a caption, or a caption's fields.

    Keys that could not be measured (no onset, no such field) are absent. See `content` and `sync`; continuous kinds
    have lag_ms (positive when the sound is late) and correlation; `silent` is 1 when a silent scene stays so; in a
    duet `binding` is the share of impacts that meet, within 45 ms, a sound of their own body's pitch.
    """
    fields = _fields(wanted)
    out = content(seen, fields)
    if seen.other is not None and "other" in fields:
        out = _both(seen, fields, out)
    if seen.kind in (*EVENT_KINDS, "duet"):
        out |= sync(seen)
    if seen.kind in LAG_KINDS and seen.lag is not None:
        out |= {"lag_ms": 1000 * seen.lag, "abs_lag_ms": 1000 * abs(seen.lag), "correlation": seen.correlation or 0.0}
    if seen.kind == "silent":
        out |= {"silent": float(seen.loudest < ABSOLUTE), "hallucinations": float(len(seen.audio))}
    return out


def _both(seen: Observation, fields: Mapping[str, object], first: dict[str, float]) -> dict[str, float]:
    """Figures of both bodies of a duet: 1 where both are right, the larger pitch error, all sounds, and binding."""
    asked: Mapping[str, object] = fields["other"]  # type: ignore[assignment]
    second = content(seen.other, asked)
    out = {name: (max if "semitones" in name else min)(value, second.get(name, value)) for name, value in first.items()}
    out["count_heard"] = float(len(seen.audio) == int(fields["count"]) + int(asked["count"]))  # type: ignore[call-overload]
    hertz = [pitch(str(part["material"]), str(part["size"])) for part in (fields, asked)]
    nearest = np.argmin(np.abs(np.log(seen.pitches[:, None] / np.array(hertz))), axis=1)
    hits = sum(count_hits(seen.visual[seen.seen == k], seen.audio[nearest == k], 0.045, (0, 0))[0] for k in (0, 1))
    out["binding"] = hits / max(len(seen.visual), 1)
    return out


def _fields(wanted: Scene | Mapping[str, object] | str) -> Mapping[str, object]:
    fields = wanted.fields if isinstance(wanted, Scene) else parse(wanted) if isinstance(wanted, str) else wanted
    if "kind" not in fields:
        raise ValueError(
            f"wanted: {wanted!r} names no kind of the world; say for example "
            "'a small red metal ball bounces three times'"
        )
    return fields


def evaluate_clip(clip: Clip, wanted: Scene | Mapping[str, object] | str) -> dict[str, float]:
    """Read a clip as the kind that was asked for, and score it; see `score`."""
    fields = _fields(wanted)
    seen = observe(clip, str(fields["kind"]))
    return score(seen if clip.frames is None else replace(seen, looks=look(clip.frames)), fields)
