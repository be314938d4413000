"""What a picture says by itself: ground, colour, and where and how large the body is in each frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from soundstage.world.kinds.drums import PAD_HALF, PAD_X, PAD_Y
from soundstage.world.kinds.typing import COLUMNS, KEY_HALF, ROWS, key_centre
from soundstage.world.spec import COLOURS, SHAPES, SIZES
from soundstage.world.stage import SQUARE, TRIANGLE

PADS = tuple((x, PAD_Y, *PAD_HALF) for x in PAD_X)
KEYS = tuple((*key_centre(column, row), KEY_HALF, KEY_HALF) for column in range(COLUMNS) for row in range(ROWS))
# Part of the frame that holds the named colour: bodies above the metronome's foot, otherwise everything.
LOWEST = {"metronome": 0.78}
MARKED = ("roll", "metronome")
BODY_SCALE = {"engine": 2.0, "talker": 2.2}


@dataclass(frozen=True, eq=False)
class Body:
    """A body followed through the clip: (F,) arrays as fractions of the frame, nan where it is not seen.

    inside: (F, H, W) float32, how much of each pixel has the body's tone (0 ground, 1 body).
    """

    x: np.ndarray
    y: np.ndarray
    radius: float
    shape: str
    inside: np.ndarray


def ground(frames: np.ndarray, kind: str) -> np.ndarray:
    """(1, H, 1, 3) float32: the colour of each row of the background, seen past what moves, or beside what fills it."""
    rim = max(2, round(0.1 * frames.shape[2]))
    seen = np.concatenate([frames[:, :, :rim], frames[:, :, -rim:]], 2) if kind in BODY_SCALE else frames[::2, :, ::2]
    rows = seen.swapaxes(0, 1).reshape(frames.shape[1], -1, 3)
    return np.median(rows, axis=1).astype(np.float32)[None, :, None]


def has_floor(frames: np.ndarray) -> bool:
    """True where the bottom of the picture is a lighter band."""
    height, luma = frames.shape[1], ground(frames, "bounce").mean((0, 2, 3))
    below, above = luma[round(0.9 * height) :], luma[round(0.68 * height) : round(0.82 * height)]
    return float(np.median(below) - np.median(above)) > 12


def patch(frames: np.ndarray, box: tuple[float, float, float, float], shrink: float = 0.7) -> np.ndarray:
    """(F, h, w, 3) pixels inside a box (x, y, half width, half height), all as fractions of the frame."""
    height, width = frames.shape[1:3]
    x, y, half_w, half_h = box
    y0, y1 = round((y - shrink * half_h) * height), round((y + shrink * half_h) * height)
    x0, x1 = round((x - shrink * half_w) * width), round((x + shrink * half_w) * width)
    return frames[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def tone(frames: np.ndarray, kind: str) -> np.ndarray:
    """(3,) float32: the colour of the named thing, as seen."""
    if kind in ("drums", "typing"):
        boxes = PADS if kind == "drums" else KEYS
        pixels = np.concatenate([patch(frames, box).reshape(-1, 3) for box in boxes]).astype(np.float32)
        return pixels.mean(0)
    seen = frames[:, : round(LOWEST.get(kind, 1.0) * frames.shape[1])].astype(np.float32)
    contrast = np.abs(seen - ground(frames, kind)[:, : seen.shape[1]]).max(-1)
    peak = np.percentile(contrast, 99.5)
    pixels = seen[contrast > 0.55 * peak]
    return np.median(pixels, axis=0) if len(pixels) else np.zeros(3, np.float32)


def colour_name(rgb: np.ndarray) -> str | None:
    """The nearest named colour of the same chroma; None where it is too dark to tell."""
    if rgb.max() < 25:
        return None
    chroma = rgb / rgb.max()
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names], float)
    table /= table.max(1, keepdims=True)
    return names[int(np.argmin(((table - chroma) ** 2).sum(1)))]


def _fill(inside: np.ndarray) -> np.ndarray:
    """Fill holes (shading, marks) row by row: a pixel counts as much as the most covered ones on both its sides."""
    left = np.maximum.accumulate(inside, axis=2)
    right = np.maximum.accumulate(inside[:, :, ::-1], axis=2)[:, :, ::-1]
    return np.minimum(left, right)


def _centroid(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(area in pixels, x, y in pixels) of (F, H, W) weights."""
    cols, rows = weight.sum(1), weight.sum(2)
    area = cols.sum(1)
    safe = np.maximum(area, 1e-6)
    x = cols @ (np.arange(weight.shape[2]) + 0.5) / safe
    y = rows @ (np.arange(weight.shape[1]) + 0.5) / safe
    return area, x, y


