"""Picture and sound of a whole file, decoded side by side in one pass, as measuring wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from soundstage.media.decode import _check_end, _Stream
from soundstage.media.errors import MediaError
from soundstage.media.geometry import half_up
from soundstage.media.probe import Source, find, import_av, open_file, read_tags, stream_rate

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.video.frame import VideoFrame

HOLE = 20  # a step between timestamps above 1 / HOLE seconds is a hole in the sound; a smaller one is rounding


@dataclass(frozen=True)
class Streams:
    """An open file; iterating decodes it once: (seconds, VideoFrame), or (None, (channels, samples) float32).

    The pictures come with the seconds at which they are shown; the sound is one wave in pieces, from second 0 on, its
    holes filled with silence. Raises MediaError for what is damaged, or shorter than its header declares.
    video, audio: the source of either, or None. format: the container's name; bit_rate: bits per second of the file.
    """

    path: Path
    video: Source | None
    audio: Source | None
    format: str
    bit_rate: int
    tags: dict[str, str]

    @property
    def fps(self) -> Fraction | None:
        """Frames per second of the picture; None without one."""
        return None if self.video is None else stream_rate(self.video.stream)

    @property
    def sample_rate(self) -> int | None:
        """Samples per second of the sound; None without one."""
        return None if self.audio is None else self.audio.stream.codec_context.sample_rate

    def __iter__(self) -> Iterator[tuple[Fraction, VideoFrame] | tuple[None, np.ndarray]]:
        av = import_av()
        sources = [source for source in (self.video, self.audio) if source is not None]
        shown = _Stream(fps=self.fps or Fraction(25), packets=0)
        heard = None if self.audio is None else _Wave(self.path, self.audio)
        if self.video is not None:
            shown.tick = min(Fraction(self.video.stream.time_base), 1 / (4 * shown.fps))
        time = -1 / shown.fps
        for packet in sources[0].container.demux([source.stream for source in sources]):
            if heard is not None and packet.stream.type == "audio":
                for frame in packet.decode():
                    yield from ((None, piece) for piece in heard.add(frame))
            elif self.video is not None and not shown.fault:
                shown.packets += packet.size > 0
                base = packet.stream.time_base
                try:
                    frames = packet.decode()
                except av.error.FFmpegError as error:
                    shown.fault = error.strerror or "damaged"
                    continue
                for frame in frames:
                    stamp = frame.pts if frame.pts is not None else frame.dts
                    time = time + 1 / shown.fps if stamp is None else stamp * base - self.video.origin
                    shown.end = time + (frame.duration * base if frame.duration else 1 / shown.fps)
                    yield time, frame
        if heard is not None:
            heard.close()
        if self.video is not None:
            _check_end(self.path, self.video, shown, None)


@contextmanager
def streams(path: str | Path, *, threads: int = 1) -> Iterator[Streams]:
    """Open a file that holds picture, sound or both. threads: of each decoder. Raises MediaError."""
    path = Path(path)
    with open_file(path, "video") as container:
        video, audio = find(container, "video"), find(container, "audio")
        if video is None and audio is None:
            raise MediaError("holds neither picture nor sound", remedy="choose another file", path=path)
        for source in (video, audio):
            if source is not None:
                source.stream.codec_context.thread_count = threads
        yield Streams(path, video, audio, container.format.name, container.bit_rate or 0, read_tags(path, container))


class _Wave:
    """Joins decoded sound into one wave without gap or overlap."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self.rate, self.position = source.stream.codec_context.sample_rate, 0
        self.end = None if source.end is None else half_up(source.end * self.rate)
        self.to_float = import_av().AudioResampler(format="fltp")

    def add(self, frame: AudioFrame) -> Iterator[np.ndarray]:
        if frame.format.name == "fltp":
            block = np.stack([np.frombuffer(plane, np.float32)[: frame.samples] for plane in frame.planes])
        else:
            block = np.concatenate([part.to_ndarray() for part in self.to_float.resample(frame)], axis=1)
        position, rate, stamp = self.position, self.rate, self.position
        if frame.pts is not None:
            stamp = half_up((frame.pts * self.source.stream.time_base - self.source.origin) * rate)
        far = position == 0 or abs(stamp - position) > rate // HOLE
        while far and stamp > self.position and (self.end is None or self.position < self.end):
            yield self._count(np.zeros((len(block), min(rate, stamp - self.position)), np.float32))
        if far and stamp < position:
            block = block[:, position - stamp :]
        block = block if self.end is None else block[:, : max(self.end - self.position, 0)]
        if block.shape[1]:
            yield self._count(block)

    def _count(self, piece: np.ndarray) -> np.ndarray:
        self.position += piece.shape[1]
        return piece

    def close(self) -> None:
        """Refuse sound that stopped a quarter of a second or more before what its header declares."""
        if self.end is not None and self.position < self.end - self.rate // 4:
            declared, stops = self.end / self.rate, self.position / self.rate
            reason = f"header declares {declared:.3f} s of sound but it stops at {stops:.3f} s (truncated or damaged)"
            raise MediaError(reason, remedy="write or download it again", path=self.path)
