"""An inverted pendulum that ticks each time it passes upright."""

from __future__ import annotations

import numpy as np

from soundstage.world.spec import Scene, pitch
from soundstage.world.stage import Stage

PIVOT = (0.5, 0.88)
LENGTH = 0.58
SWING = 0.55  # radians


def perform(stage: Stage, scene: Scene) -> None:
    """angle = SWING sin(pi (t - start) / beat): upright, and ticking, at start + k beat; every other tick is softer."""
    beat = 60 / scene.bpm
    start = stage.rng.uniform(0.04, min(0.96 * beat, 0.75))
    sign = stage.rng.choice((-1.0, 1.0))
    first = int(np.ceil(-start / beat))
    angle = sign * SWING * np.sin(np.pi * (stage.t - start) / beat)
    x, y = PIVOT[0] + LENGTH * np.sin(angle), PIVOT[1] - LENGTH * np.cos(angle)
    grey = np.array([120, 120, 120], np.float32)
    stage.box((x + PIVOT[0]) / 2, (y + PIVOT[1]) / 2, 0.014, LENGTH / 2, grey, angle=angle)
    stage.box(PIVOT[0], PIVOT[1] + 0.02, 0.16, 0.035, grey * 0.8)
    stage.body(x, y, scene.radius, scene.colour, scene.material)
    stage.track("bob", x, y, scene.radius, angle)
    f0 = pitch(scene.material, scene.size)
    for k in range(first, first + int(stage.duration / beat) + 2):
        t = start + k * beat
        if 0 <= t < stage.duration - 0.03:
            amp = 1.0 if (k % 2 == 0) == (sign > 0) else 0.7
            stage.mixer.strike(t, f0, scene.material, amp)
            stage.event(t, "tick", "bob", amp, f0, PIVOT[0], PIVOT[1] - LENGTH)
