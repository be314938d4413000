"""A ball rolls along the floor; the noise it makes is as loud as it is fast."""

from __future__ import annotations

import numpy as np

from soundstage.world.sound import rumble
from soundstage.world.spec import Scene, pitch
from soundstage.world.stage import FLOOR, Envelope, Stage


def course(t: np.ndarray, trend: str, centre: float, width: float) -> np.ndarray:
    """Signed speed, 1 at most: "start" speeds up from rest, "stop" slows to rest, "back" turns round at `centre`."""
    if trend == "back":
        return np.tanh((centre - t) / (1.5 * width))
    rise = 1 / (1 + np.exp(-(t - centre) / (0.5 * width)))
    return rise if trend == "start" else 1 - rise


def perform(stage: Stage, scene: Scene) -> None:
    """Rumble around f0 = stiffness / radius, its amplitude proportional to speed."""
    rng, radius = stage.rng, scene.radius
    spread = (0.4, 0.55) if scene.trend != "back" else (0.45, 0.55)
    centre, width = stage.duration * rng.uniform(*spread), stage.duration * rng.uniform(0.07, 0.11)
    reach, middle = rng.uniform(0.5, 0.6), rng.uniform(0.47, 0.53)
    fine = np.arange(0, stage.duration + 0.001, 0.001)
    velocity = course(fine, scene.trend, centre, width)
    way = np.concatenate([[0.0], np.cumsum((velocity[1:] + velocity[:-1]) / 2)]) * 0.001
    gain = reach / (way.max() - way.min())
    sign = 1 if scene.side == "right" else -1
    path = middle + sign * gain * (way - (way.max() + way.min()) / 2)
    x = np.interp(stage.t, fine, path)
    y = FLOOR - radius
    angle = (x - x[0]) / radius
    stage.floor()
    stage.body(x, y, radius, scene.colour, scene.material)
    mark = 0.68 * radius
    stage.disc(x + mark * np.cos(angle), y + mark * np.sin(angle), 0.24 * radius, stage.background * 0.6)
    stage.track("body", x, y, radius, angle)
    stage.envelopes["speed"] = Envelope(fine, np.abs(velocity) * gain)
    f0, mixer = pitch(scene.material, scene.size), stage.mixer
    noise = rumble(len(mixer.wave), mixer.sample_rate, f0, scene.seed % 64)
    edge = np.minimum(1, np.minimum(mixer.t, mixer.t[-1] - mixer.t) / 0.005)
    mixer.wave += (0.55 * edge * np.interp(mixer.t, fine, np.abs(velocity)) * noise).astype(np.float32)
