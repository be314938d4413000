"""A body falls on the floor and bounces: piecewise parabolas, one struck sound per impact."""

from __future__ import annotations

import numpy as np

from soundstage.world.spec import MATERIALS, Scene, pitch
from soundstage.world.stage import BOTTOM, FLOOR, Stage

# Restitution a material may not fall below, so that the last of `count` intervals stays well above 150 ms.
LOWEST_RESTITUTION = {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.78, 5: 0.85}


def impacts(hold: float, fall: float, restitution: float, count: int) -> np.ndarray:
    """(count,) impact times: a body let go at `hold` falls for `fall` seconds; flight k lasts 2 fall e^k."""
    flights = 2 * fall * restitution ** np.arange(1, count)
    return hold + fall + np.concatenate([[0.0], np.cumsum(flights)])


def _timing(rng: np.random.Generator, duration: float, restitution: float, count: int) -> tuple[float, float]:
    """(hold, fall) with impact `count` inside the clip and the next one after its end."""
    hold = duration * rng.uniform(0.0, 0.12)
    unit = impacts(0.0, 1.0, restitution, count + 1)
    low = (duration * 1.015 - hold) / unit[-1]
    high = min((duration * 0.94 - hold) / unit[-2], 0.55 * duration)
    return hold, rng.uniform(low, max(low, high))


def flight(t: np.ndarray, times: np.ndarray, fall: float, drop: float) -> np.ndarray:
    """Height at times `t` of a body let go from `drop`, given its impact times (the last one may follow the clip)."""
    gravity = 2 * drop / fall**2
    starts = np.concatenate([[times[0] - 2 * fall], times[:-1]])
    nth = np.minimum(np.searchsorted(times, t, side="right"), len(times) - 1)
    since, length = t - starts[nth], times[nth] - starts[nth]
    height = 0.5 * gravity * since * (length - since)
    return np.where(t < times[0] - fall, drop, np.maximum(height, 0.0))


def _restitution(scene: Scene) -> float:
    return max(MATERIALS[scene.material].restitution, LOWEST_RESTITUTION[scene.count])


def _fall(
    stage: Stage,
    scene: Scene,
    source: str,
    timing: tuple[float, float],
    drop: float,
    way: tuple[float, float],
    loud: float = 1.0,
) -> None:
    """Draw and sound one body; timing as from `_timing`, way = (x at half time, drift over the clip)."""
    shape, restitution, radius, (x0, drift) = scene.shape or "disc", _restitution(scene), scene.radius, way
    times = impacts(*timing, restitution, scene.count + 1)
    x = x0 + drift * (stage.t / stage.duration - 0.5)
    y = FLOOR - BOTTOM[shape] * radius - flight(stage.t, times, timing[1], drop)
    stage.body(x, y, radius, scene.colour, scene.material, shape)
    stage.track(source, x, y, radius)
    f0 = pitch(scene.material, scene.size)
    for k, t in enumerate(times[:-1]):
        amp = loud * restitution**k
        stage.mixer.strike(t, f0, scene.material, amp)
        stage.event(t, "impact", source, amp, f0, x0 + drift * (t / stage.duration - 0.5), FLOOR)


def perform(stage: Stage, scene: Scene) -> None:
    """Draw and sound the impacts; loudness is proportional to impact speed."""
    rng = stage.rng
    timing = _timing(rng, stage.duration, _restitution(scene), scene.count)
    drop = rng.uniform(0.42, 0.55)
    way = rng.uniform(0.32, 0.68), rng.uniform(-0.12, 0.12)
    stage.floor()
    _fall(stage, scene, "body", timing, drop, way)


def duet(stage: Stage, scene: Scene) -> None:
    """Two bodies side by side, each with its own count and pitch; of 40 draws the one with impacts farthest apart."""
    rng, pair = stage.rng, (scene, scene.other)
    draws = []
    for _ in range(40):
        timings = [_timing(rng, stage.duration, _restitution(s), s.count) for s in pair]
        first, second = (impacts(*g, _restitution(s), s.count) for g, s in zip(timings, pair, strict=True))
        draws.append((float(np.abs(first[:, None] - second).min()), timings))
    timings = max(draws, key=lambda draw: draw[0])[1]
    stage.floor()
    for source, s, timing, x in zip(("left", "right"), pair, timings, (0.25, 0.75), strict=True):
        _fall(stage, s, source, timing, rng.uniform(0.42, 0.55), (x, rng.uniform(-0.08, 0.08)), 0.75)
