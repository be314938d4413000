"""From shards to training samples: just the range that is needed, decoded from where it lies, at the size it is needed.

Free of torch until a sample is asked for, so that a worker which only decodes starts in a fraction of a second.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from soundstage.core.errors import Caution, ConfigError
from soundstage.data.buckets import Buckets
from soundstage.data.manifest import FILM, SOUND, Manifest, read_manifest
from soundstage.data.places import Member
from soundstage.data.shapes import ClipShape
from soundstage.media import decode

if TYPE_CHECKING:
    from soundstage.data.batches import Labels
    from soundstage.data.records import Sample, SourceConfig

__all__ = ["Raw", "ShardSource", "Shards", "Window", "source_of"]

MODALITIES = ("video", "audio")
THREADS = 1


@dataclass(frozen=True, eq=False)
class Raw:
    """One clip as decoded. frames: (F, H, W, 3) uint8; wave: (channels, samples) float32 in [-1, 1]; None = absent.

    sample_rate: of the wave. facts: what is known of the clip, such as what the scan measured.
    """

    frames: np.ndarray | None
    wave: np.ndarray | None
    caption: str
    id: str
    sample_rate: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a clip, and all that a worker needs to know to decode it.

    film, sound: what to read picture and sound from; a sound of None is that of the film, where it is wanted.
    start: seconds, on a whole frame. cover: (height, width) of the file's aspect that covers the shape.
    """

    film: Path | Member | None
    sound: Path | Member | None
    start: Fraction
    shape: ClipShape
    cover: tuple[int, int] | None
    modalities: tuple[str, ...]
    caption: str
    id: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def read(self) -> Raw:
        """The window, in exactly its shape: an end that a file lacks is made up by its last frame, and by silence.

        Raises MediaError for a file that is damaged within it.
        """
        shape, frames, wave = self.shape, None, None
        span = {"start": self.start, "end": self.start + shape.seconds}
        heard = {"sample_rate": shape.sample_rate, "channels": shape.channels}
        if "video" in self.modalities:
            assert self.film is not None
            both = "audio" in self.modalities and self.sound is None
            asked = {**span, "fps": shape.rate, "size": self.cover, "threads": THREADS}
            clip = decode.read(self.film, **asked, audio=both, **(heard if both else {}))
            frames, wave = _fitted(_centre(clip.frames, shape.size), shape.num_frames), clip.wave
        if "audio" in self.modalities and wave is None:
            source = self.sound or self.film
            assert source is not None
            wave = decode.read(source, **span, video=False, **heard).wave
        if wave is not None:
            wave = np.pad(wave[:, : shape.samples], ((0, 0), (0, max(0, shape.samples - wave.shape[1]))))
        return Raw(frames, wave, self.caption, self.id, shape.sample_rate, self.facts)


@dataclass(frozen=True)
class Shards:
    """Clips of the shards at `url`: a folder, or s3:// and the like.

    where: SQL on the manifest, "category = 'music' and duration > 5" (None = all). hop: seconds between the starts of
    two windows of a clip (None = they touch). buckets: several shapes instead of one. modalities: what is read; a clip
    that lacks one, or is shorter than a window, is left out with a warning that counts them.
    """

    url: str
    where: str | None = None
    hop: float | None = None
    buckets: Buckets | None = None
    modalities: tuple[str, ...] = MODALITIES

    def build(self, shape: ClipShape) -> ShardSource:
        """Read the manifest; raises ConfigError where no window can be had."""
        return ShardSource(self, shape)


