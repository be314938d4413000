"""Stage "views": a standard form of every clip for training, beside the native file, with the same bytes every run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import ClassVar

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item, Poison
from soundstage.media.clip import Clip
from soundstage.media.decode import read
from soundstage.media.encode import write
from soundstage.media.errors import MediaError
from soundstage.media.frames import crop
from soundstage.media.probe import probe
from soundstage.media.waves import normalise_loudness

__all__ = ["SIZES", "Views", "bucket"]

SIZES = ((480, 832), (544, 720), (640, 640), (720, 544), (832, 480))


@dataclass(frozen=True)
class Views:
    """Adds the file "view" and the fact "view" {"height", "width", "fps", "sample_rate", "loudness"}.

    sizes: (height, width) to choose from by proportions; the picture is scaled to cover and cropped in the middle.
    fps, sample_rate, channels: of the view; None keeps the file's. loudness: LUFS, None leaves the level alone.
    suffix: ".mp4" or ".webm". crf, preset: of the encoder, which runs on `threads` threads (the bytes depend on it).
    """

    sizes: tuple[tuple[int, int], ...] = SIZES
    fps: str | None = "24"
    sample_rate: int | None = 48_000
    channels: int | None = 2
    loudness: float | None = -23.0
    suffix: str = ".mp4"
    crf: int = 18
    preset: str = "veryfast"
    threads: int = 1
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        odd = [size for size in self.sizes if len(size) != 2 or min(size) < 2 or size[0] % 2 or size[1] % 2]
        if not self.sizes or odd:
            raise ConfigError(f"Views.sizes: {odd or self.sizes} are not even (height, width); give at least one")

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        start, end = item.facts.get("span") or (0.0, None)
        try:
            clip = self.view(item.files["media"], start, end)
            path = write(clip, folder / f"view{self.suffix}", crf=self.crf, preset=self.preset, threads=self.threads)
        except MediaError as error:
            raise Poison(f"{error.reason}; {error.remedy}") from error
        height, width = clip.frames.shape[1:3] if clip.frames is not None else (None, None)
        about = {"height": height, "width": width, "fps": None if clip.fps is None else str(clip.fps)}
        about |= {"sample_rate": clip.sample_rate, "loudness": self.loudness if clip.wave is not None else None}
        yield item.child({"view": path}, view=about)

    def view(self, path: Path, start: float = 0.0, end: float | None = None) -> Clip:
        """The clip of a file as it is written. Raises MediaError."""
        video = probe(path).video
        options = {"start": start, "end": end, "sample_rate": self.sample_rate, "channels": self.channels}
        if video is None:
            clip = read(path, video=False, **options)
        else:
            size = bucket((video.height, video.width), self.sizes)
            factor = max(size[0] / video.height, size[1] / video.width)
            cover = tuple(
                max(part, round(side * factor)) for part, side in zip(size, (video.height, video.width), strict=True)
            )
            clip = read(path, fps=self.fps, size=cover, threads=self.threads, **options)
            clip = replace(clip, frames=crop(clip.frames, size))
        if clip.wave is not None and self.loudness is not None:
            wave = normalise_loudness(clip.wave, clip.sample_rate, target=self.loudness)
            clip = replace(clip, wave=wave)
        return replace(clip, metadata={})


def bucket(size: tuple[int, int], sizes: tuple[tuple[int, int], ...] = SIZES) -> tuple[int, int]:
    """The (height, width) of `sizes` nearest in proportions; the larger one of equals that need no enlarging."""

    def unlike(other: tuple[int, int]) -> tuple[float, float, int]:
        apart = abs(log(size[0] / size[1]) - log(other[0] / other[1]))
        enlarged = max(1.0, other[0] / size[0], other[1] / size[1])
        return round(apart, 6), enlarged, -other[0] * other[1]

    return min(sizes, key=unlike)
