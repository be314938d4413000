"""Memory and arithmetic of a run before it is run, and a count of live bytes to hold the prediction against.

Weights, gradients, moments and averages are counted. What a block keeps and needs while it is computed again is had by
running one block and two on the meta device, where tensors have sizes and no memory. How often each network is called
is had by running the objective itself on networks that do nothing but count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soundstage.core.attention import Attend
from soundstage.core.av import AV
from soundstage.core.batch import Batch
from soundstage.core.causal import Cache
from soundstage.core.conditions import Conditions
from soundstage.core.rng import Rng
from soundstage.training.config import Optim, Shared, TrainConfig
from soundstage.training.optim import groups
from soundstage.training.parallel import recompute
from soundstage.training.state import networks

STEPS = 100  # of the objective, to count its calls: exits are drawn anew at each


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are alive: `now`, and `peak` since the last `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: set[int] = set()

    def reset(self) -> None:
        """Begin a new peak at what is alive."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return made

    def leave_out(self, modules: Iterable[nn.Module]) -> None:
        """Do not count the weights of modules that were there before."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._held.add(tensor.untyped_storage()._cdata)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        self._held.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


class _Flash(torch.autograd.Function):
    """Attention's memory without its arithmetic, for the meta device: nothing of the size L x S is ever made."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401, ARG004
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch. kept: per block, from the forward pass to the backward. working: the most beside it."""

    kept: int
    working: int


def activations(config: TrainConfig, latents: AV[tuple[int, ...]], rows: int, plain: float) -> Activations:
    """Of the student, on `rows` samples of these latent shapes.

    plain: samples, per sample, of the largest call without gradient, such as 2 of a guided teacher.
    """

    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    needed = {"teacher", getattr(config.model, "base", "teacher")}
    few = replace(config, roles={name: role for name, role in config.roles.items() if name in needed})

    def place(name: str, module: nn.Module) -> nn.Module:
        moves = name == "student" or few.roles[name].optim is not None
        module = module.to(kind).requires_grad_(moves)
        return recompute(module) if config.parallel.checkpointing else module

    def at(depth: int) -> tuple[int, int]:
        with torch.device("meta"):
            nets = networks(few, place, lambda model: _cut(model.build(), depth))
        with _flash(nets.values()):
            whole = _learning(nets, latents, rows)
            aside = _calling(nets, nets.get("teacher", nets["student"]), latents, round(rows * plain)) if plain else 0
        return whole, aside

    (one, aside), (two, _) = at(1), at(2)
    kept = two - one
    return Activations(kept, max(one - kept, aside))


def _cut(module: nn.Module, depth: int) -> nn.Module:
    """The module with its first blocks alone."""
    module.blocks = module.blocks[:depth]  # type: ignore[index]
    return module


@contextmanager
def _flash(modules: Iterable[nn.Module]) -> Iterator[None]:
    held = [part for module in modules for part in _parts(module) if isinstance(part, Attend)]
    before = [part.run for part in held]
    for part in held:
        part.run = _Flash.apply  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, run in zip(held, before, strict=True):
            part.run = run


def _parts(module: nn.Module) -> Iterable[nn.Module]:
    """Its modules, with those that an adapter's blocks are made of."""
    blocks = getattr(module, "blocks", ())
    return [*module.modules(), *(part for block in blocks for part in block.modules())]


def _told(latents: AV[tuple[int, ...]], rows: int) -> tuple[AV[Tensor], AV[Tensor], Conditions]:
    x = latents.map(lambda shape: torch.empty(rows, *shape, device="meta"))
    return x, x.map(lambda z: torch.empty(z.shape[0], device="meta")), Conditions()


def _learning(nets: Mapping[str, nn.Module], latents: AV[tuple[int, ...]], rows: int) -> int:
    """Most bytes beside weights and their gradients in a forward and a backward pass of the student."""
    student = nets["student"]
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    _calling(nets, student, latents, rows)  # what is kept for later calls, such as rotations, is there from here on
    with LiveBytes() as live:
        live.leave_out(nets.values())
        made = student(*_told(latents, rows))
        torch.stack([x.sum() for x in made.values()]).sum().backward()
    return live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@torch.no_grad()
def _calling(nets: Mapping[str, nn.Module], module: nn.Module, latents: AV[tuple[int, ...]], rows: int) -> int:
    """Most bytes in a call without gradient."""
    with LiveBytes() as live:
        live.leave_out(nets.values())
        module(*_told(latents, rows))
    return live.peak


# Calls


@dataclass(frozen=True)
class Calls:
    """How a step calls a role's network, in samples per sample of the batch: without gradient, and with.

    largest: most samples, per sample, in one call without gradient.
    """

    plain: float = 0.0
    learning: float = 0.0
    largest: float = 0.0


class _Counter:
    """A network that does nothing but count; a causal one too (core.causal), of one step a chunk."""

    def __init__(self, samples: int, steps: int) -> None:
        self.scale = torch.zeros((), requires_grad=True)
        self.samples, self.steps = samples, steps
        self.plain = self.learning = self.largest = 0.0

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:  # noqa: ARG002
        rows = x_t.batch / self.samples * next(x_t.values()).shape[2] / self.steps
        if torch.is_grad_enabled() and self.scale.requires_grad:
            self.learning += rows
        else:
            self.plain += rows
            self.largest = max(self.largest, rows)
        return x_t.map(lambda x: x * self.scale)

    def chunks(self, steps: AV[int]) -> tuple[AV[slice], ...]:
        return tuple(steps.map(lambda _, k=k: slice(k, k + 1)) for k in range(self.steps))

    def extend(
        self, cache: Cache, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
    ) -> tuple[AV[Tensor], Cache]:
        return self(x_t, t, cond, r=r), cache


