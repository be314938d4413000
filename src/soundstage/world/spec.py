"""What a clip of the world shows and sounds like: the structured scene and how scenes are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "orange": (245, 140, 25),
    "yellow": (245, 225, 50),
    "green": (50, 200, 70),
    "cyan": (60, 215, 225),
    "blue": (55, 90, 245),
    "purple": (175, 70, 230),
    "white": (235, 235, 235),
}
SIZES: dict[str, float] = {"small": 5 / 64, "medium": 7 / 64, "large": 10 / 64}  # radius / frame height
SHAPES = ("disc", "square", "triangle")
DRUMS = ("kick", "snare", "hat", "tom")
VOWELS = ("ah", "ee", "oo")
SIDES = ("left", "right")
ENGINE_TRENDS = ("idle", "rev", "brake")
ROLL_TRENDS = ("start", "stop", "back")


@dataclass(frozen=True)
class Material:
    """How a struck body of this material sounds and bounces.

    stiffness: f0 [Hz] times radius [fraction of the frame height], so that f0 = stiffness / radius.
    ratios, levels, decays: damped modes (frequency / f0, relative level, time constant in seconds).
    restitution: speed after / speed before an impact.
    """

    stiffness: float
    ratios: tuple[float, ...]
    levels: tuple[float, ...]
    decays: tuple[float, ...]
    restitution: float


MATERIALS: dict[str, Material] = {
    "metal": Material(900 * 7 / 64, (1.0, 2.76, 5.40), (1.0, 0.5, 0.25), (0.11, 0.08, 0.05), 0.82),
    "wood": Material(480 * 7 / 64, (1.0, 2.57, 4.1), (1.0, 0.35, 0.2), (0.035, 0.02, 0.012), 0.74),
    "glass": Material(1650 * 7 / 64, (1.0, 2.32, 4.25), (1.0, 0.4, 0.2), (0.08, 0.05, 0.03), 0.78),
    "rubber": Material(230 * 7 / 64, (1.0, 2.0), (1.0, 0.2), (0.05, 0.02), 0.88),
}


@dataclass(frozen=True)
class Scene:
    """Everything a caption names, and the seed of everything it does not (start, phase, background).

    A field is None where the kind has no such thing. `bpm` is beats per minute, `count` the number of impacts,
    keys or knocks inside the clip, `pattern` the drums or vowels in order, `trend` the course of an engine or a
    rolling ball, `side` a typing hand or a rolling direction, `other` the second body of a duet.
    """

    kind: str
    seed: int = 0
    colour: str | None = None
    size: str | None = None
    material: str | None = None
    shape: str | None = None
    count: int | None = None
    bpm: int | None = None
    pattern: tuple[str, ...] | None = None
    trend: str | None = None
    side: str | None = None
    other: Scene | None = None

    @property
    def fields(self) -> dict[str, object]:
        """The named fields that are set: what a caption of this scene must say."""
        named = {k: v for k, v in vars(self).items() if k != "seed" and v is not None}
        return named if self.other is None else named | {"other": self.other.fields}

    @property
    def radius(self) -> float:
        """Radius as a fraction of the frame height; medium where no size is named."""
        return SIZES[self.size or "medium"]


def pitch(material: str, size: str | None = None) -> float:
    """Fundamental in Hz of a struck body: f0 = stiffness / radius."""
    return MATERIALS[material].stiffness / SIZES[size or "medium"]


# Which fields each kind has, with the values drawn for them. Drums and vowels are drawn as sequences.
CHOICES: dict[str, dict[str, Sequence[object]]] = {
    "bounce": {
        "colour": tuple(COLOURS),
        "size": tuple(SIZES),
        "material": tuple(MATERIALS),
        "shape": SHAPES,
        "count": (1, 2, 3, 4, 5),
    },
    "metronome": {
        "colour": tuple(COLOURS),
        "size": tuple(SIZES),
        "material": tuple(MATERIALS),
        "bpm": tuple(range(40, 241, 10)),
    },
    "drums": {"colour": tuple(COLOURS), "bpm": tuple(range(100, 241, 20))},
    "engine": {"colour": tuple(COLOURS), "size": tuple(SIZES), "trend": ENGINE_TRENDS},
    "typing": {"colour": tuple(COLOURS), "material": tuple(MATERIALS), "count": (3, 4, 5, 6, 7, 8), "side": SIDES},
    "talker": {"colour": tuple(COLOURS), "size": tuple(SIZES)},
    "roll": {
        "colour": tuple(COLOURS),
        "size": tuple(SIZES),
        "material": tuple(MATERIALS),
        "trend": ROLL_TRENDS,
        "side": SIDES,
    },
    "silent": {"colour": tuple(COLOURS), "size": tuple(SIZES), "shape": SHAPES},
    "offscreen": {"material": tuple(MATERIALS), "count": (1, 2, 3, 4, 5)},
}
KINDS = tuple(CHOICES)
EXTRA_KINDS = ("duet",)  # drawn only when asked for
HOLDOUT_KINDS = ("bounce", "metronome", "roll")


def is_held_out(scene: Scene) -> bool:
    """True for the 12 of 96 (material, size, colour) cells that training never sees.

    Each (material, size) misses exactly one colour, and each colour is missing somewhere.
    """
    if scene.material is None or scene.size is None or scene.colour is None:
        return False
    cell = tuple(COLOURS).index(scene.colour) + 3 * tuple(SIZES).index(scene.size)
    return (cell + 2 * tuple(MATERIALS).index(scene.material)) % 8 == 3


def _sequence(rng: np.random.Generator, words: Sequence[str], length: int) -> tuple[str, ...]:
    """`length` words, at least two of them different."""
    while True:
        drawn = tuple(words[i] for i in rng.integers(len(words), size=length))
        if len(set(drawn)) > 1:
            return drawn


def _draw(rng: np.random.Generator, kind: str) -> Scene:
    if kind == "duet":
        return _draw_duet(rng)
    named: dict[str, object] = {k: v[int(rng.integers(len(v)))] for k, v in CHOICES[kind].items()}
    if kind == "drums":
        named["pattern"] = _sequence(rng, DRUMS, 4)
    if kind == "talker":
        named["pattern"] = _sequence(rng, VOWELS, int(rng.integers(2, 5)))
    return Scene(kind=kind, seed=int(rng.integers(2**31)), **named)  # type: ignore[arg-type]


def _draw_duet(rng: np.random.Generator) -> Scene:
    """Two bouncing bodies of different colours, at least four semitones apart, with at most three impacts each."""
    while True:
        first, second = (_draw(rng, "bounce") for _ in range(2))
        apart = abs(np.log2(pitch(first.material, first.size) / pitch(second.material, second.size)))
        if first.colour != second.colour and apart > 1 / 3 and max(first.count, second.count) <= 3:
            return replace(first, kind="duet", other=second)


def sample_scene(rng: np.random.Generator, *, kinds: Sequence[str] | None = None, holdout: bool = False) -> Scene:
    """Draw a scene; with `holdout` only from the held-out cells, otherwise never from them.

    kinds: names to choose from evenly (default: KINDS; with `holdout` those that have cells).
    """
    names = tuple(kinds) if kinds is not None else (HOLDOUT_KINDS if holdout else KINDS)
    allowed = HOLDOUT_KINDS if holdout else KINDS + EXTRA_KINDS
    for name in names:
        if name not in allowed:
            why = " (only these have a material, a size and a colour to hold out)" if holdout else ""
            raise ValueError(f"kinds: {name!r} is not one of {', '.join(allowed)}{why}")
    kind = names[int(rng.integers(len(names)))]
    while True:
        scene = _draw(rng, kind)
        if is_held_out(scene) == holdout and (scene.other is None or not is_held_out(scene.other)):
            return scene
