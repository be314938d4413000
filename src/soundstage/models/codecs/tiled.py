"""Exact tiles: what part of a picture each layer of a convolutional path needs for one tile of its result.

A layer of small kernels reads a margin around what it makes. Counted backwards from a tile through every layer, the
margins give the span of each layer's input; between two layers the excess is cut off, so that the wide layers at full
resolution run on little more than the tile. Where a span meets the border of the picture it ends there, and the layer
pads as it does on the whole picture: every cell of the tile has its value in the whole picture, nothing is blended.

Lengths are in cells of the layer in question; everything is said for one axis and holds for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Span = tuple[int, int]
"""First cell and the one after the last."""
Tile = tuple[Span, Span]
"""Rows and columns."""
Run = Callable[[Tensor, "Past"], Tensor]
"""A layer on one chunk of frames, given what was kept of the frames before."""
KEPT = 2  # frames before a causal convolution of 3


@dataclass(frozen=True)
class Layer:
    """What one layer reads. margin: cells on either side, at the size of its input.

    up = 2: at its end it doubles each cell, then a kernel of 3 runs over the result. down = 2: at its end a kernel of 3
    runs over every second cell and the two after it.
    """

    margin: int
    up: int = 1
    down: int = 1

    def reads(self, made: Span) -> Span:
        """The cells of the input on which cells `made` of the output depend, aligned to the pace of the layer."""
        start, stop = made
        if self.up > 1:
            start, stop = (start - 1) // self.up, -(-(stop + 1) // self.up)
        if self.down > 1:
            start, stop = start * self.down, stop * self.down + 1
        start, stop = start - self.margin, stop + self.margin
        return start - start % self.down, stop + -stop % self.down

    def makes(self, read: Span) -> Span:
        """The cells of the output that it makes from cells `read`, those spoilt by a cut edge included."""
        return read[0] * self.up // self.down, read[1] * self.up // self.down


def spans(layers: Sequence[Layer], wanted: Span, size: int) -> tuple[Span, ...]:
    """The span of every layer's input, the first layer's input being `size` cells long, and last `wanted` itself."""
    sizes = [size]
    for layer in layers:
        sizes.append(sizes[-1] * layer.up // layer.down)
    found = [wanted]
    for layer, whole in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        start, stop = layer.reads(found[-1])
        found.append((max(start, 0), min(stop, whole)))
    return tuple(reversed(found))


def reach(layers: Sequence[Layer]) -> tuple[int, int]:
    """How far one cell sees: cells of the path's input before and after those that lie under it.

    For layers that double, one cell of the input is meant with all that lies over it; for layers that halve, one cell
    of the output.
    """
    up, down = 1, 1
    for layer in layers:
        up, down = up * layer.up, down * layer.down
    far = 2**10  # so far inside that no border is near
    first, last = spans(layers, (far * up, (far + 1) * up), 2 * far * down)[0]
    return far * down - first, last - (far + 1) * down


def split(size: int, tile: int | None) -> tuple[Span, ...]:
    """A side of `size` cells in as few parts of at most `tile` cells as will do, of even length; None: one part."""
    parts = 1 if tile is None else -(-size // tile)
    return tuple((size * i // parts, size * (i + 1) // parts) for i in range(parts))


class Past:
    """What the causal convolutions of one path keep of the frames before a chunk; one per call and tile.

    kept, index: the list that diffusers' layers read and write, and where in it they are.
    """

    def __init__(self, path: nn.Module) -> None:
        self.kept: list[Any] = [None] * sum(isinstance(m, nn.Conv3d) for m in path.modules())
        self.index = [0]
        self.first = True

    def begin(self) -> None:
        """Before a chunk."""
        self.first = self.kept[0] is None
        self.index[0] = 0

    def convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A causal convolution that sees the frames before the chunk."""
        i = self.index[0]
        self.index[0] += 1
        past = self.kept[i]
        y = layer(x, past)
        if x.shape[2] < KEPT and past is not None:
            x = torch.cat([past[:, :, -1:], x], dim=2)
        self.kept[i] = x[:, :, -KEPT:].clone()
        return y


class Walk:
    """A path of layers on one tile, chunk by chunk: each layer on its rows and columns, then cut to the next."""

    def __init__(self, path: nn.Module, runs: Sequence[Run], layers: Sequence[Layer], windows: Sequence[Tile]) -> None:
        self.past = Past(path)
        self.runs, self.layers, self.windows = runs, layers, windows

    def __call__(self, x: Tensor) -> Tensor:
        """A chunk on the first window -> the result on the last."""
        self.past.begin()
        for run, layer, (read, wanted) in zip(self.runs, self.layers, pairwise(self.windows), strict=True):
            x = _cut(run(x, self.past), layer.makes(read[0]), layer.makes(read[1]), wanted)
        return x

    def over(self, whole: Tensor) -> Tensor:
        """A chunk of the whole picture -> the result on the last window."""
        return self(_cut(whole, (0, 0), (0, 0), self.windows[0]))


def windows(layers: Sequence[Layer], wanted: Tile, size: Sequence[int]) -> list[Tile]:
    """Rows and columns of every layer's input, and of the result."""
    return list(zip(*(spans(layers, span, side) for span, side in zip(wanted, size, strict=True)), strict=True))


def _cut(x: Tensor, rows: Span, columns: Span, wanted: Tile) -> Tensor:
    """Of a picture that lies at these rows and columns, the wanted part."""
    (top, bottom), (left, right) = wanted
    return x[..., top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]]


def place(whole: Tensor, part: Tensor, tile: Tile, scale: int) -> None:
    """Put a tile's pixels where they belong."""
    (top, bottom), (left, right) = tile
    whole[..., top * scale : bottom * scale, left * scale : right * scale] = part
