"""Raw films for runs that are disturbed: small ones with sound, a known few of them broken in the ways of the wild."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from soundstage.data.flow import Item
from soundstage.data.gates import LIMITS, Gate
from soundstage.data.scan import Scan
from soundstage.data.shards import Pack
from soundstage.data.views import Views
from soundstage.media.clip import Clip
from soundstage.testing.kills import Case

__all__ = ["BROKEN", "films", "raw_films"]

EVERY = 20
"""One film of so many is broken."""
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda film: film[: len(film) * 2 // 3],
    "empty": lambda _: b"",
    "wrong header": lambda film: b"RIFF\0\0\0\0" + film[8:],
    "fake extension": lambda _: b"<!DOCTYPE html><title>Please wait</title>" + b" " * 4000,
}
KEPT = ("black", "frozen", "pausing", "silent")
"""Limits that small films of two seconds meet or not by chance."""


def raw_films(folder: Path, count: int, distinct: int = 40) -> dict[int, str]:
    """Write NNNN.mp4, copies of `distinct` different ones; of `count` films, which are broken and how."""
    folder.mkdir(parents=True)
    whole = []
    for seed in range(min(distinct, count)):
        path = _clip(seed).save(folder / "0000.mp4")
        whole.append(path.read_bytes())
    broken = {n: list(BROKEN)[n // EVERY % len(BROKEN)] for n in range(EVERY // 2, count, EVERY)}
    for n in range(count):
        film = whole[n % len(whole)]
        (folder / f"{n:04}.mp4").write_bytes(BROKEN[broken[n]](film) if n in broken else film)
    return broken


def _clip(seed: int) -> Clip:
    """Two seconds of a square that wanders over a slope, and of a tone that swells and dies away."""
    rng, times = np.random.default_rng(seed), np.arange(32_000) / 16_000
    slope = np.linspace(40, 200, 32).astype(np.uint8)
    frames = np.broadcast_to(slope[None, None, :, None], (33, 32, 32, 3)).copy()
    lefts = np.cumsum(rng.integers(-2, 3, 33)).clip(0, 22)
    for frame, left in zip(frames, lefts, strict=True):
        frame[8:18, left : left + 10] = rng.integers(0, 256, 3)
    tone = np.sin(2 * np.pi * rng.uniform(200, 2000) * times) * (
        0.3 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 4) * times)
    )
    return Clip(frames=frames, fps=Fraction(16), wave=tone[None].astype(np.float32), sample_rate=16_000)


def films(folder: Path, count: int) -> Case:
    """Films measured, judged, encoded anew, and packed into shards of twelve, by the stages of real ones."""
    broken = raw_films(folder, count)
    stages = {
        "scan": Scan(),
        "gate": Gate({reason: limit for reason, limit in LIMITS.items() if reason in KEPT}),
        "views": Views(sizes=((32, 32),), fps="16", sample_rate=16_000, channels=1, loudness=None),
        "pack": Pack(num=12),
    }
    items = [Item({"media": folder / f"{n:04}.mp4"}, {"n": n, "licence": "CC0-1.0"}) for n in range(count)]
    return Case(stages, items, frozenset(broken))
