"""The world's oracle as a metric: is the clip what was asked for, and is its sound in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from soundstage.evaluation.metric import Figure
from soundstage.media.clip import Clip

FIGURES = (
    Figure("f1@20", "event F1 at 20 ms"),
    Figure("f1@45", "event F1 at 45 ms"),
    Figure("f1@90", "event F1 at 90 ms"),
    Figure("f1@125", "event F1 at 125 ms"),
    Figure("chance_f1@45", "F1 at 45 ms by chance", better="zero"),
    Figure("precision@45", "precision at 45 ms"),
    Figure("recall@45", "recall at 45 ms"),
    Figure("abs_offset_ms", "absolute offset", "ms", "median", "lower"),
    Figure("offset_ms", "signed offset", "ms", "median", "zero"),
    Figure("spread_ms", "spread of offsets", "ms", "median", "lower"),
    Figure("drift_ms_per_s", "drift", "ms/s", "median", "zero"),
    Figure("misses", "events without a sound", "per clip", "mean", "lower"),
    Figure("hallucinations", "sounds without an event", "per clip", "mean", "lower"),
    Figure("abs_lag_ms", "absolute lag", "ms", "median", "lower"),
    Figure("lag_ms", "signed lag", "ms", "median", "zero"),
    Figure("correlation", "correlation of sound and motion"),
    Figure("silent", "stays silent"),
    Figure("kind", "right kind"),
    Figure("colour", "right colour"),
    Figure("size", "right size"),
    Figure("shape", "right shape"),
    Figure("material", "right material"),
    Figure("count", "right count, seen"),
    Figure("count_heard", "right count, heard"),
    Figure("pattern", "right pattern, seen"),
    Figure("pattern_heard", "right pattern, heard"),
    Figure("trend", "right course"),
    Figure("side", "right side"),
    Figure("tempo_error_pct", "tempo error, seen", "%", "median", "lower"),
    Figure("tempo_heard_error_pct", "tempo error, heard", "%", "median", "lower"),
    Figure("pitch_semitones", "pitch error", "semitones", "median", "lower"),
    Figure("pitch_radius_semitones", "pitch error by the seen size", "semitones", "median", "lower"),
)


@dataclass(frozen=True)
class Oracle:
    """world.oracle.evaluate_clip: a clip against a caption or its fields.

    A clip of events in which none is both seen and heard scores 0, also where it shows and sounds nothing: otherwise a
    blank clip would agree with itself perfectly.
    """

    figures: tuple[Figure, ...] = FIGURES

    def __call__(self, clip: Clip, wanted: str | Mapping[str, object]) -> Mapping[str, float]:
        from soundstage.world.oracle import evaluate_clip

        scores = evaluate_clip(clip, wanted)
        if "f1@45" in scores and "offset_ms" not in scores:
            scores |= {key: 0.0 for key in scores if key.startswith(("f1@", "precision@", "recall@", "chance_f1@"))}
        return scores
