"""What a media file holds, and the one place that opens files for reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from soundstage.media.errors import MediaError
from soundstage.media.geometry import NTSC_BASES

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.frame import VideoFrame

Kind = Literal["video", "audio"]

# Containers that hold media themselves. Play lists, which name other files or addresses, are left out on purpose.
FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,nut,ivf,h264,hevc,m4v,dv,yuv4mpegpipe,"
    "wav,w64,aiff,caf,flac,mp3,aac,ac3,eac3,gif,apng,image2,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
)
FRAME_FILES, SOUND_FILE, CLIP_FILE = "%06d.png", "sound.wav", "clip.json"
BUFFER = 2**17
"""Bytes that a container reads at a time."""
CONTAINER_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time", "duration"}


@runtime_checkable
class Stored(Protocol):
    """A media file that is no file of its own, such as a member of an archive. Its path is what messages call it."""

    def open_bytes(self) -> BinaryIO: ...

    def __fspath__(self) -> str: ...


@dataclass(frozen=True)
class VideoInfo:
    """One picture stream. height, width: pixels as shown, after rotation (degrees counter-clockwise)."""

    codec: str
    height: int
    width: int
    rotation: int
    fps: Fraction
    variable_rate: bool
    bit_depth: int
    pixel_format: str
    duration: float
    declared_frames: int | None


@dataclass(frozen=True)
class AudioInfo:
    """One sound stream; duration in seconds."""

    codec: str
    sample_rate: int
    channels: int
    layout: str
    duration: float


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds: its best picture and sound streams (None where there is none), seconds, container tags."""

    path: Path | Stored
    format: str
    duration: float
    video: VideoInfo | None
    audio: AudioInfo | None
    metadata: dict[str, str]
    num_streams: int


class Source(NamedTuple):
    """An open stream. Times in a file count from `origin`, its earliest presentation time in seconds.

    end: seconds from `origin` at which the header says the stream ends, or None where it does not say.
    """

    container: InputContainer
    stream: Stream
    origin: Fraction
    end: Fraction | None


def import_av() -> ModuleType:
    """PyAV, or MediaError with the command that installs it."""
    try:
        import av
    except ImportError:
        raise MediaError("PyAV is not installed", remedy='pip install "soundstage[media]"') from None
    return av


def located(path: str | Path | Stored) -> Path | Stored:
    """A path as one, what is stored as it is."""
    return path if isinstance(path, Stored) else Path(path)


def probe(path: str | Path | Stored) -> MediaInfo:
    """Read the header and the first frame of `path` (a file, or an image folder). Raises MediaError."""
    path = located(path)
    video = audio = None
    with open_file(path, "video") as container:
        name, tags, count = container.format.name, read_tags(path, container), len(container.streams)
        source = find(container, "video")
        if source is not None:
            video = _video_info(path, source)
    with open_file(path, "audio") if has_file(path, "audio") else open_file(path, "video") as container:
        source = find(container, "audio")
        if source is not None:
            context, end = source.stream.codec_context, float(source.end or 0)
            codec, layout = context.codec.canonical_name, context.layout.name
            audio = AudioInfo(codec, context.sample_rate, context.channels, layout, end)
    if video is None and audio is None:
        raise MediaError("holds neither picture nor sound", remedy="choose another file", path=path)
    duration = max(stream.duration for stream in (video, audio) if stream is not None)
    return MediaInfo(path, name, duration, video, audio, tags, count)


def has_file(path: Path | Stored, kind: Kind) -> bool:
    """Whether there is a file to open for this kind (an image folder may have no sound file)."""
    return isinstance(path, Stored) or not path.is_dir() or kind == "video" or (path / SOUND_FILE).exists()


@contextmanager
def open_file(path: Path | Stored, kind: Kind) -> Iterator[InputContainer]:
    """Open the file of `path` that holds `kind`; every failure while it is open becomes a MediaError."""
    av = import_av()
    options: dict[str, str] = {"format_whitelist": FORMATS}
    file: str | BinaryIO = ""
    name, fault = None, "is not a media file of a known kind"
    try:
        if isinstance(path, Stored):
            file = path.open_bytes()
        else:
            file, name = _file(path, kind, options)
        with av.open(file, format=name, options=options, metadata_errors="replace", buffer_size=BUFFER) as container:
            fault = "is damaged"
            yield container
    except av.error.FFmpegError as error:
        if isinstance(error, av.error.DecoderNotFoundError):
            reason, remedy = f"has no decoder ({error.strerror})", "convert it to h264/aac mp4"
        else:
            reason = f"{fault} ({error.strerror})"
            remedy = "check that it plays elsewhere, or write or download it again"
        raise MediaError(reason, remedy=remedy, path=path) from error
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise MediaError(reason, remedy="check the path and its rights", path=path) from error
    finally:
        if not isinstance(file, str):
            file.close()


