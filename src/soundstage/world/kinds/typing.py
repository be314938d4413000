"""Keys of a keyboard are pressed by one hand; each key flashes and clicks, higher to the right."""

from __future__ import annotations

import numpy as np

from soundstage.world.kinds.drums import DIM, glow
from soundstage.world.spec import Scene, pitch
from soundstage.world.stage import Stage, rgb

COLUMNS, ROWS = 6, 3
KEY_HALF = 0.062


def key_centre(column: int, row: int) -> tuple[float, float]:
    """Centre of a key as fractions of the frame."""
    return 0.1 + 0.16 * column, 0.34 + 0.16 * row


def key_pitch(material: str, column: int) -> float:
    """f0 of a key in Hz: two semitones per column around the material's medium pitch."""
    return pitch(material) * 2 ** ((column - 2.5) / 6)


def perform(stage: Stage, scene: Scene) -> None:
    """`count` presses at uneven times, no two nearer than 160 ms in a clip of 2 s or more."""
    rng, count = stage.rng, scene.count
    room = stage.duration - 0.25
    gap = min(0.17, 0.75 * room / count)
    slack = rng.dirichlet(np.full(count + 1, 3.0)) * (room - gap * (count - 1))
    times = 0.06 + np.cumsum(slack[:count]) + gap * np.arange(count)
    keys: list[tuple[int, int]] = []
    first = 0 if scene.side == "left" else COLUMNS // 2
    while len(keys) < count:
        key = (first + int(rng.integers(COLUMNS // 2)), int(rng.integers(ROWS)))
        if not keys or key != keys[-1]:
            keys.append(key)
    colour = rgb(scene.colour)
    for column in range(COLUMNS):
        for row in range(ROWS):
            pressed = np.array([k == (column, row) for k in keys])
            light = glow(stage.t, times[pressed])[:, None]
            stage.box(*key_centre(column, row), KEY_HALF, KEY_HALF, colour * (DIM + (1 - DIM) * light))
    for t, (column, row) in zip(times, keys, strict=True):
        f0 = key_pitch(scene.material, column)
        stage.mixer.strike(t, f0, scene.material, 0.8)
        stage.event(t, "key", f"key{column}{row}", 0.8, f0, *key_centre(column, row))
