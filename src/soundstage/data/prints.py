"""Fingerprints that survive re-encoding, scaling, small crops and shifts.

Of pictures, by their low frequencies and colours; of sound, by how its bands rise and fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["PICTURES", "SOUNDS", "Print", "picture_prints", "sound_prints"]

PICTURES, SOUNDS = 4, 10  # prints a second
BITS, PITCHES = 64, 17
REACH = 3.0  # seconds by which one may begin later than the other
FLAT = 4.0  # standard deviation, of 255, below which a picture has no print


@dataclass(frozen=True, eq=False)
class Print:
    """Of one clip. pictures: (N,) uint64, 0 where nothing is seen. colours: (N, 12) uint8, mean RGB of quarters.

    sounds: (M,) uint16, 0 where nothing is heard. Prints follow each other PICTURES and SOUNDS times a second.
    """

    pictures: np.ndarray
    colours: np.ndarray
    sounds: np.ndarray

    @classmethod
    def of_facts(cls, facts: dict[str, str]) -> Print:
        """From the fact "hash"."""
        pictures = np.frombuffer(bytes.fromhex(facts.get("picture", "")), ">u8")
        colours = np.frombuffer(bytes.fromhex(facts.get("colours", "")), np.uint8).reshape(-1, 12)
        return cls(pictures, colours, np.frombuffer(bytes.fromhex(facts.get("sound", "")), ">u2"))

    def facts(self) -> dict[str, str]:
        """As the fact "hash": hexadecimal text."""
        return {
            "picture": self.pictures.astype(">u8").tobytes().hex(),
            "colours": self.colours.tobytes().hex(),
            "sound": self.sounds.astype(">u2").tobytes().hex(),
        }

    def distance(self, other: Print) -> tuple[float, float]:
        """(picture, sound): shares of bits that differ where both say something, at the best shift; nan for nothing.

        Of sound the shares are taken at all shifts, of pictures within REACH; half of the shorter clip must overlap.
        """
        return (
            _aligned(self.pictures, other.pictures, round(REACH * PICTURES), self.colours, other.colours),
            _aligned(self.sounds, other.sounds, round(REACH * SOUNDS)),
        )


def picture_prints(cells: np.ndarray, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, h, w) brightness and (N, 9, 16, 3) colours -> (N,) uint64 prints and (N, 12) uint8 colours of quarters.

    A bit says whether one of 64 low frequencies of the cosine transform lies above their median.
    """
    down, along = (_cosines(side) for side in cells.shape[1:])
    waves = (down @ cells @ along.T).reshape(len(cells), BITS)
    bits = waves > np.median(waves, axis=1, keepdims=True)
    prints = np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)
    prints[cells.std(axis=(1, 2)) < FLAT] = 0
    halves = [rgb[:, rows, columns].mean(axis=(1, 2)) for rows in (slice(0, 4), slice(5, 9)) for columns in SIDES]
    return prints, np.rint(np.concatenate(halves, axis=1)).astype(np.uint8)


def sound_prints(power: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """(T, bins) of data.sound.spectrogram over `seconds` -> (10 a second,) uint16, 0 where it is silent.

    A bit says whether, from one tenth of a second to the next, a band gained on the band above it; 17 bands of equal
    ratio from 200 to 3400 Hz (J. Haitsma and T. Kalker, 2002, with fewer and longer steps).
    """
    size = 2 * (power.shape[1] - 1)
    edges = np.maximum(1, np.rint(200 * 17 ** (np.arange(PITCHES + 1) / PITCHES) * size / rate)).astype(int)
    edges = np.minimum(np.maximum.accumulate(edges), power.shape[1] - 2)
    total = np.concatenate([np.zeros((1, power.shape[1])), np.cumsum(power, axis=0, dtype=np.float64)])
    count = max(1, round(seconds * SOUNDS))
    middle = (np.arange(count + 1) - 0.5) * len(power) / count
    reach = max(1.0, 0.18 * len(power) / max(seconds, 1e-6))
    low, high = (np.clip(np.rint(middle + way * reach), 0, len(power)).astype(int) for way in (-1, 1))
    mean = (total[high] - total[low]) / np.maximum(high - low, 1)[:, None]
    bands = np.add.reduceat(mean, edges, axis=1)[:, :PITCHES]
    level = np.log10(bands + 1e-9)
    slope = level[:, :-1] - level[:, 1:]
    prints = np.packbits(slope[1:] > slope[:-1], axis=1).view(">u2")[:, 0].astype(np.uint16)
    loud = bands.sum(axis=1)
    prints[np.minimum(loud[1:], loud[:-1]) < 1e-7] = 0
    return prints


def _aligned(
    a: np.ndarray, b: np.ndarray, reach: int, colours_a: np.ndarray | None = None, colours_b: np.ndarray | None = None
) -> float:
    best = float("nan")
    size = 8 * a.dtype.itemsize
    for shift in range(-reach, reach + 1):
        first, second = slice(max(0, shift), None), slice(max(0, -shift), None)
        length = min(len(a[first]), len(b[second]))
        if length < max(2, min(len(a), len(b)) / 2):
            continue
        x, y = a[first][:length], b[second][:length]
        both = (x != 0) & (y != 0)
        if both.sum() < max(2, 0.3 * ((x != 0) | (y != 0)).sum()):
            continue
        found = float(np.bitwise_count(x[both] ^ y[both]).mean()) / size
        if colours_a is not None and colours_b is not None:
            tint = np.abs(colours_a[first][:length].astype(float) - colours_b[second][:length])[both]
            found += float(tint.mean()) / 64  # the low frequencies do not see colour
        best = found if not best <= found else best
    return best


SIDES = (slice(0, 8), slice(8, 16))


@lru_cache(maxsize=16)
def _cosines(side: int) -> np.ndarray:
    """(8, side) cosines of 1 to 8 half waves."""
    places = (np.arange(side) + 0.5) / side
    return (np.cos(np.pi * np.arange(1, 9)[:, None] * places) / side).astype(np.float32)
