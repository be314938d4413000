"""A plain descriptor of a clip of the world, for distances between sets of clips where no network is trained."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from soundstage.media.clip import Clip

BINS, BANDS = 8, 8
LOWEST_HZ = 80.0
QUIET = 1e-4  # added before the logarithm: -80 dB


def describe(clip: Clip) -> np.ndarray:
    """(38,) float64: 14 values of the picture, 24 of the sound (zeros for one that is absent).

    Picture: mean and standard deviation of each colour in [0, 1], then log motion energy in 8 equal parts of the clip.
    Sound: mean and standard deviation over time of 8 log-spaced bands' log level, then the log level of 8 parts.
    """
    picture = np.zeros(6 + BINS) if clip.frames is None else _picture(clip.frames)
    sound = np.zeros(2 * BANDS + BINS) if clip.wave is None else _sound(clip.wave.mean(axis=0), int(clip.sample_rate))
    return np.concatenate([picture, sound])


def _picture(frames: np.ndarray) -> np.ndarray:
    pixels = frames.reshape(-1, 3) / 255.0
    moved = np.abs(np.diff(frames.astype(np.float32) / 255, axis=0)).mean(axis=(1, 2, 3))
    parts = [part.mean() if len(part) else 0.0 for part in np.array_split(moved, BINS)]
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0), np.log10(np.array(parts) + QUIET)])


def _sound(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    size = 512
    wave = np.pad(wave, (0, max(0, 2 * size - len(wave))))
    windows = np.lib.stride_tricks.sliding_window_view(wave, size)[:: size // 2] * np.hanning(size)
    power = np.square(np.abs(np.fft.rfft(windows, axis=1))) / size
    edges = np.geomspace(LOWEST_HZ, sample_rate / 2, BANDS + 1) * size / sample_rate
    cells = np.unique(np.round(edges).astype(int))
    bands = [power[:, a:b].sum(axis=1) for a, b in pairwise(cells)]
    levels = np.log10(np.stack(bands, axis=1) + QUIET)
    levels = np.pad(levels, ((0, 0), (0, BANDS - levels.shape[1])), mode="edge")
    parts = [np.sqrt(np.mean(np.square(part))) for part in np.array_split(wave, BINS)]
    return np.concatenate([levels.mean(axis=0), levels.std(axis=0), np.log10(np.array(parts) + QUIET)])