class ShardSource:
    """The windows of all clips, in the order of the shards; known from the manifest, without opening a shard."""

    def __init__(self, config: Shards, shape: ClipShape) -> None:
        self._config = config
        self._manifest = read_manifest(config.url)
        self.shapes = config.buckets.shapes(shape) if config.buckets else (shape,)
        self._rows = self._chosen()
        self._number, self._counts = self._windows(self._rows)
        self._ends = np.cumsum(self._counts)
        self.size: int | None = int(self._ends[-1]) if len(self._ends) else 0
        if not self.size:
            raise ConfigError(
                f"shards: none of {len(self._manifest)} clips in {config.url} gives a window of "
                f"{float(self.shapes[0].seconds):g} s with {' and '.join(config.modalities)}; "
                "add clips, ask for shorter ones, or set modalities="
            )
        told = (self._manifest.key, config.where, config.hop, config.modalities, self.shapes)
        self.key = sha256(repr(told).encode()).hexdigest()

    @property
    def manifest(self) -> Manifest:
        """What the shards hold."""
        return self._manifest

    def window(self, index: int) -> Window:
        """What to decode for sample `index`."""
        row, place, shape = self._at(index)
        start = self._start(place, shape)
        members, names = self._manifest.members(row), self._config.modalities
        film = next((members[ext] for ext in FILM if ext in members), None)
        sound = next((members[ext] for ext in SOUND if ext in members), None) if "audio" in names else None
        caption, name = self.words(index)
        cover = None
        if "video" in names:
            sides = (int(self._manifest.column(side)[row].as_py()) for side in ("height", "width"))
            cover = covering(tuple(sides), shape.size)  # type: ignore[arg-type]
        facts = json.loads(self._manifest.column("facts")[row].as_py())
        return Window(film, sound, start, shape, cover, names, caption, name, facts)

    def item(self, index: int) -> Sample:
        """Window `index`, decoded; raises MediaError for a file that is damaged within it."""
        from soundstage.data.records import sample_of

        return sample_of(self.window(index).read())

    def words(self, index: int) -> tuple[str, str]:
        """Caption and name of a sample, without decoding it."""
        row, place, shape = self._at(index)
        key = self._manifest.column("key")[row].as_py()
        return self._manifest.column("caption")[row].as_py() or "", f"{key}@{float(self._start(place, shape)):g}s"

    def digest(self, index: int) -> str:
        """What the pictures and sounds of a sample follow from: content of its files, and the place of the window."""
        row, place, shape = self._at(index)
        members = {member["ext"]: member["sha256"] for member in self._manifest.column("members")[row].as_py()}
        media = {ext: members[ext] for ext in (*FILM, *SOUND) if ext in members}
        return repr((media, str(self._start(place, shape)), self._config.modalities))

    def labels(self) -> Labels:
        """Shape, category and length of every sample."""
        from soundstage.data.batches import Labels

        rows = np.repeat(self._rows, self._counts)
        category = self._manifest.texts("category")
        seconds = self._manifest.numbers("duration")[rows]
        return Labels(self.shapes, np.repeat(self._number, self._counts), [category[row] for row in rows], seconds)

    def _chosen(self) -> np.ndarray:
        """(M,) rows of the manifest."""
        if self._config.where is None:
            return np.arange(len(self._manifest))
        from soundstage.data.index import chosen

        return chosen(self._manifest, self._config.where)

    def _windows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(M,) number of the shape, and (M,) windows, of each chosen clip."""
        length = np.min([self._manifest.numbers(f"{name}_seconds")[rows] for name in self._config.modalities], axis=0)
        lacking = np.isnan(length)
        room = np.where(lacking, 0.0, length)
        slack = float(1 / self.shapes[0].rate) / 2  # a stream may end half a frame early
        lengths = np.array([float(shape.seconds) for shape in self.shapes])
        if self._config.buckets:
            sides = (self._manifest.numbers(side)[rows] for side in ("width", "height"))
            number = self._config.buckets.assign(self.shapes, *sides, room)
        else:
            number = np.where(room + slack >= lengths[0], 0, -1)
        hop = lengths[number] if self._config.hop is None else float(self._config.hop)
        counts = np.where(number < 0, 0, np.floor((room + slack - lengths[number]) / hop + 1e-9).astype(np.int64) + 1)
        short = int(((number < 0) & ~lacking).sum())
        if lacking.any() or short:
            names = " or ".join(self._config.modalities)
            warnings.warn(
                f"{self._config.url}: of {len(rows)} clips, {int(lacking.sum())} lack {names} and {short} are shorter "
                f"than {lengths.min():g} s; they are left out",
                Caution,
                stacklevel=5,
            )
        return number, counts

    def _at(self, index: int) -> tuple[int, int, ClipShape]:
        """Row in the manifest, number of the window in its clip, and shape, of a sample."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        if index < 0 or which >= len(self._ends):
            raise IndexError(f"sample {index} of {self.size}")
        place = index - int(self._ends[which] - self._counts[which])
        return int(self._rows[which]), place, self.shapes[self._number[which]]

    def _start(self, place: int, shape: ClipShape) -> Fraction:
        """Seconds at which a window starts, on a whole frame."""
        hop = shape.seconds if self._config.hop is None else Fraction(str(self._config.hop))
        return round(place * hop * shape.rate) / shape.rate


def source_of(text: str, modalities: tuple[str, ...] = MODALITIES) -> SourceConfig:
    """The source that "folder:PATH" or "shards:URL" names. Raises ConfigError for another text."""
    kind, _, rest = text.partition(":")
    if kind == "shards" and rest:
        return Shards(rest, modalities=modalities)
    if kind == "folder" and rest:
        from soundstage.data.folder import Folder

        return Folder(rest, modalities=modalities)
    raise ConfigError(
        f"data: {text!r} is not folder:PATH, a folder of clips with a .txt beside each, or shards:URL, what soundstage "
        "data pack wrote"
    )


def covering(have: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the aspect of `have` that covers `size`."""
    scale = max(Fraction(size[0], have[0]), Fraction(size[1], have[1]))
    return max(size[0], round(have[0] * scale)), max(size[1], round(have[1] * scale))


def _centre(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle (height, width) of (F, H, W, 3)."""
    top, left = ((have - want) // 2 for have, want in zip(frames.shape[1:3], size, strict=True))
    return frames[:, top : top + size[0], left : left + size[1]]


def _fitted(frames: np.ndarray, num: int) -> np.ndarray:
    """(num, H, W, 3): cut, or made longer by the last frame."""
    short = num - len(frames)
    return frames[:num] if short <= 0 else np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
