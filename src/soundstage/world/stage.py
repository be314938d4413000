"""The stage a clip is rendered on: anti-aliased drawing on all frames at once, the sound mixer, and the record."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from soundstage.world.sound import Mixer
from soundstage.world.spec import COLOURS

FLOOR = 0.86  # height of the floor's upper edge, as a fraction of the frame from the top


@dataclass(frozen=True)
class Event:
    """One audible and visible instant. t in seconds (continuous); x, y as fractions of the frame; f0 in Hz or 0."""

    t: float
    kind: str
    source: str
    amp: float
    f0: float
    x: float
    y: float


@dataclass(frozen=True, eq=False)
class Track:
    """Where a source is at each frame: (F,) arrays; x, y, radius as fractions of the frame, angle in radians."""

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    radius: np.ndarray


@dataclass(frozen=True, eq=False)
class Envelope:
    """A continuous quantity sampled every millisecond: t in seconds, value in the unit its name says."""

    t: np.ndarray
    value: np.ndarray


class Stage:
    """Canvas, mixer and record of one clip. Positions are fractions of the frame, y downwards."""

    def __init__(
        self, seed: int, size: int, fps: Fraction, num_frames: int, sample_rate: int, num_samples: int
    ) -> None:
        self.rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        self.size = size
        self.duration = num_frames / float(fps)
        self.t = np.arange(num_frames) / float(fps)
        self.mixer = Mixer(num_samples, sample_rate)
        self.events: list[Event] = []
        self.tracks: dict[str, Track] = {}
        self.envelopes: dict[str, Envelope] = {}
        tint = self.rng.uniform(16, 40, 3) * 0.4 + self.rng.uniform(16, 34) * 0.6
        self.background = tint.astype(np.float32)
        self.canvas = np.empty((num_frames, size, size, 3), np.float32)
        self.canvas[:] = self.background

    def event(self, t: float, kind: str, source: str, amp: float, f0: float, x: float, y: float) -> None:
        """Record one event."""
        self.events.append(Event(float(t), kind, source, float(amp), float(f0), float(x), float(y)))

    def track(
        self, name: str, x: np.ndarray | float, y: np.ndarray | float, radius: float, angle: np.ndarray | float = 0.0
    ) -> None:
        """Record the pose of a source at every frame."""
        full = [np.broadcast_to(np.asarray(v, float), self.t.shape).copy() for v in (x, y, angle, radius)]
        self.tracks[name] = Track(self.t, *full)

    def floor(self) -> None:
        """A lighter band from FLOOR to the bottom edge."""
        self.box(0.5, (FLOOR + 1.02) / 2, 0.52, (1.02 - FLOOR) / 2, self.background * 1.5 + 28)

    def paint(
        self,
        x: np.ndarray | float,
        y: np.ndarray | float,
        reach: float,
        colour: np.ndarray,
        shape: str,
        half: tuple[float, ...] = (),
        alpha: np.ndarray | float = 1.0,
        angle: np.ndarray | float = 0.0,
    ) -> None:
        """Blend a shape at (x, y), (F,) or scalar, into every frame with one pixel of smooth coverage.

        reach: radius of the disc, ellipse or triangle, or a bound on the extent of a box, as fractions.
        """
        n, num = self.size, len(self.t)
        px, py = (np.broadcast_to(np.asarray(v, np.float32) * n, num)[:, None, None] for v in (x, y))
        extent = reach * n + 2
        x0, x1 = _span(px, extent, n)
        y0, y1 = _span(py, extent, n)
        if x0 >= x1 or y0 >= y1:
            return
        dx = np.arange(x0, x1, dtype=np.float32)[None, None, :] + np.float32(0.5) - px
        dy = np.arange(y0, y1, dtype=np.float32)[None, :, None] + np.float32(0.5) - py
        if np.any(angle):
            turn = np.broadcast_to(np.asarray(angle, np.float32), num)[:, None, None]
            dx, dy = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        cover = _distance(shape, dx, dy, reach * n, tuple(np.asarray(h) * n for h in half))
        cover = (
            np.clip(np.float32(0.5) - cover, 0, 1) * np.broadcast_to(np.asarray(alpha, np.float32), num)[:, None, None]
        )
        area = self.canvas[:, y0:y1, x0:x1]
        tone = np.asarray(colour, np.float32).reshape(-1, 1, 1, 3)
        area += cover[..., None] * (tone - area)

    def disc(
        self,
        x: np.ndarray | float,
        y: np.ndarray | float,
        radius: float,
        colour: np.ndarray,
        alpha: np.ndarray | float = 1.0,
    ) -> None:
        """A filled disc."""
        self.paint(x, y, radius, colour, "disc", alpha=alpha)

    def box(
        self,
        x: np.ndarray | float,
        y: np.ndarray | float,
        half_width: float,
        half_height: float,
        colour: np.ndarray,
        alpha: np.ndarray | float = 1.0,
        angle: np.ndarray | float = 0.0,
    ) -> None:
        """A filled box, turned by `angle` radians."""
        reach = float(np.hypot(half_width, half_height))
        self.paint(x, y, reach, colour, "box", (half_width, half_height), alpha, angle)

    def ellipse(self, x: float, y: float, half_width: np.ndarray, half_height: np.ndarray, colour: np.ndarray) -> None:
        """A filled ellipse whose half axes are (F,) arrays."""
        num = len(self.t)
        axes = tuple(np.broadcast_to(np.asarray(a, np.float32), num)[:, None, None] for a in (half_width, half_height))
        self.paint(x, y, float(max(np.max(half_width), np.max(half_height))), colour, "ellipse", axes)

    def body(
        self,
        x: np.ndarray | float,
        y: np.ndarray | float,
        radius: float,
        colour: str,
        material: str | None,
        shape: str = "disc",
    ) -> None:
        """A coloured body of the area of a disc of `radius`, shaded so that its material can be seen."""
        tone = rgb(colour) * (0.86 if material == "metal" else 1.0)
        if shape == "square":
            self.box(x, y, SQUARE * radius, SQUARE * radius, tone)
        elif shape == "triangle":
            self.paint(x, y, 2 * TRIANGLE * radius, tone, "triangle")
        else:
            self.disc(x, y, radius, tone)
        if material == "metal":
            self.disc(x - 0.28 * radius, y - 0.28 * radius * (shape != "triangle"), 0.26 * radius, HIGHLIGHT)
        elif material == "glass":
            self.disc(x, y, 0.52 * radius, tone * 0.45)
        elif material == "wood":
            for offset in (-0.3, 0.3):
                self.box(x, y + offset * radius, 0.45 * radius, 0.11 * radius, tone * 0.5)


HIGHLIGHT = np.full(3, 255, np.float32)
SQUARE = float(np.sqrt(np.pi) / 2)  # half side of the square with the area of the unit disc
TRIANGLE = float(np.sqrt(np.pi / np.sqrt(27)))  # inradius of the equilateral triangle with that area
BOTTOM = {"disc": 1.0, "square": SQUARE, "triangle": TRIANGLE}  # centre to lowest point / radius


def rgb(colour: str) -> np.ndarray:
    """(3,) float32 in [0, 255]."""
    return np.array(COLOURS[colour], np.float32)


def _span(centre: np.ndarray, extent: float, n: int) -> tuple[int, int]:
    return max(0, int(np.floor(centre.min() - extent))), min(n, int(np.ceil(centre.max() + extent)))


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, reach: float, half: tuple[np.ndarray, ...]) -> np.ndarray:
    """Signed distance in pixels to the shape's edge, negative inside."""
    if shape == "disc":
        return np.sqrt(dx * dx + dy * dy) - np.float32(reach)
    if shape == "box":
        return np.maximum(np.abs(dx) - np.float32(half[0]), np.abs(dy) - np.float32(half[1]))
    if shape == "triangle":
        side = np.float32(np.sqrt(3) / 2) * np.abs(dx) - np.float32(0.5) * dy
        return np.maximum(side, dy) - np.float32(reach / 2)
    a, b = np.maximum(half[0], 0.05), np.maximum(half[1], 0.05)
    level = np.sqrt((dx / a) ** 2 + (dy / b) ** 2)
    slope = np.sqrt((dx / a**2) ** 2 + (dy / b**2) ** 2) / np.maximum(level, 1e-3)
    return (level - 1) / np.maximum(slope, 1e-3)
