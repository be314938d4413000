"""What a request asks for, checked and put in the place of the model's own defaults."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from soundstage.core.av import AV
from soundstage.core.causal import WAYS, is_causal
from soundstage.core.errors import RequestError, one_of
from soundstage.core.system import Sampling, System
from soundstage.inference.given import Several
from soundstage.inference.tasks import Task
from soundstage.media.clip import Clip

Scale = float | tuple[float, float] | AV[float]
Words = str | tuple[str | None, str | None] | AV[str]
"""One text, or one per modality, (video, audio), where None is the model's own."""

MOST_STEPS = 1000


def each_seed(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed] * count
    if len(seed) != count:
        raise RequestError(f"seed: {len(seed)} seeds for {count} prompts; give one for all or one per prompt")
    return list(seed)


def sampling_of(
    system: System,
    task: Task,
    steps: int | None,
    sampler: str | None,
    guidance: Scale | None,
    negative: Words | None,
    skip_layer: int | None,
) -> Sampling:
    """The model's way of sampling with what was asked in its place.

    Raises RequestError for what cannot be, and for what a distilled model was not trained for.
    """
    base = system.sampling
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise RequestError(f"steps: {steps} is not from 1 to {MOST_STEPS}; this model's default is {base.steps}")
    if sampler is not None and sampler not in WAYS:
        raise RequestError(str(one_of("sampler", sampler, WAYS)))
    times = base.times if steps in (None, base.steps) else None
    skip = base.skip_layer if skip_layer is None else skip_layer
    scale = pair("guidance", guidance, base.guidance, 0, 100)
    _check_trained(system, task, steps, sampler)
    _check_baked(system, scale, negative)
    _check_streamed(system, task, sampler or base.sampler, scale)
    return replace(
        base,
        sampler=sampler or base.sampler,
        steps=steps or base.steps,
        guidance=scale,
        times=times,
        negative=_negative(negative, base.negative),
        skip_layer=None if skip == -1 else skip,
    )


def _check_trained(system: System, task: Task, steps: int | None, sampler: str | None) -> None:
    """A student knows the tasks, the modalities, the levels and the sampler that it was distilled for."""
    base = system.sampling
    if base.tasks is not None and task.name not in base.tasks:
        known = ", ".join(base.tasks)
        raise RequestError(f"task {task.name}: {system.name} was distilled for {known} alone; ask for one of these")
    if base.times is None:
        return
    missing = [name for name in task.generates if name not in base.times]
    if missing:
        known = " and ".join(base.times.modalities)
        raise RequestError(
            f"task {task.name}: {system.name} was distilled for {known} alone and cannot generate {missing[0]}; name "
            "another task (t2v, t2a)"
        )
    if base.any_steps:
        return
    if steps not in (None, base.steps):
        raise RequestError(f"steps: {system.name} was distilled for {base.steps} steps, not {steps}; leave steps out")
    if sampler not in (None, base.sampler):
        raise RequestError(
            f"sampler: {system.name} was distilled for {base.sampler}, not {sampler}; leave the sampler out"
        )


def _check_baked(system: System, scale: AV[float], negative: Words | None) -> None:
    """Guidance is once in the weights, and not again in the sampler."""
    baked = system.sampling.baked
    if baked is None:
        return
    told = ", ".join(f"{value:g} for {name}" for name, value in baked.items())
    asked = next((value for value in scale.values() if value != 1), None)
    if asked is not None:
        raise RequestError(
            f"guidance: {asked:g} is asked of {system.name}, which has guidance of {told} built in; leave guidance out"
        )
    if isinstance(negative, str | AV) or any(words is not None for words in negative or ()):
        raise RequestError(
            f"negative: {system.name} has guidance of {told} built in and reads no negative; leave it out"
        )


def _check_streamed(system: System, task: Task, sampler: str, scale: AV[float]) -> None:
    """Only a causal model makes a clip chunk after chunk, by one prediction at a time."""
    if sampler != "streamed":
        return
    if not is_causal(system.denoiser):
        raise RequestError(
            f"sampler: {system.name} reads whole clips and cannot be streamed; leave the sampler out, or name a causal "
            "model"
        )
    present = (*task.generates, *task.holds)
    asked = next((value for name, value in scale.items() if name in present and value != 1), None)
    if asked is not None:
        raise RequestError(
            f"guidance: {asked:g} is asked of a streamed clip, which remembers one prediction; set guidance to 1, or "
            "name another sampler"
        )


def _negative(value: Words | None, default: AV[str]) -> AV[str]:
    if value is None or isinstance(value, AV):
        return value or default
    if isinstance(value, str):
        return AV(value, value)
    if len(value) != 2:
        raise RequestError(f"negative: {value} is not one prompt or a pair (video, audio)")
    return AV(*(mine if given is None else given for given, mine in zip(value, default.values(), strict=True)))


def pair(name: str, value: Scale | None, default: AV[float], low: float, high: float) -> AV[float]:
    if value is None:
        return default
    if isinstance(value, tuple):
        if len(value) != 2:
            raise RequestError(f"{name}: {value} is not one number or a pair (video, audio)")
        value = AV(*value)
    pair = value if isinstance(value, AV) else AV(value, value)
    for modality, each in pair.items():
        if not low <= each <= high:
            raise RequestError(f"{name}: {each:g} for {modality} is not from {low} to {high}")
    return pair


def picture_size(system: System, size: str | tuple[int, int] | None, image: Several) -> tuple[int, int] | None:
    """(height, width) that is asked for in numbers, as an aspect or by the first frame; None = the model's own."""
    if isinstance(size, tuple):
        return size
    if size is not None and re.fullmatch(r"\d+x\d+", size):
        height, width = size.split("x")
        return int(height), int(width)
    if size is not None and (system.sizes is None or not re.fullmatch(r"\d+:\d+", size)):
        known = "HEIGHTxWIDTH, such as 704x1280" + ("" if system.sizes is None else ", or an aspect, such as 16:9")
        raise RequestError(f"size: {size!r} is not {known}")
    if system.sizes is None or (size is None and image is None):
        return None
    if size is not None:
        return system.sizes.of_aspect(size)
    images = [image] if isinstance(image, str | Path | Clip) else list(image or ())
    found = {system.sizes.of_image(*_pixels(each)) for each in images}
    if len(found) > 1:
        sizes = " and ".join(f"{height}x{width}" for height, width in sorted(found))
        raise RequestError(f"image: the first frames ask for the sizes {sizes}; give one size for all (--size)")
    return found.pop() if found else None


def _pixels(image: str | Path | Clip) -> tuple[int, int]:
    """(height, width) as shown."""
    if isinstance(image, Clip):
        if image.frames is None:
            raise RequestError("image: the given clip has no picture; give one that has it")
        return image.frames.shape[1], image.frames.shape[2]
    from soundstage.media.probe import probe

    video = probe(image).video
    if video is None:
        raise RequestError(f"image: {image} has no picture; give a file that has one")
    return video.height, video.width
