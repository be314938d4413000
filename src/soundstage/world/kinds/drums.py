"""A stick plays four pads in a repeating pattern; a pad lights when it is hit and fades."""

from __future__ import annotations

import numpy as np

from soundstage.world.sound import DRUM_PITCH
from soundstage.world.spec import DRUMS, Scene
from soundstage.world.stage import Stage, rgb

PAD_X = (0.14, 0.38, 0.62, 0.86)
PAD_Y = 0.74
PAD_HALF = (0.1, 0.12)
TIP = 0.05
LIFT = 0.3
FADE = 0.12  # seconds
DIM = 0.35


def glow(t: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """(F,) light exp(-(t - hit) / FADE) since the last of `hits`, 0 before the first."""
    if len(hits) == 0:
        return np.zeros_like(t)
    last = np.searchsorted(hits, t, side="right") - 1
    return np.where(last >= 0, np.exp(-(t - hits[last.clip(0)]) / FADE), 0.0)


def perform(stage: Stage, scene: Scene) -> None:
    """One word of the pattern per beat; the stick's tip flies in parabolas from pad to pad."""
    beat = 60 / scene.bpm
    start = stage.rng.uniform(0.04, min(0.6 * beat, 0.18))
    num = int(np.ceil((stage.duration - 0.05 - start) / beat))
    hits = start + beat * np.arange(-1, num + 1)
    pads = np.array([DRUMS.index(scene.pattern[k % len(scene.pattern)]) for k in range(-1, num + 1)])
    colour = rgb(scene.colour)
    for pad, x in enumerate(PAD_X):
        light = glow(stage.t, hits[1:-1][pads[1:-1] == pad])[:, None]
        stage.box(x, PAD_Y, *PAD_HALF, colour * (DIM + (1 - DIM) * light))
    leg = np.clip(np.searchsorted(hits, stage.t, side="right") - 1, 0, num)
    part = (stage.t - hits[leg]) / beat
    x = np.take(PAD_X, pads[leg]) * (1 - part) + np.take(PAD_X, pads[leg + 1]) * part
    top = PAD_Y - PAD_HALF[1] - TIP
    y = top - LIFT * np.sqrt(beat) * 4 * part * (1 - part)
    white = rgb("white") * 0.9
    stage.box(x + 0.05, y - 0.09, 0.012, 0.1, white * 0.6, angle=0.5)
    stage.disc(x, y, TIP, white)
    stage.track("stick", x, y, TIP)
    for t, pad in zip(hits[1:-1], pads[1:-1], strict=True):
        name = DRUMS[pad]
        stage.mixer.drum(t, name, 0.9)
        stage.event(t, name, f"pad{pad}", 0.9, DRUM_PITCH.get(name, 0.0), PAD_X[pad], PAD_Y)
