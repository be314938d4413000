"""What a request gives a task: encoded latents, the mask of what is kept, and how the result takes the media back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import RequestError
from soundstage.core.system import System
from soundstage.inference.fitting import (
    Canvas,
    cut,
    fit_frames,
    fit_wave,
    frames_tensor,
    keep_frames,
    keep_wave,
    to_clip,
    wave_tensor,
    with_given,
)
from soundstage.inference.tasks import Task, prefix_mask, range_mask
from soundstage.media.clip import Clip

Media = str | Path | Clip
Several = Media | Sequence[Media] | None
Ranges = Sequence[tuple[float, float]]

LONGEST_TO_EXTEND = 60.0  # seconds
IMAGE_SECONDS = 0.1  # read of an image, longer than the frame of a still at the usual 25 per second
_LACK = {"video": "no picture", "audio": "no sound track"}


@dataclass(frozen=True)
class Inputs:
    """Media of one request, decoded. image: a clip whose first frame is used."""

    image: Clip | None = None
    audio: Clip | None = None
    video: Clip | None = None


def read_inputs(task: Task, to: Canvas, count: int, image: Several, audio: Several, video: Several) -> list[Inputs]:
    """One Inputs per prompt, one object where all share the same media; no more is decoded than the task can use.

    Raises RequestError when there is neither one file for all nor one per prompt.
    """
    rows: list[dict[str, Clip | None]] = [{} for _ in range(count)]
    done: dict[str, Clip] = {}
    for name, value in (("image", image), ("audio", audio), ("video", video)):
        shared = value is None or isinstance(value, str | Path | Clip)
        each = [value] * count if shared else list(value)
        if len(each) != count:
            raise RequestError(f"{name}: {len(each)} files for {count} prompts; give one for all or one per prompt")
        for row, media in zip(rows, each, strict=True):
            row[name] = _clip(name, media, task, to, done)
    same = all(row[name] is rows[0][name] for row in rows for name in row)
    return [Inputs(**rows[0])] * count if same and rows else [Inputs(**row) for row in rows]


def _clip(name: str, media: Media | None, task: Task, to: Canvas, done: dict[str, Clip]) -> Clip | None:
    if media is None or isinstance(media, Clip):
        return media
    key = f"{name} {media}"
    if key not in done:
        done[key] = _read(name, media, task, to)
    return done[key]


def _read(name: str, path: str | Path, task: Task, to: Canvas) -> Clip:
    """The part of a file that the task uses: an image's first frame, a sound, a clip as long as the canvas, or all."""
    from soundstage.media.decode import read
    from soundstage.media.probe import probe

    info = probe(path)
    needed = "audio" if name == "audio" else "video"
    if getattr(info, needed) is None:
        raise RequestError(f"task {task.name}: {path} has {_LACK[needed]}; give a file that has one")
    if task.keeps == "prefix" and info.duration > LONGEST_TO_EXTEND:
        raise RequestError(
            f"task extension: {path} lasts {info.duration:.1f} s; give its last part, at most {LONGEST_TO_EXTEND:g} s"
        )
    end = {"image": IMAGE_SECONDS, "audio": to.duration}.get(name, None if task.keeps == "prefix" else to.duration)
    return read(path, end=end, video=needed == "video", audio=needed == "audio" or task.keeps is not None)


@dataclass(frozen=True, eq=False)
class Given:
    """Encoded inputs of one sample, without the batch. latents: clean; mask: (F,) or (A,), 1 = generate, 0 = keep.

    A modality in latents and not in mask is given whole (held, or the start of an edit). cond: what the model is told
    of a first frame, with a batch of one, where it takes it as a condition.
    """

    latents: AV[Tensor]
    mask: AV[Tensor]
    inputs: Inputs
    context: int = 0
    ranges: Ranges = ()
    cond: Conditions | None = None


