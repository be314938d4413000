"""Given media fitted to a model's geometry, and generated media joined with what was given.

Media tensors: video (1, 3, F, H, W) and audio (1, channels, samples), both in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import RequestError
from soundstage.core.system import System
from soundstage.media.clip import Clip
from soundstage.media.frames import cover, from_float, to_float
from soundstage.media.geometry import Clock
from soundstage.media.waves import resample, to_channels

LONGEST = 4  # times the model's default length
NEAR = 0.25  # seconds by which a duration may miss a fixed length
FADE = 0.005  # seconds over which kept sound gives way to generated sound


@dataclass(frozen=True)
class Canvas:
    """The clip to be made: its length on both latent grids and its picture size.

    num_frames and num_samples are 0 for a modality the model does not have. shape: latent shape per sample.
    coded_frames: frames of those latents, of which num_frames are kept.
    """

    clock: Clock
    num_frames: int
    num_samples: int
    size: tuple[int, int]
    channels: int
    shape: AV[tuple[int, ...]]
    coded_frames: int

    @property
    def duration(self) -> Fraction:
        """Exact seconds."""
        if self.num_frames:
            return self.clock.frame_time(self.num_frames)
        return self.clock.sample_time(self.num_samples)

    @property
    def fps(self) -> Fraction:
        return self.clock.fps

    @property
    def sample_rate(self) -> int:
        return self.clock.sample_rate


def canvas(system: System, duration: float | None = None, size: tuple[int, int] | None = None) -> Canvas:
    """The clip of that many seconds (nearest on the grids) and that (height, width), or of the model's own.

    Raises RequestError beyond four times the model's length, for another length than a fixed one, and for a size that
    the model does not make.
    """
    clock = _clock(system.codec.geometry)
    fixed = system.other_lengths is not None
    frames, samples = _fixed_length(system, clock, duration) if fixed else _length(system, clock, duration)
    shape, pixels, coded = {}, (0, 0), 0
    if "video" in system.shape:
        video = system.codec.geometry["video"]
        channels, steps, height, width = system.shape["video"]
        height, width = _cells(system, size) or (height, width)
        shape["video"] = (channels, steps if fixed else video.steps(frames), height, width)
        pixels = (height * video.spatial_stride, width * video.spatial_stride)
        coded = video.length(shape["video"][1])
    if "audio" in system.shape:
        channels, steps = system.shape["audio"]
        shape["audio"] = (channels, steps if fixed else system.codec.geometry["audio"].steps(samples))
    kept = samples if "audio" in shape else 0
    return Canvas(clock, frames, kept, pixels, int(system.info.get("audio_channels", 1)), AV(**shape), coded)


def _length(system: System, clock: Clock, duration: float | None) -> tuple[int, int]:
    """Frames (0 without video) and samples of a clip of about that many seconds."""
    name = "video" if "video" in system.shape else "audio"
    own = system.codec.geometry[name].length(system.shape[name][1])
    longest = float(LONGEST * own / (clock.fps if name == "video" else clock.sample_rate))
    if duration is not None and not 0 < duration <= longest:
        raise RequestError(f"duration: {duration:g} s is not above 0 and at most {longest:.3g} s, as this model needs")
    if name == "video":
        frames = own if duration is None else clock.nearest_frames(Fraction(duration) * clock.fps)
        return frames, clock.samples_for_frames(frames)
    return 0, own if duration is None else clock.nearest_samples(Fraction(duration) * clock.sample_rate)


def _fixed_length(system: System, clock: Clock, duration: float | None) -> tuple[int, int]:
    """Frames and samples of the model's one length, both cut to the shorter: whole frames, and the sound under them."""
    lengths = system.shape.map(lambda shape, geometry: geometry.length(shape[1]), system.codec.geometry)
    seconds = {n: Fraction(v) / (clock.fps if n == "video" else clock.sample_rate) for n, v in lengths.items()}
    frames = int(min(seconds.values()) * clock.fps) if "video" in lengths else 0
    own = clock.frame_time(frames) if frames else seconds["audio"]
    if duration is not None and all(abs(duration - have) > NEAR for have in (own, *seconds.values())):
        raise RequestError(
            f"duration: {duration:g} s is not possible: {system.name} makes {float(own):.2f} s, the nearest to it; "
            f"{system.other_lengths}"
        )
    return frames, clock.samples_for_frames(frames) if frames else lengths["audio"]