def count_calls(config: TrainConfig, modalities: Iterable[str], chunks: int = 2) -> dict[str, Calls]:
    """Mean over 100 steps, by role. chunks: in which a causal student makes a clip; a call on one is its share."""
    shapes = {"video": (2, chunks, 2, 2), "audio": (2, chunks)}
    x0 = AV(**{name: torch.zeros(2, *shapes[name]) for name in modalities})
    batch = Batch(x0, Conditions(), ("a", "b"))
    nets = {role: _Counter(len(batch), chunks) for role in config.models}
    for step in range(STEPS):
        for role in config.objective.turn(step):
            for name, net in nets.items():
                net.scale.requires_grad_(name == role)
            config.objective.loss(role, nets, batch, Rng.of(config.seed, len(batch)).fold("step", step, role))
    return {role: Calls(net.plain / STEPS, net.learning / STEPS, net.largest) for role, net in nets.items()}


def flops_per_step(config: TrainConfig, calls: Mapping[str, Calls], flops: Mapping[str, float]) -> float:
    """Of the whole batch; flops: of one call on one sample, by role. A backward pass costs two calls, and one more
    where blocks are computed again."""
    learning = 4 if config.parallel.checkpointing else 3
    each = (flops[role] * (made.plain + learning * made.learning) for role, made in calls.items())
    return config.batch_size * sum(each)


# Per device


@dataclass(frozen=True)
class Memory:
    """Bytes on each of `devices`. gathered: divided weights while they are whole, with a block's gradients."""

    devices: int
    accumulate: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it at the same time."""
        held = self.weights + self.gradients + self.optimizer + self.average
        return held + self.gathered + self.activations


@dataclass(frozen=True)
class _Size:
    """A role: bytes of its weights, numbers that move and bytes of their moments, largest block and the rest."""

    weights: int
    moving: int
    moments: int
    block: int
    rest: int
    depth: int


def memory(
    config: TrainConfig,
    nets: Mapping[str, nn.Module],
    latents: AV[tuple[int, ...]],
    calls: Mapping[str, Calls],
    devices: Iterable[int],
) -> list[Memory]:
    """For each number of devices, on one sample at a time (`accumulate`); without the allocator's and NCCL's own.

    One device: at the run's own `accumulate`. nets: of the meta device, by role.
    """
    optims = {"student": config.optim} | {name: role.optim for name, role in config.roles.items()}
    sizes = {name: _size(module, optims[name]) for name, module in nets.items()}
    plain = max(made.largest for made in calls.values())
    found, beside = [], cache(lambda rows: activations(config, latents, rows, plain))
    for count in devices:
        accumulate = max(1, config.batch_size // count) if count > 1 else config.accumulate
        rows = max(1, config.batch_size // (count * accumulate))
        found.append(_on(config, sizes, beside(rows), count, accumulate))
    return found


def _on(config: TrainConfig, sizes: Mapping[str, _Size], act: Activations, count: int, accumulate: int) -> Memory:
    held = count if config.parallel.shard == "auto" else min(count, config.parallel.shard)
    here = {name: size for name, size in sizes.items() if name not in config.parallel.offload}

    def part(size: _Size, number: int) -> int:
        return -(-number // held) if size.depth else number

    student = sizes["student"]
    depth = max(size.depth for size in sizes.values())
    gradients = max(4 * part(size, size.moving) for size in sizes.values())
    kept = act.kept * depth
    if accumulate == 1:  # they grow in the backward pass as the activations go
        gradients, kept = (gradients, 0) if gradients > kept else (0, kept)
    return Memory(
        count,
        accumulate,
        sum(part(size, size.weights) for size in here.values()),
        gradients,
        sum(part(size, size.moments) for size in here.values()),
        part(student, student.weights) if config.ema is not None else 0,
        _gathered(config, sizes, held),
        kept + act.working,
    )


def _gathered(config: TrainConfig, sizes: Mapping[str, _Size], held: int) -> int:
    """Two blocks at a time, the gradient of one in both types, and what is in no block, of every role."""
    bf16 = config.precision == "bf16"
    if held == 1:
        return 2 * max(size.moving for size in sizes.values()) if bf16 else 0  # autocast's copies
    each = 2 if bf16 and config.parallel.gather == "bf16" else 4
    blocks = [(2 * each + (each + 4 if size.moving else 0)) * size.block for size in sizes.values() if size.depth]
    return max(blocks, default=0) + sum(each * size.rest for size in sizes.values() if size.depth)


def _size(module: nn.Module, optim: Optim | None) -> _Size:
    own = dict(module.named_children()).get("blocks")
    blocks = [] if own is None else [sum(p.numel() for p in block.parameters()) for block in own.children()]
    numbers = sum(p.numel() for p in module.parameters())
    tensors = [*module.parameters(), *module.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    moving = moments = 0
    if optim is not None:
        for (kind, factor), parameters in groups(module, optim).items():
            count = sum(p.numel() for p in parameters) if factor else 0
            moving += count
            moments += count * (4 if kind == "muon" else 8)
    return _Size(weights, moving, moments, max(blocks, default=0), numbers - sum(blocks), len(blocks))


def known(config: TrainConfig) -> dict[str, Mapping[str, Any]] | None:
    """What each role's network says of itself; None where one says nothing of the latents it takes."""
    told: dict[str, Mapping[str, Any]] = {}
    for role, model in config.models.items():
        whole = config.roles[model.base].model if isinstance(model, Shared) else model
        own = getattr(whole, "describe", None)
        if own is None or "latents" not in (said := own()):
            return None
        told[role] = said
    return told
