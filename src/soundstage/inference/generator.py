"""`Generator`: prompts, and media to go by, to clips with sound."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from soundstage import __version__
from soundstage.core.av import AV, collate
from soundstage.core.denoiser import Denoiser
from soundstage.core.errors import RequestError, one_of
from soundstage.core.guidance import Guided
from soundstage.core.known import Known
from soundstage.core.rng import Rng
from soundstage.core.sampling import SAMPLERS
from soundstage.core.system import Sampling, System, load_system
from soundstage.inference.fitting import Canvas, canvas
from soundstage.inference.given import Given, Inputs, Ranges, Several, encode_given, finish, read_inputs
from soundstage.inference.tasks import Plan, Task, grids, plan, resolve
from soundstage.media.clip import Clip

Scale = float | tuple[float, float] | AV[float]
OnStep = Callable[[int, int], None]

STRENGTH = 0.7
MOST_STEPS = 1000
BUDGET = 2**30  # bytes for one batch on a CPU; on a GPU half of what is free
BYTES_PER_VALUE = 256  # activations per decoded value: 64 floats, the widest layer of a codec


@dataclass(frozen=True, eq=False)
class Generated:
    """One clip and how it was made. latents: clean, of this sample alone: video (C, F, H, W), audio (C, A).

    record: prompt, task, model, seed, steps, sampler, guidance, version: written into the container by `save`.
    """

    clip: Clip
    prompt: str
    seed: int
    task: str
    latents: AV[Tensor]
    record: dict[str, object] = field(default_factory=dict)

    def save(self, path: str | Path, **options: object) -> Path:
        """Write the clip with its record as JSON in the tag `comment`; options as in media.encode.write."""
        tags = {"title": self.prompt, "comment": json.dumps(self.record, ensure_ascii=False)}
        return replace(self.clip, metadata={**self.clip.metadata, **tags}).save(path, **options)


def read_record(metadata: dict[str, str]) -> dict[str, object]:
    """The record that `Generated.save` wrote, from a file's tags; empty when the file is not ours."""
    try:
        record = json.loads(metadata.get("comment", ""))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


class Generator:
    """Generates with one system. batch: most samples at once; default by the memory there is."""

    def __init__(self, system: System, device: str | torch.device = "cpu", batch: int | None = None) -> None:
        self.system = system
        self.device = torch.device(device)
        self.batch = batch

    @classmethod
    def load(cls, model: str | Path | None = None, device: str | None = None) -> Generator:
        """The model of that name or folder (default: the one in the package), on a GPU where there is one."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_system(model, device), device)

    @overload
    def generate(self, prompt: str, **request: object) -> Generated: ...
    @overload
    def generate(self, prompt: Sequence[str], **request: object) -> list[Generated]: ...

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        task: str | None = None,
        image: Several = None,
        audio: Several = None,
        video: Several = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        guidance: Scale | None = None,
        num: int = 1,
        duration: float | None = None,
        sampler: str | None = None,
        strength: Scale | None = None,
        ranges: Ranges = (),
        on_step: OnStep | None = None,
    ) -> Generated | list[Generated]:
        """Clips for a prompt or a list of prompts; one `Generated` for one prompt with num = 1, else a list.

        task: see inference.tasks; default by the inputs. image, audio, video: files or clips, one for all prompts or
        one per prompt. seed: of the first clip of each prompt, or one per prompt; clip k of a prompt has seed + k, and
        the same seed gives the same clip alone or in a batch. guidance: scale, one or (video, audio); the negative
        prompt is empty. duration: seconds. strength: for an edit, how much is made anew, in [0, 1], one or
        (video, audio). ranges: for inpaint, (start, end) in seconds. on_step(done, total): progress over all batches.
        Raises RequestError for what cannot be made, MediaError for a file that cannot be read.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num < 1:
            raise RequestError(f"num: {num} is not at least 1")
        named = {name for name, media in (("image", image), ("audio", audio), ("video", video)) if media is not None}
        preset = resolve(task, named, self.system.modalities)
        sampling = _sampling(self.system.sampling, steps, sampler, guidance)
        level = _pair("strength", strength, AV(STRENGTH, STRENGTH), 0, 1)
        seeds = _seeds(seed, len(prompts))
        to = canvas(self.system, duration)
        inputs = read_inputs(preset, to, len(prompts), image, audio, video)
        given = _encoded(self.system, preset, to, inputs, ranges, self.device)
        jobs = [_Job(p, seeds[i] + k, given[i]) for i, p in enumerate(prompts) for k in range(num)]
        size = self.batch or batch_size(to, self.device)
        parts = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        made: list[Generated] = []
        for index, part in enumerate(parts):
            done = _progress(on_step, sampling.steps, index, len(parts))
            made += self._batch(preset, to, part, sampling, level, done)
        return made[0] if isinstance(prompt, str) and num == 1 else made

    def _batch(
        self,
        task: Task,
        to: Canvas,
        jobs: Sequence[_Job],
        sampling: Sampling,
        strength: AV[float],
        on_step: Callable[..., None] | None,
    ) -> list[Generated]:
        present = tuple(n for n in to.shape.modalities if n in task.generates or n in task.holds)
        latents, mask = _stacked([job.given for job in jobs])
        rng = Rng(tuple(Rng.of(job.seed, 1).seeds[0] for job in jobs))
        noise = rng.fold("start").normal_like(to.shape.only(*present).map(lambda s: self._empty(len(jobs), *s)))
        steps = plan(noise, grids(task, sampling, latents, strength, present), latents, mask)
        denoiser, known = self._denoiser(steps, sampling.guidance, len(jobs))
        cond = self.system.encode_text([job.prompt for job in jobs]).only(*present).to(self.device)
        sample = SAMPLERS[sampling.sampler]
        x0 = sample(denoiser, steps.x, steps.times, cond, rng=rng.fold("sampler"), on_step=on_step)
        x0 = x0 if known is None else known.keep(x0)
        media = self.system.codec.decode(x0)
        return [
            Generated(
                finish(task, to, job.given, media, i),
                job.prompt,
                job.seed,
                task.name,
                x0.map(lambda x, i=i: x[i]),
                _record(self.system, task, job, sampling, to, strength),
            )
            for i, job in enumerate(jobs)
        ]

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device)

    def _denoiser(self, steps: Plan, guidance: AV[float], size: int) -> tuple[Denoiser, Known | None]:
        denoiser = self.system.denoiser
        scale = guidance.only(*steps.x.modalities)
        if any(value != 1 for value in scale.values()):
            denoiser = Guided(denoiser, self.system.encode_text([""] * size).to(self.device), scale)
        known = None if steps.latents is None else Known(denoiser, steps.latents, steps.mask)
        return known or denoiser, known


