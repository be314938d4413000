"""`Generator`: prompts, and media to go by, to clips with sound."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from soundstage import __version__
from soundstage.core.av import AV, collate
from soundstage.core.causal import WAYS, causal
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Denoiser, Tileable
from soundstage.core.errors import Caution, RequestError
from soundstage.core.flow import ToData
from soundstage.core.guidance import Guided
from soundstage.core.known import Known
from soundstage.core.parallel import Group, context_parallel
from soundstage.core.rng import Rng
from soundstage.core.system import Sampling, System, load_system
from soundstage.inference.accelerate import Switches, forget
from soundstage.inference.fitting import Canvas, canvas
from soundstage.inference.given import Given, Inputs, Ranges, Several, encode_given, finish, read_inputs
from soundstage.inference.request import Scale, Words, each_seed, pair, picture_size, sampling_of
from soundstage.inference.tasks import Plan, Task, grids, plan, resolve
from soundstage.media.clip import Clip

OnStep = Callable[[int, int], None]

STRENGTH = 0.7
TEXTS = 256  # clips whose texts are encoded in one go, before the denoiser takes the memory
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
    """Generates with one system.

    batch: most samples at once; default by the memory there is. together: both predictions of guidance in one call, or
    in two that need half of the memory; default by the memory there is.
    """

    def __init__(
        self,
        system: System,
        device: str | torch.device = "cpu",
        batch: int | None = None,
        together: bool | None = None,
    ) -> None:
        self.system = system
        self.device = torch.device(device)
        self.batch = batch
        self.together = together
        self._prepared: list[nn.Module] = []

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        device: str | torch.device | None = None,
        *,
        weights: str | Path | None = None,
        switches: Switches | None = None,
        group: Group = None,
    ) -> Generator:
        """The model of that name or folder (default: the one in the package), on a GPU where there is one.

        weights: folder with the files of a published model. switches: how it is made lighter or faster. group: the
        processes that share each clip, from core.parallel; all of them make the same request.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        switches = switches or Switches()
        prepared: list[nn.Module] = []

        def prepare(module: nn.Module, device: torch.device) -> nn.Module:
            prepared.append(context_parallel(switches.apply(module, device), group))
            return prepared[-1]

        system = load_system(model, device, weights=weights, prepare=prepare)
        together = None if switches.guidance == "auto" else switches.guidance == "together"
        if isinstance(system.codec, Tileable):
            system.codec.tile = switches.tiles
        elif isinstance(switches.tiles, int):
            raise RequestError(f"tiles: the codec of {system.name} works on whole pictures; leave the switch out")
        generator = cls(system, device, together=together)
        generator._prepared = prepared
        return generator

    @overload
    def generate(self, prompt: str, **request: object) -> Generated: ...
    @overload
    def generate(self, prompt: Sequence[str], **request: object) -> list[Generated]: ...

    def generate(self, prompt: str | Sequence[str], **request: Any) -> Generated | list[Generated]:
        """One `Generated` for one prompt with num = 1, else a list; the request is that of `stream`."""
        made = list(self.stream(prompt, **request))
        return made[0] if isinstance(prompt, str) and len(made) == 1 else made

    @torch.no_grad()
    def stream(
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
        negative: Words | None = None,
        skip_layer: int | None = None,
        num: int = 1,
        duration: float | None = None,
        size: str | tuple[int, int] | None = None,
        sampler: str | None = None,
        strength: Scale | None = None,
        ranges: Ranges = (),
        on_step: OnStep | None = None,
    ) -> Iterator[Generated]:
        """Clips for a prompt or a list of prompts, each as soon as its batch is done.

        task: see inference.tasks; default by the inputs. image, audio, video: files or clips, one for all prompts or
        one per prompt. seed: of the first clip of each prompt, or one per prompt; clip k of a prompt has seed + k, and
        the same seed gives the same clip alone or in a batch. guidance: scale, one or (video, audio). negative: what
        it leads away from, one or (video, audio). skip_layer: the block left out of the negative prediction, -1 for
        none. duration: seconds. size: (height, width), "704x1280" or an aspect, "16:9"; default by the image, or the
        model's own. strength: for an edit, how much is made anew, in [0, 1], one or (video, audio). ranges: for
        inpaint, (start, end) in seconds. on_step(done, total): progress over all batches.
        Raises RequestError for what cannot be made, MediaError for a file that cannot be read.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num < 1:
            raise RequestError(f"num: {num} is not at least 1")
        named = {name for name, media in (("image", image), ("audio", audio), ("video", video)) if media is not None}
        preset = resolve(task, named, self.system.modalities, self.system.needs)
        sampling = sampling_of(self.system, preset, steps, sampler, guidance, negative, skip_layer)
        _skipping(self.system, sampling.skip_layer)
        level = pair("strength", strength, AV(STRENGTH, STRENGTH), 0, 1)
        seeds = each_seed(seed, len(prompts))
        to = canvas(self.system, duration, picture_size(self.system, size, image))
        inputs = read_inputs(preset, to, len(prompts), image, audio, video)
        if preset.name in self.system.cautions:
            warnings.warn(f"task {preset.name}: {self.system.cautions[preset.name]}", Caution, stacklevel=2)
        given = _encoded(self.system, preset, to, inputs, ranges, self.device)
        jobs = [_Job(p, seeds[i] + k, given[i]) for i, p in enumerate(prompts) for k in range(num)]
        batch = self.batch or batch_size(to, self.device)
        parts = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
        together = max(1, TEXTS // batch)
        for index, part in enumerate(parts):
            if index % together == 0:
                coming = [job.prompt for each in parts[index : index + together] for job in each]
                texts = self._texts(coming, sampling)
            done = _progress(on_step, _steps(self.system, preset, to, sampling), index, len(parts))
            yield from self._batch(preset, to, part, texts, sampling, level, done)

    def _batch(
        self,
        task: Task,
        to: Canvas,
        jobs: Sequence[_Job],
        texts: _Texts,
        sampling: Sampling,
        strength: AV[float],
        on_step: Callable[..., None] | None,
    ) -> list[Generated]:
        present = tuple(n for n in to.shape.modalities if n in task.generates or n in task.holds)
        latents, mask = _stacked([job.given for job in jobs])
        rng = Rng(tuple(Rng.of(job.seed, 1).seeds[0] for job in jobs))
        noise = rng.fold("start").normal_like(to.shape.only(*present).map(lambda s: self._empty(len(jobs), *s)))
        steps = plan(noise, grids(task, sampling, latents, strength, present), latents, mask)
        denoiser, known = self._denoiser(steps, sampling, texts, len(jobs))
        cond = _told(texts.of([job.prompt for job in jobs]).only(*present), [job.given for job in jobs])
        sample = WAYS[sampling.sampler]
        x0 = sample(denoiser, steps.x, steps.times, cond, rng=rng.fold("sampler"), on_step=on_step)
        x0 = x0 if known is None else known.keep(x0)
        for module in self._prepared:
            forget(module)  # the codec needs the memory
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

    def _texts(self, prompts: Sequence[str], sampling: Sampling) -> _Texts:
        """Every distinct prompt of the request and the negatives, encoded in one go."""
        guided = any(scale != 1 for scale in sampling.guidance.values())
        form = self.system.form or str
        words = {prompt: form(prompt) for prompt in dict.fromkeys(prompts)}
        words |= {negative: negative for negative in sampling.negative.values() if guided and negative not in words}
        cond = self.system.encode_text(list(words.values())).to(self.device)
        return _Texts(list(words), cond, sampling.negative if guided else None)

    def _denoiser(self, steps: Plan, sampling: Sampling, texts: _Texts, size: int) -> tuple[Denoiser, Known | None]:
        denoiser = self.system.denoiser
        if sampling.flow_map:
            denoiser = ToData(denoiser)
        scale = sampling.guidance.only(*steps.x.modalities)
        if any(value != 1 for value in scale.values()):
            denoiser = Guided(
                denoiser,
                texts.negatives(size).only(*steps.x.modalities),
                scale,
                weak=_skipping(self.system, sampling.skip_layer),
                together=self._together(steps.x, size),
            )
        known = None if steps.latents is None else Known(denoiser, steps.latents, steps.mask)
        return known or denoiser, known

    def _together(self, x: AV[Tensor], size: int) -> bool:
        """Whether both predictions of guidance fit into memory at once."""
        if self.together is not None or self.system.activation_bytes is None:
            return self.together is not False
        need = 2 * size * self.system.activation_bytes(x.map(lambda z: tuple(z.shape[1:])))
        if self.device.type != "cuda":
            return need <= BUDGET
        return need <= torch.cuda.mem_get_info(self.device)[0] // 2


@dataclass(frozen=True, eq=False)
class _Texts:
    """Encoded prompts by their words, and the negative per modality."""

    words: Sequence[str]
    cond: Conditions
    negative: AV[str] | None

    def of(self, prompts: Sequence[str]) -> Conditions:
        """One row per prompt."""
        rows = [self.words.index(prompt) for prompt in prompts]
        return self.cond.map(lambda x: x[rows])

    def negatives(self, size: int) -> Conditions:
        """`size` rows, each modality with its own negative."""
        assert self.negative is not None
        parts = [self.of([words] * size).only(name) for name, words in self.negative.items()]
        return Conditions(
            text=_joined(part.text for part in parts), text_mask=_joined(part.text_mask for part in parts)
        )


def _joined(parts: Iterable[AV[Tensor] | None]) -> AV[Tensor] | None:
    """One value from parts of one modality each."""
    found = dict(item for part in parts if part is not None for item in part.items())
    return AV(**found) if found else None


def _told(cond: Conditions, given: Sequence[Given]) -> Conditions:
    """Conditions with what the model is told of each first frame."""
    parts = [each.cond for each in given if each.cond is not None]
    if not parts:
        return cond
    image = Conditions.cat(parts)
    return replace(cond, reference=image.reference, control=image.control, mask=image.mask)


def _skipping(system: System, block: int | None) -> Denoiser | None:
    """The denoiser of the negative prediction; raises RequestError where the system has no such block to leave out."""
    if block is None:
        return None
    if system.skipping is None:
        raise RequestError(f"skip_layer: {system.name} cannot leave out a block; leave the option out")
    return system.skipping((block,))


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


def _stacked(given: Sequence[Given]) -> tuple[AV[Tensor], AV[Tensor]]:
    modalities = {each.latents.modalities for each in given}
    if len(modalities) != 1:
        raise RequestError("some of the given clips have sound and some have not; generate them one by one")
    return collate([each.latents for each in given]), collate([each.mask for each in given])


def _progress(on_step: OnStep | None, steps: int, part: int, parts: int) -> Callable[..., None] | None:
    """The sampler's callback of one batch of several; steps: of one batch."""
    if on_step is None:
        return None
    done = count(part * steps + 1)
    return lambda *_: on_step(next(done), parts * steps)


def _steps(system: System, task: Task, to: Canvas, sampling: Sampling) -> int:
    """Steps of a batch: of a streamed clip, those of every chunk."""
    if sampling.sampler != "streamed":
        return sampling.steps
    present = to.shape.only(*(n for n in to.shape.modalities if n in task.generates or n in task.holds))
    return sampling.steps * len(causal(system.denoiser).chunks(present.map(lambda shape: shape[1])))


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
    if to.size != (0, 0):
        record["size"] = f"{to.size[0]}x{to.size[1]}"
    if any(sampling.negative.values()):
        record["negative"] = sampling.negative.as_dict()
    if sampling.skip_layer is not None:
        record["skip_layer"] = sampling.skip_layer
    if task.keeps == "noised":
        record["strength"] = strength.as_dict()
    if job.given.ranges:
        record["ranges"] = [list(window) for window in job.given.ranges]
    return record
