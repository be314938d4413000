"""Pictures as arrays: resizing, cropping, padding, and the float range that models use. Frames are (F, H, W, 3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from soundstage.media.errors import MediaError
from soundstage.media.probe import import_av

Size = tuple[int, int]


def resize(frames: np.ndarray, size: Size) -> np.ndarray:
    """(F, H, W, C) uint8 -> (F, height, width, C) uint8, bicubic, free of aliasing, without regard to proportions."""
    height, width = _checked(size)
    if frames.shape[1:3] == (height, width):
        return frames
    av = import_av()
    from av.video.reformatter import Interpolation, VideoReformatter

    # Each channel goes through the scaler as a grey picture: it treats colour pictures by way of YUV, which rounds.
    scale = VideoReformatter()
    out = np.empty((len(frames), height, width, frames.shape[3]), np.uint8)
    for index, image in enumerate(frames):
        for channel in range(frames.shape[3]):
            plane = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[..., channel]), format="gray")
            scaled = scale.reformat(plane, width, height, "gray", interpolation=Interpolation.BICUBIC, threads=1)
            out[index, ..., channel] = scaled.to_ndarray()
    return out


def crop(frames: np.ndarray, size: Size) -> np.ndarray:
    """The central (height, width) of (F, H, W, C); raises MediaError where the frames are smaller."""
    height, width = _checked(size)
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    if top < 0 or left < 0:
        reason = f"crop: {frames.shape[1]} x {frames.shape[2]} frames are smaller than {height} x {width}"
        raise MediaError(reason, remedy="resize, cover or letterbox them")
    return frames[:, top : top + height, left : left + width]


def pad(frames: np.ndarray, size: Size, colour: int | None = None) -> np.ndarray:
    """(F, H, W, C) centred in (F, height, width, C), with a border of `colour` (None repeats the edge)."""
    height, width = _checked(size)
    down, right = height - frames.shape[1], width - frames.shape[2]
    if down < 0 or right < 0:
        reason = f"pad: {frames.shape[1]} x {frames.shape[2]} frames are larger than {height} x {width}"
        raise MediaError(reason, remedy="resize, crop or letterbox them")
    border = ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    if colour is None:
        return np.pad(frames, border, mode="edge")
    return np.pad(frames, border, constant_values=colour)


def letterbox(frames: np.ndarray, size: Size, colour: int = 0) -> np.ndarray:
    """The whole picture inside (height, width), proportions kept, bars of `colour` around it."""
    return pad(resize(frames, _scaled(frames, _checked(size), min)), size, colour)


def cover(frames: np.ndarray, size: Size) -> np.ndarray:
    """The largest central part with the proportions of (height, width), at that size."""
    return crop(resize(frames, _scaled(frames, _checked(size), max)), size)


def to_float(frames: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], same shape: 0 is -1 and 255 is 1."""
    return frames.astype(np.float32) / 127.5 - 1


def from_float(values: np.ndarray) -> np.ndarray:
    """float in [-1, 1] -> uint8, same shape, rounded to nearest; values outside are clipped."""
    return np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)


def _scaled(frames: np.ndarray, size: Size, choose: Callable[[float, float], float]) -> Size:
    """The size of the picture scaled until `choose` (min: the first, max: the last) of its sides fits `size`."""
    factor = choose(size[0] / frames.shape[1], size[1] / frames.shape[2])
    height, width = (max(1, round(side * factor)) for side in frames.shape[1:3])
    return choose(height, size[0]), choose(width, size[1])


def _checked(size: Size) -> Size:
    if len(size) != 2 or min(size) < 1 or any(int(side) != side for side in size):
        raise MediaError(f"size: {size!r} is not (height, width)", remedy="give two whole numbers above 0")
    return int(size[0]), int(size[1])
