"""Controls: something moves and makes no sound; something sounds and is not seen."""

from __future__ import annotations

import numpy as np

from soundstage.world.spec import Scene, pitch
from soundstage.world.stage import Stage


def silent(stage: Stage, scene: Scene) -> None:
    """A body floats on a smooth closed path, without sound."""
    rng, turn = stage.rng, 2 * np.pi
    rate = rng.uniform(0.3, 0.6, 2)
    phase = rng.uniform(0, turn, 2)
    x = 0.5 + rng.uniform(0.12, 0.24) * np.sin(turn * rate[0] * stage.t + phase[0])
    y = 0.48 + rng.uniform(0.1, 0.2) * np.sin(turn * rate[1] * stage.t + phase[1])
    stage.body(x, y, scene.radius, scene.colour, None, scene.shape)
    stage.track("body", x, y, scene.radius)


def offscreen(stage: Stage, scene: Scene) -> None:
    """`count` knocks of a material over an empty floor, no two nearer than 200 ms in a clip of 2 s or more."""
    rng, count = stage.rng, scene.count
    stage.floor()
    room = stage.duration - 0.3
    gap = min(0.22, 0.75 * room / count)
    slack = rng.dirichlet(np.full(count + 1, 3.0)) * (room - gap * (count - 1))
    f0 = pitch(scene.material)
    for k, t in enumerate(0.08 + np.cumsum(slack[:count]) + gap * np.arange(count)):
        amp = 0.75 + 0.25 * np.cos(2.1 * k)
        stage.mixer.strike(t, f0, scene.material, amp)
        stage.event(t, "knock", "offscreen", amp, f0, -1.0, -1.0)
