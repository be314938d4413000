"""Training tasks as masks: what of a clip is generated (1) and what is given (0).

A mask function maps latents x (B, C, F, ...) to a mask (B, 1) for the whole modality, (B, F) per latent step, or
(B, 1, F, H, W) per cell. Both modalities of a task draw from the same rng, so a cut in time falls at the same moment
of the picture and of the sound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soundstage.core.av import AV, spread
from soundstage.core.errors import ConfigError, one_of
from soundstage.core.rng import Rng

Mask = Callable[[Tensor, Rng], Tensor]


def everything(x: Tensor, rng: Rng) -> Tensor:  # noqa: ARG001
    """All of the modality is generated."""
    return torch.ones(x.shape[0], 1, dtype=torch.bool)


def nothing(x: Tensor, rng: Rng) -> Tensor:  # noqa: ARG001
    """All of the modality is given."""
    return torch.zeros(x.shape[0], 1, dtype=torch.bool)


def after_first(x: Tensor, rng: Rng) -> Tensor:  # noqa: ARG001
    """The first latent step is given: with a causal codec that is one image."""
    return (torch.arange(x.shape[2]) > 0).expand(x.shape[0], -1)


def continuation(x: Tensor, rng: Rng) -> Tensor:
    """The beginning, between one step and 3/4 of the clip, is given."""
    cut = rng.fold("cut").uniform()[:, None] * 0.75
    mask = _middles(x) > cut
    mask[:, 0] = False
    return mask


def gap(x: Tensor, rng: Rng) -> Tensor:
    """An interval of 1/5 to 4/5 of the clip is generated, the rest is given."""
    length = 0.2 + 0.6 * rng.fold("length").uniform()[:, None]
    start = rng.fold("start").uniform()[:, None] * (1 - length)
    return (_middles(x) >= start) & (_middles(x) < start + length)


def box(x: Tensor, rng: Rng) -> Tensor:
    """A rectangle of cells, from one to all but one along each side, is generated in every frame. Video only."""
    size, corner = rng.fold("size").uniform(2), rng.fold("corner").uniform(2)
    inside = []
    for axis, cells in enumerate(x.shape[3:5]):
        length = 1 + (size[:, axis, None] * max(1, cells - 1)).floor()
        start = (corner[:, axis, None] * (cells - length + 1)).floor()
        index = torch.arange(cells)
        inside.append((index >= start) & (index < start + length))
    mask = inside[0][:, None, None, :, None] & inside[1][:, None, None, None, :]
    return mask.expand(-1, -1, x.shape[2], -1, -1)


def _middles(x: Tensor) -> Tensor:
    """(1, F) middle of each latent step as a fraction of the clip."""
    return ((torch.arange(x.shape[2]) + 0.5) / x.shape[2])[None]


@dataclass(frozen=True)
class Task:
    """What is generated of each modality; None = the modality is absent from the batch."""

    video: Mask | None = everything
    audio: Mask | None = everything

    def present(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """Those of `modalities` the task uses."""
        return tuple(name for name in modalities if getattr(self, name) is not None)

    def trains(self, modalities: Sequence[str]) -> bool:
        """Whether anything is generated where the data has these modalities."""
        return any(getattr(self, name) is not nothing for name in self.present(modalities))

    def mask(self, x0: AV[Tensor], rng: Rng) -> AV[Tensor]:
        """The masks of the modalities in x0, all of which the task must use; bool, on the CPU."""
        return AV(**{name: getattr(self, name)(x, rng) for name, x in x0.items()})


TASKS: Mapping[str, Task] = {
    "t2av": Task(),
    "t2v": Task(audio=None),
    "t2a": Task(video=None),
    "i2av": Task(video=after_first),
    "a2v": Task(audio=nothing),
    "v2a": Task(video=nothing),
    "extension": Task(continuation, continuation),
    "inpainting_time": Task(gap, gap),
    "inpainting_space": Task(video=box),
}


def draw(
    mixture: Mapping[str, float], x0: AV[Tensor], rng: Rng, tasks: Mapping[str, Task] = TASKS
) -> tuple[AV[Tensor], list[str]]:
    """A task for every sample, by the probabilities of `mixture`: (masks of the modalities used, names).

    Tasks that use the same modalities mix within a batch, sample by sample; which modalities a step uses is drawn
    once for its micro-batches and processes. Tasks that would generate nothing of x0 are left out. Raises ConfigError
    when none is left.
    """
    for name in mixture:
        if name not in tasks:
            raise one_of("tasks", name, tasks)
    fit = {name: p for name, p in mixture.items() if p > 0 and tasks[name].trains(x0.modalities)}
    if not fit:
        raise ConfigError(f"tasks: none of {', '.join(mixture)} generates anything of {', '.join(x0.modalities)}")
    families: dict[tuple[str, ...], dict[str, float]] = {}
    for name, p in fit.items():
        families.setdefault(tasks[name].present(x0.modalities), {})[name] = p
    shared = rng.everywhere().fold("family")
    family = list(families)[int(_choose([sum(f.values()) for f in families.values()], shared)[0])]
    names = list(families[family])
    pick = _choose(list(families[family].values()), rng.fold("task"))
    used = x0.only(*family)
    # every task's masks, not only the drawn ones, so that their layout is the same at every step
    masks = {i: tasks[name].mask(used, rng.fold("mask", name)) for i, name in enumerate(names)}
    return _select(pick, masks, used), [names[i] for i in pick.tolist()]


def _choose(weights: list[float], rng: Rng) -> Tensor:
    """(B,) indices drawn with these weights."""
    edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(edges / edges[-1], rng.uniform().double(), right=True).clamp_max(len(weights) - 1)


def _select(pick: Tensor, masks: Mapping[int, AV[Tensor]], x0: AV[Tensor]) -> AV[Tensor]:
    """Row b of masks[pick[b]], all in the finest layout among them."""
    chosen = {}
    for name, x in x0.items():
        layers = {i: mask[name] for i, mask in masks.items()}
        if any(layer.ndim > 2 for layer in layers.values()):
            layers = {i: spread(layer, x) for i, layer in layers.items()}
        result = next(iter(layers.values()))
        for i, layer in layers.items():
            result = torch.where((pick == i).reshape(-1, *(1,) * (layer.ndim - 1)), layer, result)
        chosen[name] = result
    return AV(**chosen)
