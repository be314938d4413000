"""Memory of the Wan video autoencoders, counted from their layers, and the tile that fits a budget.

Counted are the tensors that PyTorch holds at the worst moment of a call besides weights, input and result: what causal
convolutions keep between chunks, and the widest moment of one layer. In a residual block that is a convolution: its
input, that after the activation, that joined with two frames of the past, that padded, and the two frames to keep, so
4 T + 6 frames of one picture for a chunk of T, besides what callers of the block hold of its input. What a library
takes inside a kernel (cuDNN's workspace, attention that keeps every pair of cells) is not known here; leave it room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from soundstage.core.errors import RequestError
from soundstage.models.codecs.tiled import KEPT, Layer, spans, split

if TYPE_CHECKING:
    from soundstage.models.codecs.wan_vae import WanVAEConfig

SLACK = 1.1  # padding of small tiles, statistics of norms, pixels of the chunk


@dataclass(frozen=True)
class _Work:
    """One layer of a path. entering, width: channels in and within. convs: causal convolutions in a row. frames, made:
    in a chunk, before and after. held: how often callers hold its input. paced: it has a convolution over frames alone.
    """

    entering: int
    width: int
    convs: int
    frames: int
    made: int
    held: int = 1
    paced: bool = False

    @property
    def kept(self) -> int:
        """Numbers per cell kept between chunks."""
        inputs = self.entering + (self.convs - 1) * self.width if self.convs else 0
        return KEPT * (inputs + self.width * self.paced)

    def live(self, grows: int, half: bool) -> int:
        """Numbers per cell of the input at the worst moment. grows: cells made of one, 0 where the picture shrinks.

        half: weights of two bytes; norms are in float32, and count twice.
        """
        frames = self.frames
        inputs = self.held * self.entering * frames
        wide = max(3 * frames + 3 * KEPT, 5 * frames * half)
        shortcut = self.width * frames * (self.width != self.entering)
        first = inputs + self.entering * wide + shortcut
        second = inputs + self.width * wide + shortcut
        later = inputs + self.width * (wide + frames)
        copies = 3 if half or self.held > 1 else 2  # of the doubled picture: in float32 twice, or beside a shortcut's
        end = inputs + 2 * frames * self.width + copies * grows * self.made * self.width
        return max(first, second if self.convs > 1 else 0, later if self.convs > 2 else 0, end)


@dataclass(frozen=True)
class _Path:
    """The layers on tiles of an encoder or decoder, what each reads and what work it is.

    middle: width of the features at latent resolution. cells: of the first layer's input, for one latent cell. given:
    copies of its input that are made for the first layer.
    """

    layers: tuple[Layer, ...]
    work: tuple[_Work, ...]
    middle: int
    cells: int = 1
    given: int = 0

    def areas(self, height: int, width: int, tile: int | None) -> list[int]:
        """Cells that each layer reads, at most, for one tile of height x width latent cells."""
        grown = math.prod(layer.up for layer in self.layers)
        extents = []
        for side in (height, width):
            tiles = [
                spans(self.layers, (start * grown, stop * grown), side * self.cells)
                for start, stop in split(side, tile)
            ]
            extents.append([max(stop - start for start, stop in reads) for reads in zip(*tiles, strict=True)])
        return [rows * columns for rows, columns in zip(*extents, strict=True)][:-1]


def decode_bytes(
    config: WanVAEConfig,
    length: int,
    height: int,
    width: int,
    *,
    tile: int | None = None,
    stream: bool = True,
    itemsize: int = 2,
    batch: int = 1,
) -> int:
    """Bytes that `decode` of a clip of `length` frames of height x width pixels needs besides weights, latents, frames.

    tile, stream: as of the module. itemsize: bytes of a number of the weights. Without gradients.
    """
    return _bytes(_decoding, config, length, height, width, tile, stream, itemsize, batch)


def encode_bytes(
    config: WanVAEConfig,
    length: int,
    height: int,
    width: int,
    *,
    tile: int | None = None,
    stream: bool = True,
    itemsize: int = 2,
    batch: int = 1,
) -> int:
    """As `decode_bytes`, for `encode`."""
    return _bytes(_encoding, config, length, height, width, tile, stream, itemsize, batch)


def fit_tile(
    config: WanVAEConfig,
    budget: int,
    length: int,
    height: int,
    width: int,
    *,
    stream: bool = True,
    itemsize: int = 2,
    batch: int = 1,
) -> int | None:
    """The largest tile, in latent cells per side, with which encoding and decoding fit `budget` bytes; None: no tiles.

    A larger budget never gives a smaller tile. Raises RequestError when no tile fits.
    """
    longest = max(height, width) // config.geometry.spatial_stride
    needed = []
    for parts in range(1, longest + 1):
        tile = None if parts == 1 else -(-longest // parts)
        needed.append(
            max(
                _bytes(path, config, length, height, width, tile, stream, itemsize, batch)
                for path in (_encoding, _decoding)
            )
        )
        if needed[-1] <= budget:
            return tile
    raise RequestError(
        f"{length} frames of {height} x {width} need {min(needed, default=0) / 2**30:.2f} GiB in the video codec and "
        f"there are {budget / 2**30:.2f}; ask for a smaller or shorter clip"
    )


def _bytes(
    path: Callable[[WanVAEConfig, int], _Path],
    config: WanVAEConfig,
    length: int,
    height: int,
    width: int,
    tile: int | None,
    stream: bool,
    itemsize: int,
    batch: int,
) -> int:
    geometry = config.geometry
    rows, columns = height // geometry.spatial_stride, width // geometry.spatial_stride
    steps = geometry.steps(length)
    chunk = 1 if stream else max(1, steps - 1)
    tiled = path(config, chunk)
    areas = tiled.areas(rows, columns, tile)
    each = list(zip(areas, tiled.work, tiled.layers, strict=True))
    kept = sum(area * work.kept for area, work, _ in each)
    kept += tiled.given * areas[0] * tiled.work[0].entering * tiled.work[0].frames
    live = max(area * work.live(layer.up**2 if layer.up > 1 else 0, itemsize < 4) for area, work, layer in each)
    whole = rows * columns * tiled.middle
    inner_kept = whole * 5 * KEPT  # a convolution and two residual blocks
    inner = whole * max(6 * chunk + 3 * KEPT, 9 * chunk)
    if tile is None or tile >= max(rows, columns):
        most = kept + inner_kept + max(live, inner)
    else:
        most = whole * steps + max(kept + live, inner_kept + inner)
    return int(SLACK * itemsize * batch * most)


def _decoding(config: WanVAEConfig, frames: int) -> _Path:
    widths = [config.decoder_width * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
    work = []
    for i, (entering, width) in enumerate(pairwise(widths)):
        doubles = i < len(config.temporal) and config.temporal[-1 - i]
        halved = i > 0 and not config.residual  # the stage before gave half of its width
        made = frames * (1 + doubles)
        convs = 2 * (config.depth + 1)
        work.append(_Work(entering // (1 + halved), width, convs, frames, made, 1 + config.residual, doubles))
        frames = made
    work.append(_Work(widths[-1], 3 * config.patch**2, 1, frames, frames))
    return _Path(config.up, tuple(work), widths[0])


def _encoding(config: WanVAEConfig, frames: int) -> _Path:
    geometry = config.geometry
    widths = [config.width * m for m in (1, *config.multipliers)]
    frames *= geometry.stride
    work = [_Work(3 * config.patch**2, widths[0], 1, frames, frames)]
    for i, (entering, width) in enumerate(pairwise(widths)):
        last = i == len(config.temporal)
        halves = not last and config.temporal[i]
        made = frames // (1 + halves)
        if config.residual:
            work.append(_Work(entering, width, 2 * config.depth, frames, made, 2, halves))
        else:
            work += [_Work(width if block else entering, width, 2, frames, frames) for block in range(config.depth)]
            work += [] if last else [_Work(width, width, 0, frames, made, 1, halves)]
        frames = made
    return _Path(config.down, tuple(work), widths[-1], geometry.spatial_stride // config.patch, given=2)
