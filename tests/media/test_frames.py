"""Sizes, proportions, borders and the float range of pictures."""

from __future__ import annotations

import numpy as np
import pytest

from soundstage.media.errors import MediaError
from soundstage.media.frames import cover, crop, from_float, letterbox, pad, resize, to_float


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns / width, rows / height, 1 - columns / width], -1)
    return (255 * image[None]).astype(np.uint8)


@pytest.mark.parametrize("size", [(60, 80), (64, 64), (240, 320), (33, 47)])
def test_resizing_keeps_a_gradient_and_flat_colour(size: tuple[int, int]) -> None:
    out = resize(gradient(120, 160), size)
    assert out.shape == (1, *size, 3)
    inside = np.s_[:, 4:-4, 4:-4]
    assert np.abs(out[inside].astype(int) - gradient(*size)[inside]).max() <= 4
    flat = np.full((2, 50, 70, 3), [255, 0, 10], np.uint8)
    assert np.abs(resize(flat, size).astype(int) - [255, 0, 10]).max() <= 1


def test_shrinking_averages_instead_of_picking() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 254
    assert np.abs(resize(stripes, (16, 16))[:, 2:-2, 2:-2].astype(int) - 127).max() <= 3


def test_crop_pad_letterbox_and_cover() -> None:
    frames = gradient(40, 80)
    np.testing.assert_array_equal(crop(frames, (20, 40)), frames[:, 10:30, 20:60])
    boxed = pad(frames, (60, 81), colour=7)
    np.testing.assert_array_equal(boxed[:, 10:50, :80], frames)
    assert (boxed[:, :10] == 7).all()
    np.testing.assert_array_equal(pad(frames, (40, 82))[:, :, -1], frames[:, :, -1])
    wide = letterbox(frames, (64, 64), colour=9)
    assert wide.shape == (1, 64, 64, 3)
    assert (wide[:, :16] == 9).all()
    assert (wide[:, 48:] == 9).all()
    np.testing.assert_array_equal(wide[:, 16:48], resize(frames, (32, 64)))
    full = cover(frames, (64, 64))
    np.testing.assert_array_equal(full, resize(frames, (64, 128))[:, :, 32:96])
    assert letterbox(frames, (33, 99)).shape == cover(frames, (33, 99)).shape == (1, 33, 99, 3)


def test_floats_are_exact_both_ways() -> None:
    levels = np.arange(256, dtype=np.uint8)
    values = to_float(levels)
    assert (values.min(), values.max(), values.dtype) == (-1.0, 1.0, np.float32)
    np.testing.assert_array_equal(from_float(values), levels)
    np.testing.assert_array_equal(from_float(np.array([-9.0, 9.0])), [0, 255])


def test_impossible_sizes_are_named() -> None:
    frames = gradient(40, 80)
    with pytest.raises(MediaError, match="40 x 80 frames are smaller than 50 x 50"):
        crop(frames, (50, 50))
    with pytest.raises(MediaError, match="40 x 80 frames are larger than 50 x 50"):
        pad(frames, (50, 50))
    with pytest.raises(MediaError, match=r"\(0, 5\) is not \(height, width\)"):
        resize(frames, (0, 5))
