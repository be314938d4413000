"""Tasks as presets: what is generated, what is given, and from what level of noise each modality starts.

A task is data for one sampler: latents that are known, a mask per latent step (1 = generate, 0 = keep) and a time
grid per modality. A modality given whole is held at t = 0; a modality known in part is kept by its mask; an edit
starts from a partial t; an absent modality is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundstage.core import schedule
from soundstage.core.av import AV
from soundstage.core.errors import RequestError, one_of
from soundstage.core.system import Sampling

BOTH = ("video", "audio")


@dataclass(frozen=True)
class Task:
    """generates: modalities made. needs: inputs it cannot do without ("image", "audio", "video" = a clip).

    holds: modalities given whole. allows: inputs it can also use. keeps: how a given clip is kept where modalities are
    both given and generated: "prefix" (the clip goes on), "outside" (all but the ranges), "noised" (an edit).
    """

    name: str
    generates: tuple[str, ...]
    needs: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    allows: tuple[str, ...] = ()
    keeps: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every input it can use."""
        return self.needs + self.allows


TASKS = {
    task.name: task
    for task in (
        Task("t2av", BOTH, allows=("image",)),
        Task("t2v", ("video",), allows=("image",)),
        Task("t2a", ("audio",)),
        Task("i2av", BOTH, needs=("image",)),
        Task("a2v", ("video",), needs=("audio",), holds=("audio",), allows=("image",)),
        Task("v2a", ("audio",), needs=("video",), holds=("video",)),
        Task("extension", BOTH, needs=("video",), keeps="prefix"),
        Task("inpaint", BOTH, needs=("video",), keeps="outside"),
        Task("edit", BOTH, needs=("video",), keeps="noised"),
    )
}

_INFERRED = {(): "t2av", ("image",): "i2av", ("audio",): "a2v", ("audio", "image"): "a2v", ("video",): "v2a"}


def resolve(
    name: str | None, inputs: Iterable[str], modalities: Sequence[str] = BOTH, needs: Sequence[str] = ()
) -> Task:
    """The task of that name, or the one that the inputs ask for, cut to what the model can generate.

    inputs: names of what was given, of "image", "audio", "video". needs: those that the model cannot do without.
    Raises RequestError for an impossible request.
    """
    given = tuple(sorted(inputs))
    for need in needs:
        if need not in given:
            raise RequestError(f"this model needs {_article(need)}: give {need} (--{need} PATH)")
    if name is None:
        if given not in _INFERRED:
            raise RequestError(
                f"{' and '.join(given)} are given and no task: name one that uses them all, or leave one out "
                "(image: i2av, audio: a2v, video: v2a, extension, inpaint or edit)"
            )
        name = _INFERRED[given]
    if name not in TASKS:
        raise RequestError(str(one_of("task", name, TASKS)))
    task = TASKS[name]
    for need in task.needs:
        if need not in given:
            raise RequestError(f"task {name} needs {_article(need)}: give {need} (--{need} PATH)")
    for extra in given:
        if extra not in task.inputs:
            uses = ", ".join(task.inputs) or "only the prompt"
            raise RequestError(f"task {name} has no use for {_article(extra)} (it uses {uses}): leave out {extra}")
    for held in task.holds:
        if held not in modalities:
            raise RequestError(f"task {name} needs a model that knows {held}; this one knows {modalities[0]}")
    generated = tuple(m for m in task.generates if m in modalities)
    if not generated:
        wanted, able = " and ".join(task.generates), " and ".join(modalities)
        raise RequestError(f"task {name} generates {wanted}, and this model generates only {able}: name another task")
    return Task(task.name, generated, task.needs, task.holds, task.allows, task.keeps)


def _article(name: str) -> str:
    return {"image": "an image", "audio": "a sound", "video": "a clip"}[name]


def prefix_mask(num_steps: int, known: int) -> Tensor:
    """(num_steps,) mask that keeps the first `known` steps."""
    return (torch.arange(num_steps) >= known).float()


def range_mask(starts: Sequence[float], ends: Sequence[float], ranges: Sequence[tuple[float, float]]) -> Tensor:
    """(num_steps,) mask that generates every step [start, end) which overlaps one of the ranges, all in seconds."""
    hits = [any(s < stop and e > start for start, stop in ranges) for s, e in zip(starts, ends, strict=True)]
    return torch.tensor(hits).float()


@dataclass(frozen=True, eq=False)
class Plan:
    """What the sampler is given. x: where it starts; times: grid (steps + 1,) per modality, descending.

    latents, mask: what `Known` keeps (mask (B, F) or (B, A), 0 = keep); None when no modality is known in part.
    """

    x: AV[Tensor]
    times: AV[Tensor]
    latents: AV[Tensor] | None = None
    mask: AV[Tensor] | None = None


def grids(
    task: Task, sampling: Sampling, latents: AV[Tensor], strength: AV[float], present: Sequence[str]
) -> AV[Tensor]:
    """A grid (steps + 1,) per present modality: from 1 to 0, from its strength for an edited one, 0 for a held one.

    Where the model has listed times, an edited modality starts at the one nearest to its strength.
    """
    levels = {name: strength[name] if task.keeps == "noised" and name in latents else 1.0 for name in present}
    start = AV(**{name: 0.0 if name in task.holds else level for name, level in levels.items()})
    if sampling.times is not None:
        rest = [0.0] * (sampling.steps + 1)
        listed = {n: _listed(sampling.times[n], level) if level else rest for n, level in start.items()}
        times = schedule.explicit(AV(**listed))
    else:
        first = sampling.shift.only(*present).map(lambda by: schedule.shift(sampling.start, by))
        moving = start.map(lambda level, top: min(level, top) or top, first)
        times = schedule.shifted(sampling.steps, sampling.shift.only(*present), moving)
    for name, level in start.items():
        if level == 0:
            times = schedule.held(times, name)
    return times


def _listed(levels: Sequence[float], start: float) -> list[float]:
    """A student's levels from the one nearest to `start` on, before which the modality rests: it knows no others."""
    first = min((level for level in levels if level > 0), key=lambda level: abs(level - start))
    return [min(level, first) for level in levels]


def plan(noise: AV[Tensor], times: AV[Tensor], latents: AV[Tensor], mask: AV[Tensor]) -> Plan:
    """Where one batch starts and what it keeps.

    noise: latents of pure noise for every modality present. times: the first level of each grid is where it starts.
    latents: clean latents of what is given; mask: for the modalities known in part, which start from noise.
    """
    starts: dict[str, Tensor] = {}
    for name, start in noise.items():
        level = float(times[name][0])
        whole = name in latents and name not in mask
        starts[name] = (1 - level) * latents[name] + level * start if whole else start
    if not mask.modalities:
        return Plan(AV(**starts), times)
    return Plan(AV(**starts), times, latents.only(*mask.modalities), mask)
