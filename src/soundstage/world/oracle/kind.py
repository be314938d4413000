"""Which kind of scene a clip shows: a ridge classifier on 16 x 16 maps, fitted on the world at first use, and rules."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from soundstage.world.oracle.video import Body, colour_name, follow, has_floor, tone
from soundstage.world.render import render, stream_item
from soundstage.world.spec import KINDS, SIZES

GRID = 16
LAYOUTS = ("metronome", "drums", "engine", "typing", "talker")
FIT_CLIPS = 32  # per kind
FIT_SEED = 20_240_001
PENALTY = 3.0


@lru_cache(maxsize=8)
def _pooling(size: int) -> np.ndarray:
    """(GRID, size) float32: rows average `size` pixels into GRID cells, with fractional overlap."""
    edges = np.linspace(0, size, GRID + 1)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    pool = np.maximum(overlap, 0)
    return (pool / pool.sum(1, keepdims=True)).astype(np.float32)


def maps(frames: np.ndarray) -> np.ndarray:
    """(2 * GRID**2,) features of (F, H, W, 3) frames: mean and deviation over time of the contrast to the ground.

    The square root of the contrast is pooled, so that a faint floor counts beside a bright body.
    """
    ground = np.median(frames[::3, ::2, ::2].reshape(-1, 3), axis=0).astype(np.float32)
    contrast = np.abs(frames.astype(np.float32) - ground).max(-1)
    contrast = np.sqrt(contrast / max(float(np.percentile(contrast[::2], 99.5)), 24.0))
    rows, cols = _pooling(frames.shape[1]), _pooling(frames.shape[2])
    cells = np.einsum("gh,fhw,kw->fgk", rows, contrast, cols, optimize=True)
    return np.concatenate([cells.mean(0).ravel(), 2 * cells.std(0).ravel()])


@lru_cache(maxsize=1)
def _fitted() -> tuple[np.ndarray, np.ndarray]:
    """(weights, bias) of the ridge regression to LAYOUTS and, last, everything on an open stage."""
    rng = np.random.Generator(np.random.Philox(key=[FIT_SEED, 0]))
    features, labels = [], []
    for kind in KINDS:
        for i in range(FIT_CLIPS):
            scene, _ = stream_item(FIT_SEED, i, kinds=(kind,))
            frames = render(scene, size=32, fps=8, num_frames=17, sample_rate=1000).clip.frames
            noise = rng.normal(0, rng.uniform(0, 10), frames.shape)
            features.append(maps((frames + noise).clip(0, 255)))
            labels.append(LAYOUTS.index(kind) if kind in LAYOUTS else len(LAYOUTS))
    x, y = np.array(features), np.eye(len(LAYOUTS) + 1)[labels]
    mean, target = x.mean(0), y.mean(0)
    x, y = x - mean, y - target
    weights = x.T @ np.linalg.solve(x @ x.T + PENALTY * np.eye(len(x)), y)
    return weights, target - mean @ weights


def _is_body(body: Body | None, seen: float, margin: float) -> bool:
    """Large enough, seen in this share of the frames, and for the most part this far from both sides."""
    if body is None or body.radius < 0.6 * min(SIZES.values()) or np.isfinite(body.x).mean() < seen:
        return False
    return margin <= float(np.nanmedian(body.x)) <= 1 - margin


def look(frames: np.ndarray) -> str:
    """The kind that (F, H, W, 3) frames show.

    The kinds with a layout of their own are told by the regression. On an open stage: no body is an off-screen sound,
    no floor a silent mover, and over a floor a body that moves up and down bounces and one that does not rolls;
    different colours in the two halves are a duet.
    """
    weights, bias = _fitted()
    best = int(np.argmax(maps(frames) @ weights + bias))
    if best < len(LAYOUTS):
        return LAYOUTS[best]
    halves = [np.ascontiguousarray(half) for half in np.array_split(frames, 2, axis=2)]
    if all(_is_body(follow(half, "bounce"), 0.9, 0.2) and has_floor(half) for half in halves):
        left, right = (colour_name(tone(half, "bounce")) for half in halves)
        if left != right:
            return "duet"
    body = follow(frames, "bounce")
    if not _is_body(body, 0.4, 0.0):
        return "offscreen"
    if not has_floor(frames):
        return "silent"
    return "bounce" if np.nanpercentile(body.y, 90) - np.nanpercentile(body.y, 5) > 0.1 else "roll"
