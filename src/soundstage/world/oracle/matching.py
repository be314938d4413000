"""Matching of visual events with sound onsets, in milliseconds and as precision and recall."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOLERANCES_MS = (20, 45, 90, 125)


@dataclass(frozen=True, eq=False)
class Match:
    """One-to-one pairs of visual events and sound onsets; offset = onset - event, positive when sound is late.

    pairs: (P, 2) indices (visual, audio). offsets: (P,) seconds. times: (P,) seconds of the visual events.
    lag: seconds, the coarse shift at which the two trains agree best.
    """

    pairs: np.ndarray
    offsets: np.ndarray
    times: np.ndarray
    lag: float

    @property
    def median(self) -> float:
        """Signed median offset in seconds; nan without pairs."""
        return float(np.median(self.offsets)) if len(self.offsets) else float("nan")

    @property
    def spread(self) -> float:
        """Median absolute deviation of the offsets from their median, in seconds."""
        return float(np.median(np.abs(self.offsets - self.median))) if len(self.offsets) else float("nan")

    @property
    def drift(self) -> float:
        """Theil-Sen slope of offset against time, in seconds per second; nan with fewer than three pairs."""
        i, j = np.triu_indices(len(self.times), 1)
        apart = self.times[j] - self.times[i]
        rise = (self.offsets[j] - self.offsets[i])[apart > 0.02] / apart[apart > 0.02]
        return float(np.median(rise)) if len(rise) >= 3 else float("nan")


def coarse_lag(
    visual: np.ndarray, audio: np.ndarray, agree: np.ndarray, reach: float = 1.0, width: float = 0.02
) -> tuple[float, float]:
    """(lag in [-reach, reach] s at which most events meet an onset that agrees, how many); the smallest of equals."""
    delta = audio[None, :] - visual[:, None]
    lags = np.arange(-reach, reach + 0.001, 0.002)
    near = np.exp(-0.5 * ((delta[..., None] - lags) / width) ** 2) * agree[..., None]
    met = np.minimum(near.sum(1), 1).sum(0) - 0.25 * np.abs(lags)
    best = int(np.argmax(met))
    return float(lags[best]), float(met[best])


def pair(visual: np.ndarray, audio: np.ndarray, lag: float, gate: float) -> np.ndarray:
    """(P, 2) one-to-one pairs in order with |onset - event - lag| <= gate, most pairs first, then least distance."""
    num_v, num_a = len(visual), len(audio)
    cost = np.zeros((num_v + 1, num_a + 1))
    cost[:, 0], cost[0, :] = gate * np.arange(num_v + 1), gate * np.arange(num_a + 1)
    distance = np.abs(audio[None, :] - visual[:, None] - lag)
    for i in range(num_v):
        for j in range(num_a):
            meet = cost[i, j] + (distance[i, j] if distance[i, j] <= gate else np.inf)
            cost[i + 1, j + 1] = min(meet, cost[i, j + 1] + gate, cost[i + 1, j] + gate)
    pairs, i, j = [], num_v, num_a
    while i and j:
        if cost[i, j] == cost[i - 1, j] + gate:
            i -= 1
        elif cost[i, j] == cost[i, j - 1] + gate:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return np.array(pairs[::-1], int).reshape(-1, 2)


def match(
    visual: np.ndarray, audio: np.ndarray, *, agree: np.ndarray | None = None, gate: float = 0.25, reach: float = 1.0
) -> Match:
    """Align the trains coarsely by cross-correlation over +-reach s, then pair one to one within `gate` s.

    agree: (V, A) in [0, 1], how well a sound fits an event (drum and pad, key and pitch); it breaks the ties of
        periodic trains. Default: every sound fits.
    """
    visual, audio = np.asarray(visual, float), np.asarray(audio, float)
    if not len(visual) or not len(audio):
        return Match(np.zeros((0, 2), int), np.zeros(0), np.zeros(0), 0.0)
    agree = np.ones((len(visual), len(audio))) if agree is None else agree
    lag = coarse_lag(visual, audio, agree, reach)[0] if agree.any() else 0.0
    pairs = pair(visual, audio, lag, gate)
    return Match(pairs, audio[pairs[:, 1]] - visual[pairs[:, 0]], visual[pairs[:, 0]], lag)


def count_hits(
    visual: np.ndarray, audio: np.ndarray, tolerance: float, window: tuple[float, float]
) -> tuple[int, int, int]:
    """(hits, misses, hallucinations) at `tolerance` s, without any shift.

    Unpaired events outside `window` are not counted: at the edges of a clip one sense may lack what the other has.
    """
    pairs = pair(np.asarray(visual, float), np.asarray(audio, float), 0.0, tolerance)
    low, high = window
    lone = [np.delete(times, pairs[:, k]) for k, times in enumerate((np.asarray(visual), np.asarray(audio)))]
    misses, extras = (int(np.sum((times >= low) & (times <= high))) for times in lone)
    return len(pairs), misses, extras


def chance_f1(visual: np.ndarray, audio: np.ndarray, tolerance: float, duration: float) -> float:
    """Expected F1 if the same number of onsets fell uniformly at random on the clip.

    An onset hits with the covered fraction p of the clip; the expected number of distinct events hit by A onsets,
    each event covering p / V, is V (1 - (1 - p / V)^A).
    """
    num_v, num_a = len(visual), len(audio)
    if not num_v or not num_a:
        return 0.0
    covered = min(1.0, 2 * tolerance * num_v / duration)
    hits = num_v * (1 - (1 - covered / num_v) ** num_a)
    return 2 * hits / (num_v + num_a)
