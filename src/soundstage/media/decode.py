"""Frame-accurate decoding of a whole file or a range of it; memory is bounded by the range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from soundstage.media.clip import Clip
from soundstage.media.errors import MediaError
from soundstage.media.geometry import Seconds, exact, frame_rate, half_up
from soundstage.media.probe import (
    Source,
    Stored,
    display_matrix,
    find,
    has_file,
    import_av,
    located,
    open_file,
    read_tags,
    stream_rate,
)
from soundstage.media.waves import resampler, to_channels

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

# A sound decoder carries state (overlap, noise generators) from packet to packet, so up to here a range is decoded from
# the beginning of the file (about 1 ms per second of sound) and equals the whole to the last bit. Later ranges start
# decoding this many seconds early.
SOUND_FROM_START, SOUND_LEAD = 60, 2
# Formats that do not stamp every frame: after a seek the times of frames would be guesses.
UNSTAMPED = {"mpeg", "mpegvideo", "h264", "hevc", "m4v"}


def read(
    path: str | Path | Stored,
    *,
    start: Seconds = 0.0,
    end: Seconds | None = None,
    fps: Seconds | None = None,
    size: tuple[int, int] | None = None,
    sample_rate: int | None = None,
    channels: int | None = None,
    video: bool = True,
    audio: bool = True,
    threads: int | None = None,
) -> Clip:
    """Decode the range [start, end) in seconds of `path` (a file, an image folder, or a member of an archive).

    fps: None keeps the frames of the file, with `Clip.times` where they are unevenly spaced. Otherwise frames are
        repeated or dropped, each shown within half a frame of its own time, and start and end move to whole frames.
    size: (height, width) in pixels after rotation; None keeps the file's. Scaled frames lie colour by colour in memory.
    sample_rate, channels: None keeps the file's.
    video: False leaves the picture out; True requires one.
    audio: False leaves the sound out; True takes it where there is any (with video=False: requires it).
    threads: of the picture's decoder; None lets it choose, 1 is right where many processes decode side by side.

    Second 0 of the clip is its first frame (or `start`, where frames are unevenly spaced), so that picture and sound
    keep their exact relation; consecutive ranges join without gap or overlap. A range shorter than a frame holds the
    frame on screen; one that passes the end of the file is cut there. Raises MediaError for a file that is missing,
    empty, damaged, shorter within the range than its header declares, or without what was asked.
    """
    path = located(path)
    first, last = _range(path, start, end)
    if not video and not audio:
        raise MediaError("neither picture nor sound was asked", remedy="leave video or audio True", path=path)
    shot = _Picture(fps=Fraction(25), zero=first, until=last)
    if video:
        shot = _read_picture(path, first, last, fps, size, threads)
    wave, rate = None, None
    if audio and has_file(path, "audio"):
        wave, rate = _read_sound(path, shot.zero, shot.until, sample_rate, channels, required=not video)
    elif not video:
        raise MediaError("holds no sound", remedy="leave video=True to read its picture", path=path)
    if not video:
        with open_file(path, "audio") as container:
            shot.tags = read_tags(path, container)
    return Clip(shot.frames, shot.fps if video else None, wave, rate, shot.times, shot.tags)


def frames(
    path: str | Path | Stored,
    *,
    start: Seconds = 0.0,
    end: Seconds | None = None,
    fps: Seconds | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (seconds in the file, (H, W, 3) uint8 RGB) one frame at a time; the arguments are those of `read`."""
    path = located(path)
    first, last = _range(path, start, end)
    for time, frame in _frames(path, first, last, fps, size, _Stream()):
        yield float(time), frame


@dataclass
class _Picture:
    """Decoded frames, and the part of the file's time that the sound must fill."""

    fps: Fraction
    zero: Fraction
    until: Fraction | None
    frames: np.ndarray | None = None
    times: np.ndarray | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class _Stream:
    """Facts about the picture stream, filled in while it is decoded.

    phase: seconds at which the picture starts. tick: seconds by which timestamps may be rounded.
    end: seconds at which the last frame decoded so far ends.
    packets: packets read, where decoding began at the beginning. fault: why decoding stopped early.
    tags: of the container. threads: of the decoder, asked for beforehand.
    """

    fps: Fraction = Fraction(25)
    phase: Fraction = Fraction(0)
    tick: Fraction = Fraction(0)
    end: Fraction | None = None
    packets: int | None = None
    fault: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    threads: int | None = None


def _range(path: Path | Stored, start: Seconds, end: Seconds | None) -> tuple[Fraction, Fraction | None]:
    first, last = exact(start, "start"), None if end is None else exact(end, "end")
    if first < 0 or (last is not None and last <= first):
        raise MediaError(f"range {start} to {end} s is empty", remedy="give 0 <= start < end", path=path)
    return first, last


