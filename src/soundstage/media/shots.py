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
BLANK = 4.0  # standard deviation of brightness, of 255, below which a frame shows nothing


@dataclass(frozen=True)
class Shot:
    """One uninterrupted take: [start, end) in seconds."""

    start: float
    end: float


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
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    starts = [times[0]]
    for index in _boundaries(np.array(thumbs), threshold, max(1, round(1 / step)) if step else 1):
        if times[index] - starts[-1] >= shortest:
            starts.append(times[index])
    return [Shot(begin, end) for begin, end in zip(starts, [*starts[1:], times[-1] + step], strict=True)]


def _shrink(image: np.ndarray) -> np.ndarray:
    """(36, 64, 3) -> (9, 16, 3) float32 averages of 4 x 4 pixels."""
    return image.reshape(SMALL[0] // 4, 4, SMALL[1] // 4, 4, 3).mean(axis=(1, 3), dtype=np.float32)


def _boundaries(thumbs: np.ndarray, threshold: float, second: int) -> list[int]:
    """(F, h, w, 3) -> indices of the first frames of new shots."""
    blank = thumbs.mean(axis=3).std(axis=(1, 2)) < BLANK
    found = _cuts(thumbs, blank, threshold, second)
    edges = np.flatnonzero(np.diff(np.r_[False, blank, False].astype(int)))
    for begin, end in edges.reshape(-1, 2):
        inside = begin > 0 and end < len(thumbs)
        if inside and (end - begin > 1 or _difference(thumbs[begin - 1], thumbs[end]) > threshold / 2):
            found.append(int(begin + end) // 2)
    for index in _dissolves(thumbs, blank, threshold, second):
        if all(abs(index - other) > second // 2 for other in found):
            found.append(index)
    return sorted(found)


def _cuts(thumbs: np.ndarray, blank: np.ndarray, threshold: float, second: int) -> list[int]:
    score = np.zeros(len(thumbs))
    for index in range(1, len(thumbs)):
        # The median of three frames on either side does not see a flash of one frame.
        before = np.median(thumbs[max(0, index - 3) : index], axis=0)
        after = np.median(thumbs[index : index + 3], axis=0)
        score[index] = min(_difference(thumbs[index - 1], thumbs[index]), _difference(before, after))
    found = []
    for index in np.flatnonzero(score > threshold):
        around = np.r_[score[max(1, index - second) : index], score[index + 1 : index + 1 + second]]
        usual = float(np.median(around)) if len(around) else 0.0
        dark = blank[index - 1] or blank[index]
        if not dark and score[index] > 4 * usual and _likeness(thumbs[index - 1], thumbs[index]) < 0.9:
            found.append(int(index))
    return found


def _dissolves(thumbs: np.ndarray, blank: np.ndarray, threshold: float, second: int) -> list[int]:
    """Frames halfway through a cross-fade: blends of two unlike frames, half a second or a second to either side.

    With u = after - before, the frame is before + share * u plus a rest. In a cut the share is 0 or 1; in a moving
    picture the rest is as large as u; where only the light changes, before and after are alike but for a factor.
    """
    fit: dict[int, float] = {}
    for reach in (max(2, second // 2), max(3, second)):
        for index in range(reach, len(thumbs) - reach):
            before, after = thumbs[index - reach].ravel(), thumbs[index + reach].ravel()
            if blank[index - reach : index + reach + 1].any() or _likeness(before, after) > 0.7:
                continue
            change, moved = after - before, thumbs[index].ravel() - before
            share = float(moved @ change / (change @ change))
            rest = np.linalg.norm(moved - share * change) / np.linalg.norm(change)
            if 0.3 < share < 0.7 and rest < 0.35 and _difference(before, after) > threshold:
                fit[index] = min(fit.get(index, 1.0), abs(share - 0.5))
    chosen: list[int] = []
    for index in sorted(fit, key=lambda candidate: fit[candidate]):
        if all(abs(index - other) > second for other in chosen):
            chosen.append(index)
    return chosen


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """0 (the same picture) to 1: the mean of how far colours are redistributed and how far pixels change."""
    moved = np.abs(_histogram(a) - _histogram(b)).sum() / 2
    changed = np.abs(a - b).mean() / (0.5 * (a + b).mean() + 8)
    return float(0.5 * moved + 0.5 * min(changed, 1.0))


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation: 1 where one is the other under another light."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-6))


def _histogram(thumb: np.ndarray) -> np.ndarray:
    """(24,) shares per channel and level; the root gives dark levels, where films live, as much room as bright ones."""
    level = np.minimum(np.sqrt(thumb.reshape(-1, 3) / 256) * 8, 7).astype(int) + np.arange(3) * 8
    return np.bincount(level.ravel(), minlength=24) / level.size
