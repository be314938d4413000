"""Shot boundaries: hard cuts, cross-fades and fades through black or white, by the timestamps of the frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soundstage.media.clip import Clip
from soundstage.media.decode import frames as decode_frames
from soundstage.media.frames import resize

SMALL = (36, 64)  # frames are compared at this size
THUMB = (9, 16)  # and then as averages over this grid
BLANK = 4.0  # standard deviation of brightness, of 255, below which a frame shows nothing
PART = 2048  # frames compared at once, which bounds the memory


@dataclass(frozen=True)
class Shot:
    """One uninterrupted take: [start, end) in seconds."""

    start: float
    end: float


@dataclass(frozen=True, eq=False)
class CutSignal:
    """What boundaries are decided by, per frame, each (F,) float32; small enough to keep for later thresholds.

    score: difference to the frames before, 0 to 1. likeness: correlation with the frame before, under any light.
    spread: standard deviation of brightness, of 255. across: on the first frame of a blank stretch, the difference of
    what it separates (1 at either end of the film). fade: difference of what this frame blends, 0 where it is no blend;
    unevenness: how far from half-way the blend is, 1 where it is none.
    """

    score: np.ndarray
    likeness: np.ndarray
    spread: np.ndarray
    across: np.ndarray
    fade: np.ndarray
    unevenness: np.ndarray


def shots(source: Clip | str | Path, *, threshold: float = 0.25, shortest: float = 0.25) -> list[Shot]:
    """The shots of a clip or a file (read one frame at a time, so memory does not grow with its resolution).

    threshold: difference, 0 to 1, that counts as a cut, if it is also four times what is usual within a second; lower
    finds more. shortest: seconds; a boundary this close to the one before is dropped.
    """
    if isinstance(source, Clip):
        times = source.frame_times
        pairs: Iterable = zip(times, (resize(image[None], SMALL)[0] for image in source.frames), strict=True)
    else:
        pairs = decode_frames(source, size=SMALL)
    times, thumbs = [], []
    for time, image in pairs:
        times.append(float(time))
        thumbs.append(_shrink(image))
    if not times:
        return []
    seconds = np.array(times)
    return shots_of(cut_signal(np.array(thumbs), seconds), seconds, threshold=threshold, shortest=shortest)


def shots_of(signal: CutSignal, times: np.ndarray, *, threshold: float = 0.25, shortest: float = 0.25) -> list[Shot]:
    """The shots of a film by its signal and the (F,) seconds of its frames; the numbers are those of `shots`."""
    if not len(times):
        return []
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    starts = [float(times[0])]
    for index in _boundaries(signal, threshold, _second(times)):
        if times[index] - starts[-1] >= shortest:
            starts.append(float(times[index]))
    return [Shot(begin, end) for begin, end in zip(starts, [*starts[1:], float(times[-1]) + step], strict=True)]


def cut_signal(thumbs: np.ndarray, times: np.ndarray) -> CutSignal:
    """(F, 9, 16, 3) RGB averages, uint8 or float, and (F,) seconds -> the signal of cuts and fades."""
    count, second = len(thumbs), _second(times)
    spread = np.concatenate(
        [_floats(thumbs, at, at + PART).mean(axis=3).std(axis=(1, 2)) for at in range(0, count, PART)] or [np.zeros(0)]
    )
    columns = [np.zeros(count, np.float32) for _ in range(5)]
    score, likeness, across, fade, unevenness = columns
    unevenness[:] = 1
    for begin in range(0, count, PART):
        end = min(begin + PART, count)
        low, high = max(0, begin - second), min(count, end + second)
        part, keep = _floats(thumbs, low, high), slice(begin - low, end - low)
        score[begin:end], likeness[begin:end] = (column[keep] for column in _jumps(part))
        fade[begin:end], unevenness[begin:end] = (column[keep] for column in _blends(part, spread[low:high], second))
    for begin, end in _stretches(spread < BLANK):
        inside = begin > 0 and end < count
        pair = [_floats(thumbs, at, at + 1) for at in (begin - 1, end)] if inside else None
        across[begin] = _difference(*pair)[0] if pair else 1.0
    return CutSignal(score, likeness, spread.astype(np.float32), across, fade, unevenness)


def _second(times: np.ndarray) -> int:
    """Frames in a second."""
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return max(1, round(1 / step)) if step > 0 else 1


def _shrink(image: np.ndarray) -> np.ndarray:
    """(36, 64, 3) -> (9, 16, 3) float32 averages of 4 x 4 pixels."""
    return image.reshape(SMALL[0] // 4, 4, SMALL[1] // 4, 4, 3).mean(axis=(1, 3), dtype=np.float32)


def _floats(thumbs: np.ndarray, begin: int, end: int) -> np.ndarray:
    return thumbs[begin:end].astype(np.float32)


def _stretches(blank: np.ndarray) -> np.ndarray:
    """(N, 2) first and last-but-one frames of blank stretches."""
    return np.flatnonzero(np.diff(np.r_[False, blank, False].astype(int))).reshape(-1, 2)


def _jumps(thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F, h, w, 3) -> score and likeness of every frame beside the one before."""
    count = len(thumbs)
    score, likeness = np.zeros(count, np.float32), np.ones(count, np.float32)
    if count > 1:
        # The median of three frames on either side does not see a flash of one frame.
        middle = _middle(thumbs)
        before = np.concatenate([thumbs[:1], (thumbs[:1] + thumbs[1:2]) / 2, middle])[: count - 1]
        after = np.concatenate([middle, (thumbs[-2:-1] + thumbs[-1:]) / 2, thumbs[-1:]])[-(count - 1) :]
        score[1:] = np.minimum(_difference(thumbs[:-1], thumbs[1:]), _difference(before, after))
        likeness[1:] = _likeness(thumbs[:-1], thumbs[1:])
    return score, likeness


