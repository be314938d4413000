"""Writing clips: mp4 (h264, aac), webm (vp9, opus), m4a, wav, flac, gif, and folders of PNG images with a wav.

A file appears under its name only when it is complete; until then it is NAME.part. The same clip and options give the
same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from soundstage.media.clip import Clip
from soundstage.media.errors import MediaError
from soundstage.media.geometry import half_up
from soundstage.media.probe import CLIP_FILE, FRAME_FILES, SOUND_FILE, import_av
from soundstage.media.waves import resample

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Keys that players read from an mp4; any other key needs the QuickTime form, which fewer players show.
MP4_TAGS = {"title", "artist", "album", "comment", "genre", "date", "copyright", "description", "synopsis", "lyrics"}
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
# Timestamps of unevenly spaced frames, in seconds; the clock of MPEG systems.
UNEVEN_TICK = Fraction(1, 90_000)
THREADS = 4  # the bytes that encoders write depend on the number of threads, so it does not follow the machine
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


@dataclass(frozen=True)
class _Format:
    muxer: str
    video: str | None = None
    audio: str | None = None
    rates: tuple[int, ...] = ()
    options: dict[str, str] = field(default_factory=dict)


FORMATS = {
    ".mp4": _Format("mp4", "libx264", "aac", AAC_RATES, {"movflags": "+faststart"}),
    ".m4a": _Format("ipod", None, "aac", AAC_RATES, {"movflags": "+faststart"}),
    ".webm": _Format("webm", "libvpx-vp9", "libopus", OPUS_RATES),
    ".wav": _Format("wav", None, "pcm_s16le"),
    ".flac": _Format("flac", None, "flac"),
    ".gif": _Format("gif", "gif"),
    "": _Format("image2", "png"),
}


def write(
    clip: Clip,
    path: str | Path,
    *,
    crf: int = 18,
    preset: str = "veryfast",
    audio_bitrate: int | None = None,
    metadata: dict[str, str] | None = None,
    threads: int = THREADS,
) -> Path:
    """Write `clip` in the format of the suffix of `path` (no suffix: a new folder of PNG images); returns the path.

    crf: constant quality, 0 (best) to 51 for mp4, to 63 for webm. preset: speed of h264, "ultrafast" to "veryslow".
    audio_bitrate: bits per second; None means 80 000 per channel.
    metadata: tags added to those of the clip. threads: of the encoder; other numbers give other bytes, and 1 is right
    where many processes encode side by side.

    Each format holds what it can: gif has no sound, wav, flac and m4a have no picture; wav, flac and images are
    lossless at 16 and 8 bits. h264 needs even sizes, so an odd last row or column is doubled. Raises MediaError.
    """
    path = Path(path)
    target = FORMATS.get(path.suffix.lower())
    if target is None:
        known = ", ".join(suffix for suffix in FORMATS if suffix)
        remedy = f"use one of {known}, or no suffix for a folder of images"
        raise MediaError(f"suffix {path.suffix!r} is not a known format", remedy=remedy, path=path)
    worst = 63 if target.muxer == "webm" else 51
    if not 0 <= crf <= worst:
        raise MediaError(f"crf: {crf} is not within 0 to {worst}", remedy="18 looks lossless", path=path)
    if preset not in PRESETS:
        raise MediaError(f"preset: {preset!r} is unknown", remedy=f"use one of {', '.join(PRESETS)}", path=path)
    clip = _fitting(clip, target, path)
    clip = replace(clip, metadata={key: str(value) for key, value in {**clip.metadata, **(metadata or {})}.items()})
    with _complete(path) as part:
        if target.muxer == "image2":
            _write_folder(clip, part)
        else:
            _write_file(clip, part, target, crf=crf, preset=preset, audio_bitrate=audio_bitrate, threads=threads)
    return path


def _fitting(clip: Clip, target: _Format, path: Path) -> Clip:
    """The part of the clip that the format can hold."""
    picture, sound = clip.frames is not None and target.video is not None, clip.wave is not None
    if target.muxer == "gif" or not (target.audio or target.muxer == "image2"):
        sound = False
    if picture and not len(clip.frames):
        raise MediaError("the clip has no frames to write", remedy="give at least one frame", path=path)
    if sound and not picture and not clip.wave.shape[1]:
        raise MediaError("the clip has no samples to write", remedy="give at least one sample", path=path)
    if sound and len(clip.wave) not in LAYOUTS:
        raise MediaError(f"{len(clip.wave)} channels cannot be written", remedy="give 1 to 8", path=path)
    if not picture and not sound:
        needs = "frames" if target.audio is None else "a wave"
        raise MediaError(f"{path.suffix or 'an image folder'} needs {needs}", remedy="choose another suffix", path=path)
    if not picture and clip.frames is not None:
        clip = clip.without("video")
    if not sound and clip.wave is not None:
        clip = clip.without("audio")
    return clip


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` at the end, or is removed on failure."""
    av = import_av()
    part = path.with_name(path.name + ".part")
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise MediaError("is a folder that is not empty", remedy="remove it or choose another name", path=path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        part.replace(path)
    except (OSError, av.error.FFmpegError) as error:
        remedy = "free some space, check the rights of the folder, and the options given"
        raise MediaError(f"cannot be written ({error.strerror or error})", remedy=remedy, path=path) from error
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def _write_folder(clip: Clip, part: Path) -> None:
    av = import_av()
    part.mkdir()
    pattern = str(part).replace("%", "%%") + "/" + FRAME_FILES
    with av.open(pattern, "w", format="image2", options={"start_number": "0"}) as container:
        stream = container.add_stream("png", rate=clip.fps)
        stream.height, stream.width = clip.frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for index, image in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if clip.wave is not None:
        _write_file(clip.without("video"), part / SOUND_FILE, FORMATS[".wav"])
    about = {"fps": str(clip.fps), "metadata": clip.metadata}
    if clip.times is not None:
        about["times"] = clip.times.tolist()
    (part / CLIP_FILE).write_text(json.dumps(about, indent=1, ensure_ascii=False))


def _write_file(
    clip: Clip,
    part: Path,
    target: _Format,
    *,
    crf: int = 18,
    preset: str = "veryfast",
    audio_bitrate: int | None = None,
    threads: int = THREADS,
) -> None:
    av = import_av()
    if clip.wave is not None and target.rates and clip.sample_rate not in target.rates:
        rate = next((rate for rate in target.rates if rate > clip.sample_rate), target.rates[-1])
        clip = replace(clip, wave=resample(clip.wave, clip.sample_rate, rate), sample_rate=rate)
    options = {"fflags": "+bitexact", **target.options}
    if "movflags" in options:
        # Edit lists count in this clock; with the usual 1000 the last millisecond of sound would be lost or invented.
        options["movie_timescale"] = str(clip.sample_rate or UNEVEN_TICK.denominator)
        if set(clip.metadata) - MP4_TAGS:
            options["movflags"] += "+use_metadata_tags"
    with av.open(str(part), "w", format=target.muxer, options=options) as container:
        container.metadata.update(clip.metadata)
        video = None if clip.frames is None else _add_video(container, clip, target.video, crf, preset, threads)
        audio = None if clip.wave is None else _add_audio(container, clip, target.audio, audio_bitrate)
        _mux(container, clip, video, audio)


def _add_video(container: OutputContainer, clip: Clip, codec: str, crf: int, preset: str, threads: int) -> VideoStream:
    group = str(max(1, half_up(2 * clip.fps)))  # a key frame every 2 s: cheap seeking
    # The quickest routines of x264 read memory beyond small pictures, so that about one file in twenty came out with
    # other bytes; the ones that are the same on every processor do not.
    options = {
        "libx264": {"crf": str(crf), "preset": preset, "g": group, "x264-params": "cpu-independent=1"},
        "libvpx-vp9": {"crf": str(crf), "b": "0", "g": group, "deadline": "good", "cpu-used": "5", "row-mt": "1"},
    }.get(codec, {})
    stream = container.add_stream(codec, rate=clip.fps, options=options)
    context = stream.codec_context
    context.time_base = 1 / clip.fps if clip.times is None else UNEVEN_TICK
    context.thread_count = threads
    height, width = clip.frames.shape[1:3]
    context.pix_fmt = "yuv420p"
    if codec == "libx264":
        height, width = height + height % 2, width + width % 2
    context.height, context.width = height, width
    if codec == "gif":
        context.pix_fmt = "pal8"
    else:
        # BT.709 with the limited range, and marked so: what players expect.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
    return stream


def _add_audio(container: OutputContainer, clip: Clip, codec: str, bitrate: int | None) -> AudioStream:
    # Noise substitution makes a decoder's output depend on what it decoded before; without it ranges equal the whole.
    options = {"aac_pns": "0"} if codec == "aac" else {}
    stream = container.add_stream(codec, rate=clip.sample_rate, layout=LAYOUTS[len(clip.wave)], options=options)
    if codec in ("aac", "libopus"):
        stream.bit_rate = bitrate or 80_000 * len(clip.wave)
    return stream


def _mux(container: OutputContainer, clip: Clip, video: VideoStream | None, audio: AudioStream | None) -> None:
    """Encode picture and sound side by side in time, as players want them in the file."""
    blocks = iter(()) if audio is None else _blocks(clip)
    heard = 0.0
    if video is not None:
        times = clip.frame_times
        for time, frame in zip(times, _pictures(clip, video), strict=True):
            while audio is not None and heard <= time and (block := next(blocks, None)) is not None:
                container.mux(audio.encode(block))
                heard = (block.pts + block.samples) / clip.sample_rate
            container.mux(video.encode(frame))
        container.mux(video.encode())
    if audio is not None:
        for block in blocks:
            container.mux(audio.encode(block))
        container.mux(audio.encode())


def _blocks(clip: Clip, size: int = 4096) -> Iterator[object]:
    av = import_av()
    for begin in range(0, clip.wave.shape[1], size):
        block = np.ascontiguousarray(np.clip(clip.wave[:, begin : begin + size], -1, 1))
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=LAYOUTS[len(block)])
        frame.sample_rate, frame.pts, frame.time_base = clip.sample_rate, begin, Fraction(1, clip.sample_rate)
        yield frame