def encode_given(
    system: System, task: Task, to: Canvas, inputs: Inputs, ranges: Ranges = (), device: torch.device | str = "cpu"
) -> Given:
    """Fit the inputs to the canvas and encode them; raises RequestError when one lacks what the task needs."""
    media: dict[str, np.ndarray] = {}
    context = 0
    if "audio" in task.holds:
        media["audio"] = fit_wave(_having(inputs.audio, "audio", "audio", task), to, to.num_samples)
    if "video" in task.holds:
        media["video"] = fit_frames(_having(inputs.video, "video", "video", task), to, to.coded_frames)
    if task.keeps is not None:
        clip = inputs.video
        context = _context(clip, to) if task.keeps == "prefix" else 0
        media = _window(clip, to, task, context)
    tensors = AV(
        video=frames_tensor(media["video"]).to(device) if "video" in media else None,
        audio=wave_tensor(media["audio"]).to(device) if "audio" in media else None,
    )
    if task.keeps is None and inputs.image is not None and "video" in task.generates:
        frame = first_frame(system, _having(inputs.image, "video", "image", task), to).to(device)
        if system.encode_image is not None:
            return Given(AV(), AV(), inputs, cond=system.encode_image(frame, to.shape))
        tensors = tensors.replace(video=frame)
    latents = system.codec.encode(tensors).map(lambda x: x[0].float()) if tensors.modalities else AV()
    latents = AV(**{name: _padded(value, to.shape[name]) for name, value in latents.items()})
    mask = _mask(task, to, latents, context, ranges, image=inputs.image is not None)
    return Given(latents, mask.map(lambda m: m.to(device)), inputs, context, ranges)


def finish(task: Task, to: Canvas, given: Given, media: AV[Tensor], index: int) -> Clip:
    """Sample `index` as a clip, with the given media where they were given.

    A modality given whole keeps its own rate, size and channels. A clip known in part gives back its fitted frames
    and samples. The image of i2av is generated again by the codec, so that the first frame does not flash.
    """
    clip = to_clip(media, index, to)
    if task.holds:
        source = {"audio": given.inputs.audio, "video": given.inputs.video}[task.holds[0]]
        return with_given(clip, source.without("video" if task.holds[0] == "audio" else "audio"))
    if task.keeps in ("prefix", "outside"):
        return _joined(task, to, given, clip)
    return clip


def first_frame(system: System, image: Clip, to: Canvas) -> Tensor:
    """(1, 3, 1, H, W) in [-1, 1]: the image cut to the canvas's aspect around its middle, and resized as the model's
    own rule for sizes has it."""
    if system.sizes is None:
        return frames_tensor(fit_frames(image, to, 1))
    assert image.frames is not None
    frame = image.frames[0]
    height, width = frame.shape[:2]
    if system.sizes.of_image(height, width) != to.size:
        keep_h = min(height, round(width * to.size[0] / to.size[1]))
        keep_w = min(width, round(height * to.size[1] / to.size[0]))
        top, left = (height - keep_h) // 2, (width - keep_w) // 2
        frame = frame[top : top + keep_h, left : left + keep_w]
    return system.sizes.image(frame, to.size)


def _having(clip: Clip | None, modality: str, name: str, task: Task) -> Clip:
    held = None if clip is None else clip.frames if modality == "video" else clip.wave
    if clip is None or held is None:
        raise RequestError(f"task {task.name}: the given {name} has {_LACK[modality]}; give one that has it")
    return clip