def _middle(thumbs: np.ndarray) -> np.ndarray:
    """(F, ...) -> (F - 2, ...) medians of three in a row."""
    if len(thumbs) < 3:
        return thumbs[:0]
    a, b, c = thumbs[:-2], thumbs[1:-1], thumbs[2:]
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _blends(thumbs: np.ndarray, spread: np.ndarray, second: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames halfway through a cross-fade: blends of two unlike frames, half a second or a second to either side.

    With u = after - before, the frame is before + share * u plus a rest. In a cut the share is 0 or 1; in a moving
    picture the rest is as large as u; where only the light changes, before and after are alike but for a factor.
    """
    count = len(thumbs)
    flat = thumbs.reshape(count, -1)
    fade, unevenness = np.zeros(count, np.float32), np.ones(count, np.float32)
    dark = np.concatenate([[0], np.cumsum(spread < BLANK)])
    for reach in (max(2, second // 2), max(3, second)):
        if count <= 2 * reach:
            continue
        before, after, here = flat[: -2 * reach], flat[2 * reach :], flat[reach:-reach]
        change, moved = after - before, here - before
        energy = np.einsum("fn,fn->f", change, change) + 1e-6
        share = np.einsum("fn,fn->f", moved, change) / energy
        rest = np.sqrt(np.maximum(np.einsum("fn,fn->f", moved, moved) - share**2 * energy, 0) / energy)
        lit = dark[2 * reach + 1 :] == dark[: -2 * reach - 1]
        fits = np.flatnonzero((share > 0.3) & (share < 0.7) & (rest < 0.35) & lit)
        first, last = thumbs[fits], thumbs[fits + 2 * reach]
        fits, first, last = (x[_likeness(first, last) <= 0.7] for x in (fits, first, last))
        better = np.abs(share[fits] - 0.5) < unevenness[fits + reach]
        where = fits[better] + reach
        unevenness[where] = np.abs(share[fits[better]] - 0.5)
        fade[where] = _difference(first[better], last[better])
    return fade, unevenness


def _boundaries(signal: CutSignal, threshold: float, second: int) -> list[int]:
    """Indices of the first frames of new shots."""
    blank = signal.spread < BLANK
    found = _cuts(signal, blank, threshold, second)
    for begin, end in _stretches(blank):
        if begin == 0 or end == len(blank):
            continue
        sides = signal.spread[max(0, begin - second) : begin], signal.spread[end : end + second]
        gone = signal.spread[begin:end].min() < min(side.max() for side in sides) / 4  # a dim scene hovers at the limit
        if gone and (end - begin > 1 or signal.across[begin] > threshold / 2):
            found.append(int(begin + end) // 2)
    chosen: list[int] = []
    blends = np.flatnonzero((signal.fade > threshold) & (signal.unevenness < 0.2))
    for index in sorted(blends.tolist(), key=lambda candidate: signal.unevenness[candidate]):
        if all(abs(index - other) > second for other in chosen):
            chosen.append(index)
    found += [index for index in chosen if all(abs(index - other) > second // 2 for other in found)]
    return sorted(found)


def _cuts(signal: CutSignal, blank: np.ndarray, threshold: float, second: int) -> list[int]:
    found, score = [], signal.score
    for index in np.flatnonzero(score > threshold):
        around = np.r_[score[max(1, index - second) : index], score[index + 1 : index + 1 + second]]
        usual = float(np.median(around)) if len(around) else 0.0
        dark = blank[index - 1] or blank[index]
        if not dark and score[index] > 4 * usual and signal.likeness[index] < 0.9:
            found.append(int(index))
    return found


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(F, h, w, 3) twice -> (F,) 0 (the same picture) to 1: mean of how far colours and how far pixels change."""
    moved = np.abs(_histogram(a) - _histogram(b)).sum(axis=1) / 2
    changed = np.abs(a - b).mean(axis=(1, 2, 3)) / (0.5 * (a + b).mean(axis=(1, 2, 3)) + 8)
    return 0.5 * moved + 0.5 * np.minimum(changed, 1.0)


def _likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(F, ...) twice -> (F,) correlation: 1 where one is the other under another light."""
    a, b = (x.reshape(len(x), int(np.prod(x.shape[1:]))) for x in (a, b))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    return np.einsum("fn,fn->f", a, b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1) + 1e-6)


def _histogram(thumbs: np.ndarray) -> np.ndarray:
    """(F, 24) shares per channel and level; the root gives dark levels, where films live, as much room as bright."""
    pixels = thumbs.shape[1] * thumbs.shape[2]
    level = np.minimum(np.sqrt(thumbs.reshape(len(thumbs), pixels, 3) / 256) * 8, 7).astype(int)
    level += np.arange(3) * 8 + 24 * np.arange(len(thumbs))[:, None, None]
    counts = np.bincount(level.ravel(), minlength=24 * len(thumbs)).reshape(-1, 24)
    return counts / (3 * pixels)