def _read_picture(
    path: Path | Stored,
    first: Fraction,
    last: Fraction | None,
    fps: Seconds | None,
    size: tuple[int, int] | None,
    threads: int | None,
) -> _Picture:
    stream = _Stream(threads=threads)
    pictures, times = [], []
    for time, frame in _frames(path, first, last, fps, size, stream):
        pictures.append(frame)
        times.append(time)
    if not pictures:
        ends = f"ends at {float(stream.end):.3f} s" if stream.end else "holds no frame"
        remedy = "ask for an earlier range" if stream.end else "write or download it again"
        raise MediaError(f"no frame at {float(first):.3f} s: the picture {ends}", remedy=remedy, path=path)
    rate = stream.fps if fps is None else frame_rate(fps)
    phase = stream.phase if fps is None else Fraction(0)
    grid = phase + half_up((times[0] - phase) * rate) / rate
    even = grid - first < 1 / rate and all(abs(t - grid - n / rate) <= stream.tick for n, t in enumerate(times))
    zero, until = (grid, grid + len(times) / rate) if even else (first, last)
    if last is None or (until is not None and until < last - 1 / rate):
        until = last
    offsets = None if even else np.array([float(max(time - zero, Fraction(0))) for time in times])
    return _Picture(rate, zero, until, _stack(pictures), offsets, stream.tags)


def _stack(pictures: list[np.ndarray]) -> np.ndarray:
    """np.stack that lets go of each frame once copied, so that the peak stays near one copy; each colour together where
    frames have it so."""
    height, width, _ = pictures[0].shape
    if pictures[0].flags.c_contiguous:
        out = np.empty((len(pictures), height, width, 3), np.uint8)
    else:
        out = np.empty((3, len(pictures), height, width), np.uint8).transpose(1, 2, 3, 0)
    pictures.reverse()
    for index in range(len(out)):
        out[index] = pictures.pop()
    return out


def _frames(
    path: Path | Stored,
    first: Fraction,
    last: Fraction | None,
    fps: Seconds | None,
    size: tuple[int, int] | None,
    stream: _Stream,
) -> Iterator[tuple[Fraction, np.ndarray]]:
    """(seconds, RGB) of the range, on the file's own times or on the grid of `fps`."""
    to_rgb = _converter(size)
    if fps is None:
        yield from _native(path, first, last, to_rgb, stream)
    else:
        yield from _on_grid(path, first, last, frame_rate(fps), to_rgb, stream)


def _native(
    path: Path | Stored, first: Fraction, last: Fraction | None, to_rgb: Callable, stream: _Stream
) -> Iterator[tuple[Fraction, np.ndarray]]:
    """Frames that begin within the range or, where none does, the one that is on screen at its start."""
    on_screen = None
    for time, frame in _decoded(path, first, last, stream):
        slack = stream.tick + Fraction(1, 1_000_000)
        if last is not None and time >= last - slack:
            break
        if time >= first - slack:
            on_screen = None
            yield time, to_rgb(frame)
        else:
            on_screen = frame
    if on_screen is not None and (stream.end is None or stream.end > first):
        yield first, to_rgb(on_screen)


def _on_grid(
    path: Path | Stored, first: Fraction, last: Fraction | None, fps: Fraction, to_rgb: Callable, stream: _Stream
) -> Iterator[tuple[Fraction, np.ndarray]]:
    """Frame n of the grid is the last one whose own time rounds to n or less."""
    index = half_up(first * fps)
    stop = None if last is None else max(half_up(last * fps), index + 1)
    current, image = None, None
    for time, frame in _decoded(path, index / fps, last, stream):
        slot = half_up(time * fps)
        while current is not None and index < slot and (stop is None or index < stop):
            image = to_rgb(current) if image is None else image
            yield index / fps, image
            index += 1
        if stop is not None and index >= stop:
            return
        current, image = frame, None
    if current is None or stream.end is None:
        return
    final = half_up(stream.end * fps)
    for n in range(index, final if stop is None else min(final, stop)):
        image = to_rgb(current) if image is None else image
        yield n / fps, image


