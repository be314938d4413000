"""How well the oracle measures: its errors on rendered clips whose truth is known, clean, disturbed and shifted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from soundstage.media.clip import Clip
from soundstage.world.oracle.matching import chance_f1
from soundstage.world.oracle.observe import observe
from soundstage.world.oracle.score import EVENT_KINDS, LAG_KINDS, evaluate_clip, event_f1, score
from soundstage.world.render import Rendered, render, stream_item

SHIFTS_MS = (-200, -100, -40, 0, 40, 100, 200)
DISTURBANCES = ("clean", "noise", "blur", "jitter")


def shift_sound(clip: Clip, seconds: float) -> Clip:
    """The clip with its sound later by `seconds` (earlier when negative), padded with silence to the same length."""
    num = round(seconds * clip.sample_rate)
    wave = np.zeros_like(clip.wave)
    if num >= 0:
        wave[:, num:] = clip.wave[:, : wave.shape[1] - num]
    else:
        wave[:, :num] = clip.wave[:, -num:]
    return replace(clip, wave=wave)


def _along(frames: np.ndarray, axis: int, kernel: np.ndarray) -> np.ndarray:
    half = len(kernel) // 2
    pad = [(half, half) if a == axis else (0, 0) for a in range(4)]
    padded = np.pad(frames, pad, mode="edge")
    return sum(k * np.take(padded, np.arange(i, i + frames.shape[axis]), axis) for i, k in enumerate(kernel))


def _moved(frames: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each frame displaced by its (dx, dy) in pixels, less than one, by linear interpolation."""
    out = frames
    for axis, shift in ((2, offsets[:, 0]), (1, offsets[:, 1])):
        last = frames.shape[axis] - 1
        index = np.arange(last + 1)
        low, high = (np.take(out, np.clip(index + d, 0, last), axis) for d in (-1, 1))
        part = shift[:, None, None, None]
        out = out * (1 - np.abs(part)) + low * np.maximum(part, 0) + high * np.maximum(-part, 0)
    return out


def disturb(clip: Clip, how: str, seed: int = 0) -> Clip:
    """The clip with pixel noise of sigma 8 / 255, a Gaussian blur of 1 pixel, or a camera jitter of 0.3 pixel."""
    if how == "clean":
        return clip
    rng = np.random.Generator(np.random.Philox(key=[seed, 7]))
    frames = clip.frames.astype(np.float32)
    if how == "noise":
        frames = frames + rng.normal(0, 8, frames.shape).astype(np.float32)
    elif how == "blur":
        kernel = np.exp(-0.5 * np.arange(-3, 4, dtype=np.float32) ** 2)
        for axis in (1, 2):
            frames = _along(frames, axis, kernel / kernel.sum())
    elif how == "jitter":
        frames = _moved(frames, rng.normal(0, 0.3, (len(frames), 2)).clip(-0.9, 0.9))
    else:
        raise ValueError(f"how: {how!r} is not one of {', '.join(DISTURBANCES)}")
    return replace(clip, frames=(frames + 0.5).clip(0, 255).astype(np.uint8))


def shift_error(rendered: Rendered, shift_ms: float, how: str = "clean", seed: int = 0) -> float:
    """Measured offset minus the injected one, in ms; nan where no offset could be measured."""
    clip = disturb(shift_sound(rendered.clip, shift_ms / 1000), how, seed)
    found = score(observe(clip, rendered.scene.kind), rendered.scene)
    name = "lag_ms" if rendered.scene.kind in LAG_KINDS else "offset_ms"
    return found.get(name, float("nan")) - shift_ms


def floors(
    num: int = 32, seed: int = 9001, kinds: Sequence[str] = EVENT_KINDS + LAG_KINDS, **options: object
) -> list[dict[str, object]]:
    """One row per kind and disturbance over `num` clips of the stream `seed`: errors of the measured offset in ms over
    SHIFTS_MS (median, 95th percentile, largest), F1@45 ms unshifted, and the share of kinds and colours read right.

    options: passed to `render`.
    """
    rows: list[dict[str, object]] = []
    for kind in kinds:
        for how in DISTURBANCES:
            seen: dict[str, list[float]] = defaultdict(list)
            for i in range(num):
                rendered = render(stream_item(seed, i, kinds=(kind,))[0], **options)  # type: ignore[arg-type]
                for name, value in evaluate_clip(disturb(rendered.clip, how, i), rendered.scene).items():
                    seen[name].append(value)
                seen["error"] += [shift_error(rendered, ms, how, i) for ms in SHIFTS_MS]
            errors = np.abs(seen["error"])
            rows.append(
                {
                    "kind": kind,
                    "picture": how,
                    "median_ms": float(np.nanmedian(errors)),
                    "p95_ms": float(np.nanpercentile(errors, 95)),
                    "max_ms": float(np.nanmax(errors)),
                    "lost": int(np.isnan(errors).sum()),
                    **{name: float(np.mean(seen[name])) for name in ("f1@45", "colour") if seen[name]},
                    "kind_read": float(np.mean(seen["kind"])),
                }
            )
    return rows


def chance(num: int = 64, seed: int = 9002, kinds: Sequence[str] = EVENT_KINDS) -> list[dict[str, object]]:
    """F1@45 ms per kind: each clip with its own sound, with the sound of another clip, and two levels of chance.

    uniform: `chance_f1`, as if onsets fell anywhere. independent: the true events of one scene against those of every
    other, without the oracle; it is above `uniform` because clips of a kind place their events alike.
    """
    rows: list[dict[str, object]] = []
    for kind in kinds:
        scenes = [stream_item(seed, i, kinds=(kind,))[0] for i in range(num)]
        rendered = [render(scene) for scene in scenes]
        own = [score(observe(r.clip, kind), r.scene)["f1@45"] for r in rendered]
        seen = [observe(replace(r.clip, wave=rendered[i - 1].clip.wave), kind) for i, r in enumerate(rendered)]
        permuted = [score(s, scene)["f1@45"] for s, scene in zip(seen, scenes, strict=True)]
        uniform = [chance_f1(s.visual, s.audio, 0.045, s.duration) for s in seen]
        times = [np.array([event.t for event in r.events]) for r in rendered]
        pairs = [event_f1(a, b, seen[0].duration) for i, a in enumerate(times) for b in times[:i] + times[i + 1 :]]
        rows.append(
            {
                "kind": kind,
                "own": float(np.mean(own)),
                "permuted": float(np.mean(permuted)),
                "error": float(np.std(permuted) / np.sqrt(num)),
                "uniform": float(np.mean(uniform)),
                "independent": float(np.mean(pairs)),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"
