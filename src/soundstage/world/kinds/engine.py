"""A wheel with one spoke turns; its harmonic sound follows the turning speed."""

from __future__ import annotations

import numpy as np

from soundstage.world.spec import SIZES, Scene
from soundstage.world.stage import Envelope, Stage, rgb

SPEEDS = {"idle": (1.3, 1.3), "rev": (1.0, 3.1), "brake": (3.1, 1.0)}  # turns per second
SCALE = 2.0  # wheel radius / the radius of its size


def firing(size: str) -> float:
    """f0 in Hz at one turn per second: larger engines sound lower."""
    return 12.0 / SIZES[size]


def speed(t: np.ndarray, trend: str, centre: float, width: float, phase: float) -> np.ndarray:
    """Turns per second: a smooth step from the first to the second speed, with a 10 % wobble at 1.1 Hz."""
    low, high = SPEEDS[trend]
    step = low + (high - low) / (1 + np.exp(-(t - centre) / width))
    return step * (1 + 0.1 * np.sin(2 * np.pi * 1.1 * t + phase))


def perform(stage: Stage, scene: Scene) -> None:
    """f0(t) = firing(size) speed(t); loudness rises a little with speed."""
    rng = stage.rng
    centre, width = stage.duration * rng.uniform(0.35, 0.65), rng.uniform(0.09, 0.16)
    phase, start = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    fine = np.arange(0, stage.duration + 0.001, 0.001)
    turning = speed(fine, scene.trend, centre, width, phase)
    angle_fine = start + 2 * np.pi * np.concatenate([[0.0], np.cumsum((turning[1:] + turning[:-1]) / 2)]) * 0.001
    angle = np.interp(stage.t, fine, angle_fine)
    radius = SCALE * scene.radius
    x, y = 0.5, 0.5
    stage.disc(x, y, radius, rgb(scene.colour))
    dark = stage.background * 0.6
    stage.disc(x + 0.62 * radius * np.cos(angle), y + 0.62 * radius * np.sin(angle), 0.3 * radius, dark)
    stage.box(
        x + 0.3 * radius * np.cos(angle),
        y + 0.3 * radius * np.sin(angle),
        0.3 * radius,
        0.09 * radius,
        dark,
        angle=angle,
    )
    stage.track("wheel", x, y, radius, angle)
    f0 = firing(scene.size)
    stage.envelopes["speed"] = Envelope(fine, turning)
    stage.envelopes["f0"] = Envelope(fine, f0 * turning)
    mixer = stage.mixer
    turns = np.interp(mixer.t, fine, turning)
    sound = f0 * np.interp(mixer.t, fine, angle_fine - start)
    edge = np.minimum(1, np.minimum(mixer.t, mixer.t[-1] - mixer.t) / 0.005)
    weights = 1 / np.arange(1, 13) ** 0.8
    mixer.harmonics(slice(None), sound, weights, 0.11 * edge * (0.7 + 0.15 * turns))