def _pictures(clip: Clip, stream: VideoStream) -> Iterator[VideoFrame]:
    """Frames in the pixel format of the stream, with timestamps in ticks of its encoder."""
    av = import_av()
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    base, context = stream.codec_context.time_base, stream.codec_context
    ends = np.append(clip.frame_times[1:], clip.frame_times[-1] + float(1 / clip.fps))
    stamps = [half_up(Fraction(float(time)) / base) for time in (*clip.frame_times, ends[-1])]
    down, right = context.height - clip.frames.shape[1], context.width - clip.frames.shape[2]
    images = (np.pad(image, ((0, down), (0, right), (0, 0)), mode="edge") for image in clip.frames)
    frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24") for image in images)
    if context.name == "gif":
        frames = _with_palette(frames, context.width, context.height)
    for index, frame in enumerate(frames):
        if context.name != "gif":
            frame = frame.reformat(
                format=context.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC,
                threads=1,
            )
            frame.color_primaries = frame.color_trc = 1
        frame.pts, frame.time_base = stamps[index], base
        frame.duration = max(1, stamps[index + 1] - stamps[index])
        yield frame


def _with_palette(frames: Iterator[VideoFrame], width: int, height: int) -> Iterator[VideoFrame]:
    """The frames in 256 colours chosen for the whole clip."""
    av = import_av()
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 1000), name="in"
    )
    split, colours = graph.add("split"), graph.add("palettegen")
    use, sink = graph.add("paletteuse", "dither=sierra2_4a"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(colours, 1, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    count = 0
    for count, frame in enumerate(frames, start=1):
        frame.pts, frame.time_base = count - 1, Fraction(1, 1000)
        source.push(frame)
    source.push(None)
    for _ in range(count):
        yield sink.pull()