def _cells(system: System, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Latent (height, width) of a picture size."""
    if size is None:
        return None
    stride = system.codec.geometry["video"].spatial_stride
    own = (system.shape["video"][2] * stride, system.shape["video"][3] * stride)
    if system.sizes is not None:
        system.sizes.check(*size)
    elif size != own:
        raise RequestError(f"size: {system.name} makes {own[0]}x{own[1]} only; leave the size out")
    return size[0] // stride, size[1] // stride


def _clock(geometry: AV[StreamGeometry]) -> Clock:
    video, audio = geometry.video, geometry.audio
    return Clock(
        fps=video.rate if video else Fraction(1),
        sample_rate=int(audio.rate) if audio else 1,
        video_stride=video.stride if video else 1,
        audio_stride=audio.stride if audio else 1,
        causal_first_frame=video.causal_first if video else True,
    )


def fit_frames(clip: Clip, to: Canvas, num_frames: int | None = None) -> np.ndarray:
    """(F, H, W, 3) uint8 of the clip at the canvas's rate and size: the frame shown at each instant, centre-cropped.

    num_frames: cut or pad with the last frame to this many; None keeps the clip's own length.
    """
    assert clip.frames is not None
    count = to.clock.frames_for(clip.video_duration) if num_frames is None else num_frames
    instants = np.arange(count) / float(to.fps)
    shown = np.searchsorted(clip.frame_times, instants + 1e-6, side="right") - 1
    return cover(clip.frames[np.clip(shown, 0, len(clip.frames) - 1)], to.size)


def fit_wave(clip: Clip, to: Canvas, num_samples: int | None = None) -> np.ndarray:
    """(channels, samples) float32 of the clip at the canvas's rate; cut or padded with silence to num_samples."""
    assert clip.wave is not None
    wave = resample(clip.wave, clip.sample_rate, to.sample_rate)
    wave = to_channels(wave, to.channels)
    if num_samples is None:
        return wave
    return np.pad(wave[:, :num_samples], ((0, 0), (0, max(0, num_samples - wave.shape[1]))))


def frames_tensor(frames: np.ndarray) -> Tensor:
    """(1, 3, F, H, W) in [-1, 1] of (F, H, W, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(to_float(frames).transpose(3, 0, 1, 2)))[None]


def wave_tensor(wave: np.ndarray) -> Tensor:
    """(1, channels, samples)."""
    return torch.from_numpy(np.ascontiguousarray(wave)[None]).float()


def to_clip(media: AV[Tensor], index: int, to: Canvas) -> Clip:
    """Sample `index` of decoded media as a clip, picture and sound cut to one length."""
    frames = wave = None
    if "video" in media:
        frames = from_float(media["video"][index].float().permute(1, 2, 3, 0)[: to.num_frames].cpu().numpy())
    if "audio" in media:
        wave = media["audio"][index].float().clamp(-1, 1)[:, : to.num_samples].cpu().numpy()
    return Clip(
        frames=frames,
        fps=to.fps if frames is not None else None,
        wave=wave,
        sample_rate=to.sample_rate if wave is not None else None,
    )


def with_given(clip: Clip, given: Clip) -> Clip:
    """The generated clip with every modality of `given` in place of its own, both cut to the shorter of the two."""
    if given.frames is not None:
        clip = replace(clip, frames=given.frames, fps=given.fps, times=given.times)
    if given.wave is not None:
        clip = replace(clip, wave=given.wave, sample_rate=given.sample_rate)
    if clip.frames is None or clip.wave is None:
        return clip
    return cut(clip, min(clip.video_duration, clip.audio_duration))


def cut(clip: Clip, duration: float) -> Clip:
    """The first `duration` seconds, picture and sound of one length: whole frames, then the sound under them."""
    frames, times, wave = clip.frames, clip.times, clip.wave
    if frames is not None:
        ends = np.append(clip.frame_times[1:], clip.video_duration)
        count = max(1, int(np.searchsorted(ends, duration + 1e-6, side="right")))
        frames, times = frames[:count], None if times is None else times[:count]
        clip = replace(clip, frames=frames, times=times)
        duration = clip.video_duration
    if wave is not None:
        clip = replace(clip, wave=wave[:, : round(duration * clip.sample_rate)])
    return clip


def keep_frames(generated: np.ndarray, given: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) with those of `given` where keep (F,) is True."""
    return np.where(keep[:, None, None, None], given, generated)


def keep_wave(generated: np.ndarray, given: np.ndarray, keep: np.ndarray, sample_rate: int) -> np.ndarray:
    """Sound (channels, samples) with that of `given` where keep (samples,) is True.

    Kept samples are exact; beside them, over 5 ms of generated sound, the given one fades out.
    """
    reach = max(1, round(FADE * sample_rate))
    position = np.arange(len(keep), dtype=np.float64)
    before = np.maximum.accumulate(np.where(keep, position, -np.inf))
    after = np.minimum.accumulate(np.where(keep, position, np.inf)[::-1])[::-1]
    distance = np.minimum(position - before, after - position)
    weight = np.clip(1 - distance / reach, 0, 1)
    return (weight * given + (1 - weight) * generated).astype(np.float32)
