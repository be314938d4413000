"""Good clips spoilt in one known way each: what the gates of curation must reject, and by which name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np

from soundstage.media.clip import Clip
from soundstage.media.frames import resize
from soundstage.media.waves import resample

__all__ = ["SPOILT", "add_noise", "blur", "write_over"]


def blur(frames: np.ndarray, sigma: float) -> np.ndarray:
    """(F, H, W, 3) uint8 blurred by a Gaussian of `sigma` pixels."""
    reach = max(1, round(3.5 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    out = np.empty_like(frames)
    for index, image in enumerate(frames):
        values = image.astype(np.float32)
        for axis in (0, 1):
            edges = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
            padded = np.pad(values, edges, mode="edge").swapaxes(0, axis)
            size = values.shape[axis]
            values = sum(tap * padded[n : n + size] for n, tap in enumerate(taps)).swapaxes(0, axis)
        out[index] = np.rint(values)
    return out


def add_noise(clip: Clip, snr: float, seed: int = 0) -> Clip:
    """White noise `snr` decibels below the mean square of the wave."""
    noise = np.random.default_rng(seed).normal(size=clip.wave.shape[1]) * np.sqrt(
        float(np.square(clip.wave).mean()) / 10 ** (snr / 10)
    )
    return replace(clip, wave=(clip.wave + noise).clip(-1, 1).astype(np.float32))


def write_over(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """A line of bright strokes, as tall as a subtitle and as dense as letters, over the lower part of every frame."""
    rng = np.random.default_rng(seed)
    height, width = frames.shape[1:3]
    stroke, tall = max(2, round(width / 200)), round(height / 12)
    letters = rng.random((tall // stroke, round(0.8 * width) // stroke)) < 0.45
    letters[:, ::4] = False  # gaps between letters
    letters[:, 1::4] = True  # stems
    mask = letters.repeat(stroke, axis=0).repeat(stroke, axis=1)
    top, left = round(0.82 * height), round(0.1 * width)
    out = frames.copy()
    area = out[:, top : top + mask.shape[0], left : left + mask.shape[1]]
    area[:] = np.where(mask[None, ..., None], 245, area // 4)
    return out


def _frames(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Clip], Clip]:
    return lambda clip: replace(clip, frames=change(clip.frames))


def _wave(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Clip], Clip]:
    return lambda clip: replace(clip, wave=change(clip.wave, clip.sample_rate).astype(np.float32))


def _black(frames: np.ndarray) -> np.ndarray:
    out = frames.copy()
    out[len(out) // 3 : len(out) * 2 // 3] = 0
    return out


def _barred(frames: np.ndarray) -> np.ndarray:
    out, bar = frames.copy(), frames.shape[1] // 8
    out[:, :bar] = out[:, -bar:] = 0
    return out


def _cut(frames: np.ndarray) -> np.ndarray:
    half = len(frames) // 2
    other = 255 - frames[half:, ::-1, :, ::-1]
    return np.concatenate([frames[:half], other])


def _pausing(wave: np.ndarray, rate: int) -> np.ndarray:
    out = wave.copy()
    out[:, rate : rate + round(0.65 * wave.shape[1])] = 0
    return out


def _late(wave: np.ndarray, rate: int) -> np.ndarray:
    return np.pad(wave, ((0, 0), (round(0.4 * rate), 0)))[:, : wave.shape[1]]


def _shortened(clip: Clip) -> Clip:
    return replace(clip, frames=clip.frames[: 2 * round(clip.fps)], wave=clip.wave[:, : 2 * clip.sample_rate])


SPOILT: dict[str, Callable[[Clip], Clip]] = {
    "no sound": lambda clip: clip.without("audio"),
    "short": _shortened,
    "small": _frames(lambda frames: resize(frames, (240, 240 * frames.shape[2] // frames.shape[1]))),
    "few frames": lambda clip: replace(clip, frames=clip.frames[::2], fps=Fraction(clip.fps) / 2),
    "cut": _frames(_cut),
    "black": _frames(_black),
    "overexposed": _frames(lambda frames: np.minimum(frames.astype(np.uint16) * 6 + 120, 255).astype(np.uint8)),
    "underexposed": _frames(lambda frames: frames // 24),
    "frozen": _frames(lambda frames: frames[:1].repeat(len(frames), axis=0)),
    "barred": _frames(_barred),
    "blurred": _frames(lambda frames: blur(frames, 5.0 * frames.shape[1] / 720)),
    "written on": _frames(write_over),
    "low rate": lambda clip: replace(clip, wave=resample(clip.wave, clip.sample_rate, 8000), sample_rate=8000),
    "silent": _wave(lambda wave, _: wave * 1e-4),
    "pausing": _wave(_pausing),
    "muffled": _wave(lambda wave, rate: resample(resample(wave, rate, 8000), 8000, rate)[:, : wave.shape[1]]),
    "clipped": _wave(lambda wave, _: (wave * (8 / np.abs(wave).max())).clip(-1, 1)),
    "offset": _wave(lambda wave, _: (0.8 * wave + 0.15).clip(-1, 1)),
    "cancelling": _wave(lambda wave, _: np.stack([wave[0], -wave[0]])),
    "one-sided": _wave(lambda wave, _: np.stack([wave[0], np.zeros_like(wave[0])])),
    "noisy": lambda clip: add_noise(clip, 3.0),
    "out of sync": _wave(_late),
}
"""By the name of the limit in data.gates.LIMITS that should reject it. Sound is expected in stereo."""