@dataclass(frozen=True, eq=False)
class _Job:
    prompt: str
    seed: int
    given: Given


def batch_size(to: Canvas, device: torch.device) -> int:
    """Samples at once by the memory there is, from 1 to 64."""
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else BUDGET
    values = 3 * to.num_frames * to.size[0] * to.size[1] + to.channels * to.num_samples
    return int(min(64, max(1, budget // (values * BYTES_PER_VALUE))))


def _encoded(
    system: System, task: Task, to: Canvas, inputs: Sequence[Inputs], ranges: Ranges, device: torch.device
) -> list[Given]:
    """Every distinct input encoded once, by itself, so that a batch changes nothing."""
    done: dict[int, Given] = {}
    for each in inputs:
        if id(each) not in done:
            done[id(each)] = encode_given(system, task, to, each, ranges, device)
    return [done[id(each)] for each in inputs]


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed] * count
    if len(seed) != count:
        raise RequestError(f"seed: {len(seed)} seeds for {count} prompts; give one for all or one per prompt")
    return list(seed)


def _sampling(base: Sampling, steps: int | None, sampler: str | None, guidance: Scale | None) -> Sampling:
    """The model's way of sampling with what was asked in its place; its explicit times hold for its own steps only."""
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise RequestError(f"steps: {steps} is not from 1 to {MOST_STEPS}; this model's default is {base.steps}")
    if sampler is not None and sampler not in SAMPLERS:
        raise RequestError(str(one_of("sampler", sampler, SAMPLERS)))
    times = base.times if steps is None else None
    return replace(
        base,
        sampler=sampler or base.sampler,
        steps=len(times) - 1 if times else steps or base.steps,
        guidance=_pair("guidance", guidance, base.guidance, 0, 100),
        times=times,
    )


def _pair(name: str, value: Scale | None, default: AV[float], low: float, high: float) -> AV[float]:
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


def _stacked(given: Sequence[Given]) -> tuple[AV[Tensor], AV[Tensor]]:
    modalities = {each.latents.modalities for each in given}
    if len(modalities) != 1:
        raise RequestError("some of the given clips have sound and some have not; generate them one by one")
    return collate([each.latents for each in given]), collate([each.mask for each in given])


def _progress(on_step: OnStep | None, steps: int, part: int, parts: int) -> Callable[..., None] | None:
    """The sampler's callback of one batch of several."""
    if on_step is None:
        return None
    return lambda step, *_: on_step(part * steps + step + 1, parts * steps)


def _record(
    system: System, task: Task, job: _Job, sampling: Sampling, to: Canvas, strength: AV[float]
) -> dict[str, object]:
    record: dict[str, object] = {
        "prompt": job.prompt,
        "task": task.name,
        "model": system.name,
        "seed": job.seed,
        "steps": sampling.steps,
        "sampler": sampling.sampler,
        "guidance": sampling.guidance.as_dict(),
        "duration": round(float(to.duration), 6),
        "soundstage": __version__,
    }
    if task.keeps == "noised":
        record["strength"] = strength.as_dict()
    if job.given.ranges:
        record["ranges"] = [list(window) for window in job.given.ranges]
    return record