def _file(path: Path, kind: Kind, options: dict[str, str]) -> tuple[str, str | None]:
    """Name and format (None = by content) of the file to open; adds to the options. Raises MediaError."""
    if path.is_dir() and kind == "audio":
        return str(path / SOUND_FILE), None
    if path.is_dir():
        if not (path / (FRAME_FILES % 0)).exists():
            reason = f"folder holds no {FRAME_FILES % 0}"
            raise MediaError(reason, remedy="give a file or an image folder", path=path)
        options |= {"framerate": _folder(path).get("fps", "24"), "start_number": "0"}
        return str(path).replace("%", "%%") + "/" + FRAME_FILES, "image2"
    if not path.exists():
        raise MediaError("no such file", remedy="check the path", path=path)
    if path.stat().st_size == 0:
        raise MediaError("file is empty", remedy="write or download it again", path=path)
    return str(path), None


def find(container: InputContainer, kind: Kind) -> Source | None:
    """The best stream of a kind (the largest picture, and the sound that belongs to it), or None. Cover art is none."""
    streams = [stream for stream in container.streams if _is_media(stream)]
    video = container.streams.best("video") if any(stream.type == "video" for stream in streams) else None
    stream = video if kind == "video" else container.streams.best("audio", related=video)
    if stream is None:
        return None
    starts = [s.start_time * s.time_base for s in streams if s.start_time is not None]
    origin = max(Fraction(0), min(starts, default=Fraction(0)))
    return Source(container, stream, origin, _declared_end(container, stream, origin))


def read_tags(path: Path | Stored, container: InputContainer) -> dict[str, str]:
    """The tags a person wrote (title, comment, ...), with lower-case keys."""
    folder = not isinstance(path, Stored) and path.is_dir()
    tags = _folder(path).get("metadata", {}) if folder else container.metadata
    return {key.lower(): value for key, value in tags.items() if key.lower() not in CONTAINER_TAGS}


def stream_rate(stream: Stream) -> Fraction:
    """Frames per second of a picture stream: the NTSC rate when within rounding of one; 25 when nothing is known."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    for base in NTSC_BASES:
        if abs(rate - Fraction(base * 1000, 1001)) < Fraction(1, 1000):
            return Fraction(base * 1000, 1001)
    return Fraction(rate)


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d), each -1, 0 or 1: pixel (x, y) is shown at (a x + c y, b x + d y), up to a translation."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5] / 65536
    if abs(a) < abs(b):
        return 0, int(np.sign(b)), int(np.sign(c)), 0
    return int(np.sign(a)), 0, 0, int(np.sign(d))


def _is_media(stream: Stream) -> bool:
    attached = stream.type == "video" and "attached_pic" in str(stream.disposition)
    return stream.type in ("video", "audio") and not attached


def _folder(path: Path) -> dict:
    file = path / CLIP_FILE
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise MediaError(f"is not JSON ({error})", remedy="write the folder again", path=file) from error


def _declared_end(container: InputContainer, stream: Stream, origin: Fraction) -> Fraction | None:
    if stream.duration is not None:
        return (stream.duration + (stream.start_time or 0)) * stream.time_base - origin
    clock = stream.metadata.get("DURATION", "")
    if clock.count(":") == 2:  # Matroska: HH:MM:SS.fraction
        hours, minutes, seconds = (Fraction(part) for part in clock.split(":"))
        return (hours * 60 + minutes) * 60 + seconds - origin
    only = sum(_is_media(s) for s in container.streams) == 1
    return Fraction(container.duration, 1_000_000) if only and container.duration else None


def _video_info(path: Path | Stored, source: Source) -> VideoInfo:
    stream, fps = source.stream, stream_rate(source.stream)
    irregular = _irregular(source)
    source.container.seek(0)
    frame = next(source.container.decode(stream), None)
    if frame is None:
        raise MediaError("holds no frame", remedy="write or download it again", path=path)
    a, b, _, d = display_matrix(frame)
    height, width = (frame.height, frame.width) if a else (frame.width, frame.height)
    rotation = {(1, 0): 0, (0, -1): 90, (-1, 0): 180, (0, 1): 270}[(a or d, b)]
    depth = max(component.bits for component in frame.format.components)
    end = source.end if source.end is not None else 1 / fps
    codec, pixels = stream.codec_context.codec.canonical_name, frame.format.name
    return VideoInfo(codec, height, width, rotation, fps, irregular, depth, pixels, float(end), stream.frames or None)


def _irregular(source: Source, limit: int = 300) -> bool:
    """Whether frames are unevenly spaced by more than the rounding of timestamps, over the first `limit` frames."""
    stream = source.stream
    ticks = []
    for packet in source.container.demux(stream):
        if packet.pts is not None:
            ticks.append(packet.pts)
        if len(ticks) >= limit:
            break
    # Packets come in decoding order, so the last few of a part are not all of the last few in display order.
    shown = np.sort(np.array(ticks))[: limit - 16 if len(ticks) >= limit else None]
    gaps = np.diff(shown)
    return bool(len(gaps)) and float(gaps.max() - gaps.min()) > 2