def _context(clip: Clip, to: Canvas) -> int:
    """Frames of the clip's end that the extension goes on from: at most half of the canvas, on the latent grid."""
    have = to.clock.frames_for(clip.video_duration)
    longest = min(have, to.num_frames // 2)
    context = to.clock.nearest_frames(longest)
    return context if context <= longest else context - to.clock.video_stride


def _window(clip: Clip | None, to: Canvas, task: Task, context: int) -> dict[str, np.ndarray]:
    """The part of a given clip that the model sees, per modality of the model that the clip has."""
    clip = _having(clip, "video", "video", task)
    if task.keeps == "prefix" and context < 1:
        raise RequestError("task extension: the given clip is too short to go on from; give at least one frame")
    media: dict[str, np.ndarray] = {}
    if "video" in to.shape:
        frames = fit_frames(clip, to, None if context else to.coded_frames)
        media["video"] = frames[len(frames) - context :] if context else frames
    if "audio" in to.shape and clip.wave is not None:
        wave = fit_wave(clip, to, None if context else to.num_samples)
        if context:
            start = to.clock.samples_for_frames(to.clock.frames_for(clip.video_duration) - context)
            wave = fit_wave(clip, to, start + to.clock.samples_for_frames(context))[:, start:]
        media["audio"] = wave
    return media


def _mask(task: Task, to: Canvas, latents: AV[Tensor], context: int, ranges: Ranges, *, image: bool) -> AV[Tensor]:
    if task.keeps == "prefix":
        whole = {
            "video": to.clock.latent_frames(context),
            "audio": to.clock.audio_latents(to.clock.samples_for_frames(context)),
        }
        return AV(**{n: prefix_mask(to.shape[n][1], whole[n]) for n in latents.modalities})
    if task.keeps == "outside":
        if not ranges:
            raise RequestError("task inpaint needs the seconds to make anew: give ranges (--range 0.5:1.0)")
        steps = {"video": to.clock.video_steps, "audio": to.clock.audio_steps}
        timed = {n: steps[n](to.shape[n][1]) for n in latents.modalities}
        return AV(**{n: range_mask(s.start, s.end, ranges) for n, s in timed.items()})
    if image and "video" in task.generates:
        return AV(video=prefix_mask(to.shape["video"][1], 1))
    return AV()


def _joined(task: Task, to: Canvas, given: Given, clip: Clip) -> Clip:
    """The generated clip with the kept frames and samples of the given one, and for an extension all before it."""
    source = given.inputs.video
    lead = to.clock.frames_for(source.video_duration) - given.context if task.keeps == "prefix" else 0
    if clip.frames is not None:
        frames = fit_frames(source, to, lead + to.num_frames)
        keep = _kept(given.mask["video"], to.clock.video_steps, np.arange(to.num_frames) / float(to.fps))
        frames[lead:] = keep_frames(clip.frames, frames[lead:], keep)
        clip = replace(clip, frames=frames)
    if clip.wave is not None and "audio" in given.mask:
        start = to.clock.samples_for_frames(lead)
        wave = fit_wave(source, to, start + to.num_samples).copy()
        keep = _kept(given.mask["audio"], to.clock.audio_steps, np.arange(to.num_samples) / to.sample_rate)
        wave[:, start:] = keep_wave(clip.wave, wave[:, start:], keep, to.sample_rate)
        clip = replace(clip, wave=wave)
    elif clip.wave is not None and lead:
        silence = np.zeros((clip.wave.shape[0], to.clock.samples_for_frames(lead)), np.float32)
        clip = replace(clip, wave=np.concatenate([silence, clip.wave], axis=1))
    both = clip.frames is not None and clip.wave is not None
    return cut(clip, min(clip.video_duration, clip.audio_duration)) if both else clip


def _kept(mask: Tensor, steps: object, seconds: np.ndarray) -> np.ndarray:
    """True for each instant whose latent step is kept."""
    ends = steps(len(mask)).end
    index = np.searchsorted(ends, seconds + 1e-9, side="right")
    return (mask.cpu().numpy() == 0)[np.clip(index, 0, len(mask) - 1)]


def _padded(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents (C, F, ...) with zeros after their last step, up to the canvas."""
    full = latents.new_zeros(shape)
    steps = min(latents.shape[1], shape[1])
    full[:, :steps] = latents[:, :steps]
    return full