def _decoded(
    path: Path | Stored, first: Fraction, last: Fraction | None, stream: _Stream
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """(seconds, decoded frame), beginning with the last frame at or before `first`; notes facts in `stream`.

    A container seeks by decoding time, which is not display time: when the first frame that comes out is already too
    late, it seeks further back, at last to the beginning.
    """
    for back in (0, 1, 5, None) if first > 0 else (None,):
        with open_file(path, "video") as container:
            source = find(container, "video")
            if source is None:
                remedy = "pass video=False to read its sound"
                raise MediaError("holds no picture", remedy=remedy, path=path)
            if back is not None and container.format.name in UNSTAMPED:
                continue
            stream.fps, stream.tags = stream_rate(source.stream), read_tags(path, container)
            if stream.threads is not None:
                source.stream.codec_context.thread_count = stream.threads
            stream.phase = max(Fraction(0), (source.stream.start_time or 0) * source.stream.time_base - source.origin)
            stream.tick = min(Fraction(source.stream.time_base), 1 / (4 * stream.fps))
            held = None
            for time, frame in _from(source, None if back is None else first - back, stream):
                if time <= first:
                    held = time, frame
                    continue
                if held is not None:
                    yield held
                    held, back = None, None  # the seek was early enough
                elif back is not None:
                    break
                yield time, frame
            else:
                if stream.end is None and back is not None:
                    continue
                _check_end(path, source, stream, last)
                if held is not None:
                    yield held
                return


def _from(source: Source, seek_to: Fraction | None, stream: _Stream) -> Iterator[tuple[Fraction, VideoFrame]]:
    """(seconds, frame) from the key frame before `seek_to`, or from the beginning, to the end or to damaged data."""
    av = import_av()
    base, rate = source.stream.time_base, stream.fps
    stream.end, stream.fault, stream.packets = None, "", 0 if seek_to is None else None
    time = -1 / rate
    try:
        if seek_to is not None:
            source.container.seek(int((max(seek_to, Fraction(0)) + source.origin) / base), stream=source.stream)
        for packet in source.container.demux(source.stream):
            if stream.packets is not None:
                stream.packets += packet.size > 0
            for frame in packet.decode():
                stamp = frame.pts if frame.pts is not None else frame.dts
                time = time + 1 / rate if stamp is None else stamp * base - source.origin
                stream.end = time + (frame.duration * base if frame.duration else 1 / rate)
                yield time, frame
    except av.error.FFmpegError as error:
        stream.fault = error.strerror or "damaged"


def _check_end(path: Path | Stored, source: Source, stream: _Stream, last: Fraction | None) -> None:
    """Refuse a picture that stopped before the end of the range and before what its header declares.

    Two frames are allowed for the rounding of headers.
    """
    again = "write or download it again"
    if stream.end is None:
        raise MediaError("holds no frame that can be decoded", remedy=again, path=path)
    if last is not None and stream.end >= last - stream.tick:
        return
    at, remedy = f"stops at {float(stream.end):.3f} s", f"read up to end={int(stream.end * 1000) / 1000:g}, or {again}"
    if stream.fault:
        raise MediaError(f"is damaged: the picture {at} ({stream.fault})", remedy=remedy, path=path)
    if source.end is not None and stream.end < min(source.end, last or source.end) - 2 / stream.fps:
        reason = f"header declares {float(source.end):.3f} s of picture but it {at} (truncated or damaged)"
        raise MediaError(reason, remedy=remedy, path=path)
    if stream.packets is not None and stream.packets + 2 < source.stream.frames:
        reason = f"header declares {source.stream.frames} frames but holds {stream.packets}"
        raise MediaError(reason, remedy=remedy, path=path)


def _converter(size: tuple[int, int] | None) -> Callable[[VideoFrame], np.ndarray]:
    """Decoded frame -> upright (H, W, 3) uint8 RGB. A scaled one has each colour together in memory.

    So libswscale scales three times as fast, and with chroma for every pixel, whatever the width.
    """
    from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

    reformatter = VideoReformatter()

    def to_rgb(frame: VideoFrame) -> np.ndarray:
        a, b, c, d = display_matrix(frame)
        height, width = (frame.height, frame.width) if size is None else size if a else size[::-1]
        scaled = (height, width) != (frame.height, frame.width)
        # Unmarked colours are BT.709 in high definition and BT.601 below, as players take them.
        unmarked = frame.colorspace == 2 and frame.height >= 720
        picture = reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="gbrp" if scaled else "rgb24",
            src_colorspace=Colorspace.ITU709 if unmarked else None,
            src_color_range=frame.color_range if frame.color_range in (1, 2) else None,
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        rgb = _together(picture) if scaled else picture.to_ndarray()
        if not a:
            rgb, a, d = rgb.transpose(1, 0, 2), c, b
        rgb = rgb[:: d or 1, :: a or 1]
        return rgb if scaled else np.ascontiguousarray(rgb)

    return to_rgb


def _together(frame: VideoFrame) -> np.ndarray:
    """(H, W, 3) of a frame of planes green, blue, red, each colour together in memory."""
    out = np.empty((3, frame.height, frame.width), np.uint8)
    for place, plane in zip((1, 2, 0), frame.planes, strict=True):
        out[place] = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
    return out.transpose(1, 2, 0)


def _read_sound(
    path: Path | Stored,
    zero: Fraction,
    until: Fraction | None,
    sample_rate: int | None,
    channels: int | None,
    *,
    required: bool,
) -> tuple[np.ndarray | None, int | None]:
    """(channels, samples) float32 of [zero, until) and its rate; (None, None) where there is no sound to be had."""
    with open_file(path, "audio") as container:
        source = find(container, "audio")
        if source is None:
            if required:
                raise MediaError("holds no sound", remedy="leave video=True to read its picture", path=path)
            return None, None
        context = source.stream.codec_context
        native, rate = context.sample_rate, sample_rate or context.sample_rate
        count = channels or context.channels
        anchor = 0
        # Where timestamps are coarser than a sample (1 ms in webm), only counting from the beginning is exact.
        if zero > SOUND_FROM_START and source.stream.time_base * native <= 1:
            # A whole second is a whole number of samples at every rate, so the resampler's grid does not move.
            anchor = int(zero) - SOUND_LEAD
        convert = resampler(native, rate, count)
        begin = half_up(zero * rate) - anchor * rate
        stop = None if until is None else half_up(until * rate) - anchor * rate
        pieces, position = [], 0
        for chunk, is_last in _joined(_chunks(path, source, anchor, native, until), native // 2):
            out = convert(to_channels(chunk, count), is_last)
            low, high = max(begin - position, 0), out.shape[1] if stop is None else max(stop - position, 0)
            if out[:, low:high].shape[1]:
                pieces.append(out[:, low:high].copy())
            position += out.shape[1]
            if stop is not None and position >= stop:
                break
    if not pieces and required:
        ends = position / rate + anchor
        raise MediaError(
            f"no sound at {float(zero):.3f} s: it ends at {ends:.3f} s", remedy="ask for an earlier range", path=path
        )
    return (np.concatenate(pieces, axis=1) if pieces else np.zeros((count, 0), np.float32)), rate


def _joined(chunks: Iterator[tuple[np.ndarray, bool]], size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The same sound in pieces of at least `size` samples, but for the last: packets are short."""
    held: list[np.ndarray] = []
    num = 0
    for chunk, is_last in chunks:
        held.append(chunk)
        num += chunk.shape[1]
        if is_last or num >= size:
            yield (held[0] if len(held) == 1 else np.concatenate(held, axis=1)), is_last
            held, num = [], 0


def _chunks(
    path: Path | Stored, source: Source, anchor: int, rate: int, until: Fraction | None
) -> Iterator[tuple[np.ndarray, bool]]:
    """((channels, samples) float32, whether it is the last) without gap or overlap from second `anchor` on.

    A hole of more than 50 ms between timestamps becomes silence; smaller differences are rounding.
    """
    av = import_av()
    stream, base = source.stream, source.stream.time_base
    to_float = av.AudioResampler(format="fltp")
    if anchor:
        source.container.seek(int((anchor + source.origin) / base), stream=stream)
    end = None if source.end is None else half_up(source.end * rate) - anchor * rate
    # (pts x base - begin) x rate, halves upwards, in whole numbers: this is done for every packet
    begin = source.origin + anchor
    factor, offset = base.numerator * begin.denominator, begin.numerator * base.denominator
    divisor = base.denominator * begin.denominator
    position, pending = 0, np.zeros((stream.codec_context.channels, 0), np.float32)
    for frame in source.container.decode(stream):
        parts = [part.to_ndarray() for part in to_float.resample(frame)]
        block = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        stamp = position
        if frame.pts is not None:
            stamp = (2 * (frame.pts * factor - offset) * rate + divisor) // (2 * divisor)
        if stamp > position and (position == 0 or stamp - position > rate // 20):
            while position < stamp and (end is None or position < end):
                yield pending, False
                pending = np.zeros((len(block), min(rate, stamp - position)), np.float32)
                position += pending.shape[1]
        elif stamp < position and (position == 0 or position - stamp > rate // 20):
            block = block[:, position - stamp :]
        if end is not None:
            block = block[:, : max(end - position, 0)]
        if block.shape[1]:
            yield pending, False
            position, pending = position + block.shape[1], block
    if until is not None:
        end = min(end, half_up(until * rate) - anchor * rate) if end is not None else None
    if end is not None and position < end - rate // 4:
        raise MediaError(
            f"header declares {float(source.end):.3f} s of sound but it stops at {position / rate + anchor:.3f} s "
            "(truncated or damaged)",
            remedy=f"read up to end={int((position / rate + anchor) * 1000) / 1000:g}, or write or download it again",
            path=path,
        )
    yield pending, True
