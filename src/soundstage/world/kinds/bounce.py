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


def perform(stage: Stage, scene: Scene) -> None:
    """Draw and sound the impacts; loudness is proportional to impact speed."""
    rng, shape, count = stage.rng, scene.shape or "disc", scene.count or 1
    restitution = max(MATERIALS[scene.material].restitution, LOWEST_RESTITUTION[count])
    hold, fall = _timing(rng, stage.duration, restitution, count)
    times = impacts(hold, fall, restitution, count + 1)
    radius, drop = scene.radius, rng.uniform(0.42, 0.55)
    x0, drift = rng.uniform(0.32, 0.68), rng.uniform(-0.12, 0.12)
    rest = FLOOR - BOTTOM[shape] * radius
    x = x0 + drift * (stage.t / stage.duration - 0.5)
    y = rest - flight(stage.t, times, fall, drop)
    stage.floor()
    stage.body(x, y, radius, scene.colour, scene.material, shape)
    stage.track("body", x, y, radius)
    f0 = pitch(scene.material, scene.size)
    for k, t in enumerate(times[:count]):
        amp = restitution**k
        stage.mixer.strike(t, f0, scene.material, amp)
        stage.event(t, "impact", "body", amp, f0, x0 + drift * (t / stage.duration - 0.5), FLOOR)