def follow(frames: np.ndarray, kind: str) -> Body | None:
    """Find the body in each frame by its tone, with a sub-pixel centroid; None where nothing stands out.

    Fewer than five frames show no motion, and have no body either.
    """
    if len(frames) < 5:
        return None
    height, width = frames.shape[1:3]
    base, colour = ground(frames, kind), tone(frames, kind)
    way = colour - np.median(base.reshape(-1, 3), axis=0)
    if np.linalg.norm(way) < 40:
        return None
    inside = np.clip((frames.astype(np.float32) - base) @ (way / (way @ way)).astype(np.float32), 0, 1)
    inside = np.where(inside < 0.16, np.float32(0), inside)
    if kind in LOWEST:
        inside[:, round(LOWEST[kind] * height) :] = 0
    solid = inside * (inside > 0.5)
    area, x, y = _centroid(solid)
    typical = float(np.median(area))
    if typical < 4:
        return None
    across, down = np.arange(width) + 0.5, np.arange(height) + 0.5
    for spread in (3.0, 1.7, 1.45):
        reach = spread * np.sqrt(typical / np.pi) + 1.5
        near = (np.abs(across - x[:, None]) < reach)[:, None, :] & (np.abs(down - y[:, None]) < reach)[:, :, None]
        local = np.where(near, _fill(np.where(near, inside, 0)), 0)
        area, x, y = _centroid(local)
        if area.max() < 4:
            return None
        typical = float(np.median(area[area > 0.25 * area.max()]))
    lost = area < 0.35 * typical
    if kind in MARKED:
        x, y, typical = _outline(local, ~lost)
        lost |= (x < 0) | (y < 0)
    if lost.all() or typical < 1:
        return None
    radius = float(np.sqrt(typical / np.pi))
    shape = _shape(local[~lost], x[~lost], y[~lost], radius)
    return Body(np.where(lost, np.nan, x / width), np.where(lost, np.nan, y / height), radius / height, shape, inside)


def _outline(local: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(x, y in pixels, area) of a disc from its outline, which marks and rods inside do not change.

    The centre on each axis is the median of the middles of its chords; the radius is half of its shadow.
    """
    wide = float(np.median(local[seen].max(1).sum(1)))
    return _middle(local, wide), _middle(local.swapaxes(1, 2), wide), float(np.pi * (wide / 2) ** 2)


def _middle(local: np.ndarray, wide: float) -> np.ndarray:
    """(F,) median over rows of the middle between the outermost half-levels, in pixels; nan where there are none."""
    solid = local >= 0.5
    first = np.argmax(solid, 2)
    last = local.shape[2] - 1 - np.argmax(solid[:, :, ::-1], 2)
    ends = []
    for at, step in ((first, -1), (last, 1)):
        inner = np.take_along_axis(local, at[..., None], 2)[..., 0]
        outer = np.take_along_axis(local, np.clip(at + step, 0, local.shape[2] - 1)[..., None], 2)[..., 0]
        ends.append(at + 0.5 + step * (inner - 0.5) / np.maximum(inner - outer, 0.05))
    length = ends[1] - ends[0]
    middle = np.where(solid.any(2) & (length > 0.75 * wide), (ends[0] + ends[1]) / 2, np.nan)
    middle[~np.isfinite(middle).any(1), 0] = -1.0
    return np.nanmedian(middle, axis=1)


def _shape(local: np.ndarray, x: np.ndarray, y: np.ndarray, radius: float) -> str:
    """The shape whose outline is nearest to the mean of all frames, laid on each other by centre and radius.

    x, y in pixels, radius in pixels (of the disc of the same area).
    """
    grid = np.linspace(-1.7, 1.7, 21)
    rows = np.clip(y[:, None] + grid * radius - 0.5, 0, local.shape[1] - 1.001)
    cols = np.clip(x[:, None] + grid * radius - 0.5, 0, local.shape[2] - 1.001)
    r, c, n = rows.astype(int), cols.astype(int), np.arange(len(local))[:, None, None]
    fr, fc = (rows - r)[:, :, None], (cols - c)[:, None, :]
    r, c = r[:, :, None], c[:, None, :]
    top = local[n, r, c] * (1 - fc) + local[n, r, c + 1] * fc
    low = local[n, r + 1, c] * (1 - fc) + local[n, r + 1, c + 1] * fc
    mean = (top * (1 - fr) + low * fr).mean(0)
    mean = mean - mean.mean()
    best = {shape: max(float((mean * t).sum()) for t in _templates(shape, round(1.2 / radius, 1))) for shape in SHAPES}
    return max(SHAPES, key=best.__getitem__)


@lru_cache(maxsize=64)
def _templates(shape: str, pixel: float) -> tuple[np.ndarray, ...]:
    """Normalised templates of a shape, sharp to blurred and a little smaller: `pixel` is the sharpest edge's width."""
    made = []
    for soft in (pixel, 2 * pixel, 3.5 * pixel):
        for scale in (0.85, 0.92, 1.0):
            cover = _template(shape, np.linspace(-1.7, 1.7, 21) / scale, soft)
            made.append((cover - cover.mean()) / cover.std())
    return tuple(made)


def _template(shape: str, grid: np.ndarray, soft: float) -> np.ndarray:
    """Coverage of the shape of the unit disc's area on grid x grid, with an edge `soft` wide."""
    across, down = grid[None, :], grid[:, None]
    edge = {
        "disc": np.hypot(across, down) - 1,
        "square": np.maximum(np.abs(across), np.abs(down)) - SQUARE,
        "triangle": np.maximum(np.sqrt(0.75) * np.abs(across) - 0.5 * down, down) - TRIANGLE,
    }[shape]
    return np.clip(0.5 - edge / soft, 0, 1)


def size_name(radius: float, kind: str) -> str:
    """The nearest named size by ratio."""
    names = list(SIZES)
    ratios = np.abs(np.log([radius / BODY_SCALE.get(kind, 1.0) / SIZES[name] for name in names]))
    return names[int(np.argmin(ratios))]
