"""Measures of a picture while it is decoded: small copies of every frame, and a close look at one a second."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from soundstage.data.prints import PICTURES, picture_prints
from soundstage.media.probe import display_matrix
from soundstage.media.shots import THUMB, cut_signal
from soundstage.media.sync import impulse_of

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["PictureMeter", "blockiness", "flow", "focus", "text_blocks"]

SIDE = 90  # pixels of the short side of the small copies
AT_ONCE = 64  # frames measured together
DARK, BRIGHT = 16, 250  # luma, of 255 in full range: crushed, blown
BAR = 10  # luma up to which a row counts as a black bar, noise of coding included
LINES = 96  # rows and columns of a close look
FINE, COARSE = 1.0, 2.5  # pixels: the two blurs whose ratio tells the width of an edge
GRID = 20  # columns of blocks in which text is looked for


class PictureMeter:
    """Takes frames in order of time and gives their traces: arrays by name, one value per frame or per close look.

    Frames: "level", "dark", "bright" (0 to 255), "change" (mean absolute difference, of 255), "motion" (picture
    heights between frames, by block gradients on two scales, no codec vectors), "moving" (share of blocks, of 255),
    "impulse" (see media.sync), "bars" (N, 4: black rows above and below, columns left and right), "edges" (N, 4: how
    sharply those end, levels), and those of media.shots.CutSignal. Looks: "look" (frame), "blur" (pixels), "text"
    (share), "blocks" (share). Prints, PICTURES a second: "print_at" (frame), "prints", "colours" (see data.prints).
    """

    def __init__(self) -> None:
        self.times: list[Fraction] = []
        self.size, self.turned = (0, 0), False
        self.depth, self.pixels = 8, ""
        self._small: tuple[int, int] = (0, 0)
        self._luma: list[np.ndarray] = []
        self._chroma: list[np.ndarray] = []
        self._cells: np.ndarray | None = None
        self._thumbs: list[np.ndarray] = []
        self._traces: dict[str, list[np.ndarray]] = {}
        self._looks: dict[str, list[float]] = {"look": [], "blur": [], "text": [], "blocks": []}
        self._words: np.ndarray | None = None
        self._scaler: object = None
        self._next = self._next_print = Fraction(0)
        self._prints: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, time: Fraction, frame: VideoFrame) -> None:
        """Take one decoded frame shown at `time` seconds."""
        if not self.times:
            self._begin(frame)
            self._next = self._next_print = time
        if time >= self._next:
            self._look(frame)
            self._next = time + 1
        self.times.append(time)
        luma, chroma = self._shrink(frame)
        self._luma.append(luma)
        self._chroma.append(chroma)
        if len(self._luma) == AT_ONCE:
            self._measure()

    def close(self) -> dict[str, np.ndarray]:
        """The traces of everything taken."""
        if self._luma:
            self._measure()
        if not self.times:
            return {}
        traces = {name: np.concatenate(parts) for name, parts in self._traces.items()}
        traces["impulse"] = np.append(traces["impulse"], 0.0).astype(np.float16)[: len(self.times)]
        signal = cut_signal(np.concatenate(self._thumbs), np.array([float(time) for time in self.times]))
        traces |= {name: value.astype(np.float16) for name, value in vars(signal).items()}
        for name, parts in zip(("print_at", "prints", "colours"), zip(*self._prints, strict=True), strict=True):
            traces[name] = np.concatenate(parts)
        traces |= {name: np.array(values, np.float32) for name, values in self._looks.items()}
        return traces

    def _begin(self, frame: VideoFrame) -> None:
        from av.video.reformatter import VideoReformatter

        self.turned = not display_matrix(frame)[0]
        self.size = (frame.width, frame.height) if self.turned else (frame.height, frame.width)
        self.depth = max(component.bits for component in frame.format.components)
        self.pixels = frame.format.name
        factor = min(1.0, SIDE / min(frame.height, frame.width))
        self._small = tuple(max(2, 2 * round(side * factor / 2)) for side in (frame.height, frame.width))
        self._scaler = VideoReformatter()

    def _shrink(self, frame: VideoFrame) -> tuple[np.ndarray, np.ndarray]:
        """(h, w) luma and (2, h / 2, w / 2) chroma, uint8 in full range, averaged by the scaler of ffmpeg."""
        from av.video.reformatter import ColorRange, Interpolation

        height, width = self._small
        small = self._scaler.reformat(
            frame,
            width,
            height,
            "yuv420p",
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.AREA,
            threads=1,
        )
        planes = [_plane(plane) for plane in small.planes]
        return planes[0].copy(), np.stack(planes[1:])

    def _look(self, frame: VideoFrame) -> None:
        planar = frame.format.name.startswith(("yuv", "nv12", "gray")) and self.depth == 8
        luma = _plane((frame if planar else frame.reformat(format="gray", threads=1)).planes[0])
        rows = luma[:: max(1, luma.shape[0] // LINES)].astype(np.float32)
        columns = luma[:, :: max(1, luma.shape[1] // LINES)].T.astype(np.float32)
        words = text_blocks(rows)
        kept = words if self._words is None or self._words.shape != words.shape else words & self._words
        self._words = words
        self._looks["look"].append(len(self.times))
        self._looks["blur"].append(focus([rows[::2], columns[::2]]))
        self._looks["text"].append(float(kept.mean()))
        self._looks["blocks"].append(blockiness(rows))

    def _printed(self, time: Fraction) -> bool:
        """Whether this frame is the next to be printed."""
        if time < self._next_print:
            return False
        while self._next_print <= time:
            self._next_print += Fraction(1, PICTURES)
        return True

    def _measure(self) -> None:
        luma, chroma = np.stack(self._luma), np.stack(self._chroma)
        self._luma, self._chroma = [], []
        if self.turned:
            luma, chroma = luma.transpose(0, 2, 1), chroma.transpose(0, 1, 3, 2)
        cells = _cells(luma)
        thumbs = _thumbs(cells, chroma)
        self._thumbs.append(thumbs)
        first = len(self.times) - len(cells)
        chosen = [i for i in range(len(cells)) if self._printed(self.times[first + i])]
        prints, colours = picture_prints(cells[chosen], thumbs[chosen])
        self._prints.append((np.array(chosen, np.int32) + first, prints, colours))
        count = luma[0].size
        columns = {
            "level": cells.mean(axis=(1, 2)),
            "dark": 255 * _counted(luma <= DARK) / count,
            "bright": 255 * _counted(luma >= BRIGHT) / count,
        }
        columns["bars"], columns["edges"] = _bars(luma)
        known = cells[:1] if self._cells is None else self._cells
        stack = np.concatenate([known, cells])
        fresh = stack[-len(cells) - 1 :]
        motion, moving = flow(fresh)
        columns |= {"change": np.abs(np.diff(fresh, axis=0)).mean(axis=(1, 2)), "motion": motion}
        columns |= {"moving": 255 * moving, "impulse": impulse_of(stack)[1:-1]}
        if self._cells is None:  # nothing comes before the first frame
            columns["impulse"][0] = 0
        else:
            columns["impulse"] = columns["impulse"][-len(cells) :]
        self._cells = stack[-2:]
        small = {"level", "dark", "bright", "moving", "bars", "edges"}
        for name, values in columns.items():
            kind = np.uint8 if name in small else np.float16
            self._traces.setdefault(name, []).append(
                np.rint(values).astype(kind) if name in small else values.astype(kind)
            )


def flow(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F + 1, h, w) brightness -> (F,) mean displacement in picture heights, and (F,) share of blocks that move.

    Least squares on the gradients of 5 x 10 blocks (Lucas and Kanade), averaged over what has structure to be seen
    moving; where that gives more than a cell and a half, the answer at a quarter of the resolution, which follows up
    to about an eighth of the height, stands instead.
    """
    fine, seen = _block_flow(cells)
    if min(cells.shape[1:]) >= 32:
        height, width = (side // 4 * 4 for side in cells.shape[1:])
        quarter = cells[:, :height, :width].reshape(len(cells), height // 4, 4, width // 4, 4).mean(axis=(2, 4))
        coarse = 4 * _block_flow(quarter)[0]
        fine = np.where(np.maximum(coarse, fine) > 1.5, np.maximum(coarse, fine), fine)
    weight = seen / np.maximum(seen.sum(axis=(1, 2), keepdims=True), 1e-6)
    return (weight * fine).sum(axis=(1, 2)) / cells.shape[1], (fine > 0.1).mean(axis=(1, 2))


def _block_flow(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F + 1, h, w) -> (F, 5, 10) lengths of displacement in cells, and how much structure tells of it, 0 to 1."""
    middle = (cells[1:] + cells[:-1]) / 2
    dx = (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2]) / 2
    dy = (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]) / 2
    dt = (cells[1:] - cells[:-1])[:, 1:-1, 1:-1]
    down, along = (_averages(side, parts) for side, parts in zip(dx.shape[1:], (5, 10), strict=True))
    xx, xy, yy, xt, yt = (down @ product @ along.T for product in (dx * dx, dx * dy, dy * dy, dx * dt, dy * dt))
    seen = (xx + yy) / (xx + yy + 4.0)
    xx, yy = xx + 0.5, yy + 0.5  # noise of less than a level: blocks without structure do not move
    inverse = 1 / (xx * yy - xy * xy)
    return np.hypot((yy * xt - xy * yt) * inverse, (xx * yt - xy * xt) * inverse), seen


def focus(lines: list[np.ndarray]) -> float:
    """(N, L) luma along rows and along columns -> standard deviation in pixels of the blur of the strongest edges.

    An edge blurred by s has a gradient of height 1 / s. After blurs by FINE and COARSE the ratio of heights is
    R^2 = (s^2 + COARSE^2) / (s^2 + FINE^2), which gives s. nan where there is no edge.
    """
    widths = []
    for line in lines:
        if line.shape[1] < 32:
            continue
        fine = _smooth((line[:, 2:] - line[:, :-2]) / 2, FINE, 3)
        coarse = np.abs(_smooth(fine, np.sqrt(COARSE**2 - FINE**2), 6))
        fine = np.abs(fine[:, 6:-6])
        level = max(2.0, 0.4 * float(np.quantile(fine[::4], 0.998)))
        rows, places = np.nonzero(fine[:, 1:-1] > level)
        value = fine[rows, places + 1]
        top = (value >= fine[rows, places]) & (value > fine[rows, places + 2])
        widths.append((value[top] / np.maximum(coarse[rows[top], places[top] + 1], 1e-3)) ** 2)
    ratio = np.concatenate(widths) if widths else np.zeros(0)
    if len(ratio) < 8:
        return float("nan")
    ratio = max(float(np.median(ratio)), 1 + 1e-3)
    width = (COARSE**2 - ratio * FINE**2) / (ratio - 1)
    return float(np.sqrt(max(width - 0.33, 0.0)))  # the difference over two pixels widens an edge by itself


def _smooth(lines: np.ndarray, sigma: float, reach: int) -> np.ndarray:
    """(N, L) -> (N, L - 2 reach) blurred by a Gaussian."""
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    out = lines[:, reach:-reach] * taps[reach]
    for shift in range(1, reach + 1):
        pair = lines[:, reach - shift : -reach - shift] + lines[:, reach + shift : lines.shape[1] - reach + shift]
        out += pair * taps[reach + shift]
    return out


def text_blocks(rows: np.ndarray) -> np.ndarray:
    """(N, W) luma of rows -> (N, GRID) whether a block of a row looks like writing.

    Writing has two levels and few between, and changes between them at least three times either way within a block;
    two blocks in a row must do so.
    """
    width = rows.shape[1] // GRID
    if width < 8:
        return np.zeros((len(rows), GRID), bool)
    blocks = rows[:, : width * GRID].reshape(len(rows), GRID, width)
    low, high = blocks.min(axis=2, keepdims=True), blocks.max(axis=2, keepdims=True)
    place = (blocks - low) / np.maximum(high - low, 1)
    upper = place > 0.5
    strokes = np.count_nonzero(upper[..., 1:] & ~upper[..., :-1], axis=2)
    between = np.count_nonzero((place > 0.2) & (place < 0.8), axis=2) / width
    found = (strokes >= 3) & (between < 0.4) & ((high - low)[..., 0] > 80)
    pair = found[:, :-1] & found[:, 1:]
    return np.pad(pair, ((0, 0), (0, 1))) | np.pad(pair, ((0, 0), (1, 0)))


def blockiness(rows: np.ndarray) -> float:
    """(N, W) luma of rows -> share of places 8 pixels apart with a small step of their own, beyond any other phase.

    A step of 2 to 24 levels, at least twice those beside it, is what coding in blocks leaves in smooth parts; edges
    of things are higher, and fall on all phases alike.
    """
    step = np.abs(np.diff(rows, axis=1))
    own = step[:, 1:-1]
    lone = (own >= 2) & (own <= 24) & (own > 2 * np.maximum(step[:, :-2], step[:, 2:]))
    share = lone.mean(axis=0)
    if len(share) < 64:
        return 0.0
    phases = np.sort(share[: len(share) // 8 * 8].reshape(-1, 8).mean(axis=0))
    return float(phases[-1] - phases[-2])


def _plane(plane: object) -> np.ndarray:
    """(H, W) uint8 view of a plane of 8 bits."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _cells(luma: np.ndarray) -> np.ndarray:
    """(F, h, w) uint8 -> float32 averages, of about 48 rows, as media.sync takes them."""
    if min(luma.shape[1:]) < 72:
        return luma.astype(np.float32)
    height, width = (side // 2 * 2 for side in luma.shape[1:])
    four = luma[:, :height:2, :width:2].astype(np.uint16)
    for top, left in ((1, 0), (0, 1), (1, 1)):
        four += luma[:, top:height:2, left:width:2]
    return four.astype(np.float32) / 4


def _thumbs(cells: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """(F, h, w) brightness and (F, 2, h', w') chroma -> (F, 9, 16, 3) uint8 RGB averages."""
    luma = _averages(cells.shape[1], THUMB[0]) @ cells @ _averages(cells.shape[2], THUMB[1]).T
    down, along = _averages(chroma.shape[2], THUMB[0]), _averages(chroma.shape[3], THUMB[1])
    blue, red = (down @ (chroma.astype(np.float32) - 128) @ along.T).swapaxes(0, 1)
    rgb = np.stack([luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue], axis=-1)
    return np.rint(rgb.clip(0, 255)).astype(np.uint8)


def _averages(size: int, parts: int) -> np.ndarray:
    """(parts, size) float32: rows that average neighbours into `parts` equal stretches."""
    edges = np.linspace(0, size, parts + 1)
    places = np.arange(size)
    overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    return (np.maximum(overlap, 0) * parts / size).astype(np.float32)


def _counted(mask: np.ndarray) -> np.ndarray:
    """(F, h, w) -> (F,) how many are true."""
    return np.bitwise_count(np.packbits(mask.reshape(len(mask), mask[0].size), axis=1)).sum(axis=1)


def _bars(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F, h, w) -> (F, 4) black rows above and below, columns left and right, all 255 for a black frame; their edges.

    An edge, (F, 4): how many levels the second line within is brighter than the bar, on average along it. A bar ends at
    once over its whole length; a dark scene fades.
    """
    bars, edges = [], []
    for axis in (2, 1):
        lit, mean = luma.max(axis=axis) > BAR, luma.mean(axis=axis)
        for way in (slice(None), slice(None, None, -1)):
            place = lit[:, way].argmax(axis=1)
            within = np.minimum(place + 1, mean.shape[1] - 1)[:, None]
            bars.append(place)
            edges.append(np.take_along_axis(mean[:, way], within, axis=1)[:, 0] - mean[:, way][:, 0])
    bars, edges = np.stack(bars, axis=1), np.stack(edges, axis=1).clip(0, 255)
    bars[~lit.any(axis=1)] = 255
    return bars, edges
