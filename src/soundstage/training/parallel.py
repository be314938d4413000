"""One run over many processes: how networks are divided, and what the processes tell each other.

`torchrun --nproc-per-node 8 -m soundstage train RECIPE`. Without torchrun there is one process, every method below is
the identity, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soundstage.core.errors import ConfigError, SoundstageError
from soundstage.core.parallel import PATIENCE, Group, context_parallel, init_from_env, leave, only_rank_zero

T = TypeVar("T")


class LostError(SoundstageError, RuntimeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Parallel:
    """How a run uses its processes; without torchrun only `checkpointing` means anything.

    shard: processes that hold one copy of the weights between them; "auto" = all of them; fewer = every such group has
        a copy (HSDP), best one machine each; 1 = a copy each. context: processes that share each clip (Ulysses).
    checkpointing: compute every block again in the backward pass instead of keeping its inner values.
    offload: roles whose weights and optimiser rest in the CPU's memory, block by block on the device for their calls.
    gather: type in which a run of precision bf16 gathers divided weights: "bf16" is half the traffic; "fp32" where an
        objective takes derivatives of the network in float32 (Derivative, as consistency and mean flow do).
    """

    shard: int | Literal["auto"] = "auto"
    context: int = 1
    checkpointing: bool = False
    offload: tuple[str, ...] = ()
    gather: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        if self.shard != "auto" and self.shard < 1:
            raise ConfigError(f"parallel.shard: {self.shard} is not at least 1, nor auto")
        if self.context < 1:
            raise ConfigError(f"parallel.context: {self.context} is not at least 1")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the tensor itself where it is not divided."""
    whole_or_part = getattr(tensor, "to_local", None)
    return tensor if whole_or_part is None else whole_or_part()


def divided(tensor: Tensor) -> bool:
    """Whether a tensor is divided over processes (a DTensor)."""
    return getattr(tensor, "to_local", None) is not None


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every process holds, divided as `like` is; itself where that is not divided."""
    if not divided(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole.to(local(like).device),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        src_data_rank=None,
    )


class _Recomputed:
    """A block whose inner values are computed again in the backward pass. Mixed into the class of a block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        run: Callable[..., Any] = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)


@cache
def _recomputed(kind: type) -> type:
    return type(kind.__name__, (_Recomputed, kind), {"__module__": kind.__module__})


def recompute(module: nn.Module) -> nn.Module:
    """Compute every element of `module.blocks` again in the backward pass, in place; copies of them do so too."""
    for block in _blocks(module):
        if not isinstance(block, _Recomputed):
            block.__class__ = _recomputed(type(block))
    return module


def _blocks(module: nn.Module) -> tuple[nn.Module, ...]:
    """Its own blocks: an adapter on another module has none."""
    found = dict(module.named_children()).get("blocks")
    return () if found is None else tuple(found.children())


def shard(module: nn.Module, mesh: Any, *, bf16: bool = False, offload: bool = False) -> nn.Module:  # noqa: ANN401
    """Divide a module over a mesh in place (FSDP2): each of `module.blocks` by itself, then what is left.

    mesh: (shard,), or (replicate, shard). bf16: compute in it; weights stay and gradients are averaged in float32.
    Inputs keep their type, as times must. A block's weights are gathered for a call and dropped after it; what is left
    stays gathered until `World.rest`, as a loss on the blocks alone (GAN) never tells the module that they are needed.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    else:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    resting = CPUOffloadPolicy() if offload and mesh.device_type == "cuda" else OffloadPolicy()
    for part in (*_blocks(module), module):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=resting, reshard_after_forward=part is not module)
    return module


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a run, and this one's place among them.

    mesh: over which weights are divided, None where each process has a copy. context: the processes that share this
    one's clips. writers: the group that checkpoints are written in, on the CPU, beside the training's own.
    """

    device: torch.device
    parallel: Parallel = Parallel()
    bf16: bool = False
    rank: int = 0
    size: int = 1
    mesh: Any = None
    context: Group = None
    writers: Group = None

    @property
    def first(self) -> bool:
        """Whether this process logs, writes and speaks."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """Parts that a batch is cut into, one for each process or group that shares clips."""
        return self.size // (1 if self.context is None else self.parallel.context)

    @property
    def part(self) -> int:
        """Which of the parts is this process's."""
        return self.rank * self.parts // self.size

    def build(self, model: Any) -> nn.Module:  # noqa: ANN401
        """The network of a configuration; off the first process without memory for its weights, which `place` brings.

        The first process draws them as one process alone would.
        """
        if self.first:
            return model.build()
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = model.build()
            except RuntimeError:  # it looks at weights that are not there
                module = None
        if module is None:
            return model.build()
        kept = (value for part in module.modules() for value in vars(part).values())
        if any(value.is_meta for value in kept if isinstance(value, Tensor)):  # nothing would bring these
            return model.build()
        return module

    def place(self, module: nn.Module, role: str) -> nn.Module:
        """The module on its device and divided, in place, with the first process's weights and buffers.

        A module without `.blocks` (heads, adapters) stays whole on every process; `average` joins its gradients.
        """
        if self.parallel.checkpointing:
            recompute(module)
        if self.size == 1:
            return module.to(self.device)
        if self.context is not None and _blocks(module):
            context_parallel(module, self.context)
        whole = {name: tensor.detach() for name, tensor in _tensors(module)} if self.first else {}
        module.to("meta")
        if self.mesh is not None and _blocks(module):
            offload = role in self.parallel.offload
            shard(module, self.mesh, bf16=self.bf16 and self.parallel.gather == "bf16", offload=offload)
            module.to_empty(device="cpu" if offload else self.device)
            for part in module.modules():
                for name, buffer in part._buffers.items():
                    part._buffers[name] = None if buffer is None else buffer.to(self.device)
        else:
            module.to_empty(device=self.device)
        with torch.no_grad():
            for name, tensor in _tensors(module):
                sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                if self.first:
                    sent.copy_(whole.pop(name))
                torch.distributed.broadcast(sent, 0)
                local(tensor).copy_(local(part_of(sent, tensor)))
        return module

    def rest(self, modules: Iterable[nn.Module]) -> None:
        """Drop the weights still gathered after calls: `parameters()` are the divided ones again, and may move."""
        for module in modules if self.mesh is not None else ():
            if _blocks(module):
                module.reshard()  # type: ignore[operator]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process; all get the same answer."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0) if self.size > 1 else flag

    def told(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, 0, group=self.writers)
        return held[0]

    def after_first(self, work: Callable[[], T]) -> T:
        """`work()` on every process, on the first before the others: what it caches is there for them."""
        found = only_rank_zero(work, self.writers)
        return found if self.first else work()  # type: ignore[return-value]

    @torch.no_grad()
    def average(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of undivided parameters over the processes; those of divided ones are already.

        A parameter without a gradient here counts as zeros where another process has one.
        """
        whole = [] if self.size == 1 else [p for p in parameters if not divided(p)]
        if not whole:
            return
        has = [torch.tensor([p.grad is not None for p in whole], dtype=torch.float32, device=self.device)]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
        flat = self.mean(torch.cat([part.float().reshape(-1) for part in (*parts, *has)]))
        *means, has = flat.split([part.numel() for part in (*parts, *has)])
        for parameter, mean, found in zip(whole, means, has.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if found else None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


@contextmanager
def joined(parallel: Parallel, device: str | torch.device | None = None, *, bf16: bool = False) -> Iterator[World]:
    """The world that torchrun's environment tells; the process alone without it. Leaves it unless it was joined before.

    Raises ConfigError where the processes cannot be divided as `parallel` says, LostError when one of them is gone.
    """
    before = torch.distributed.is_available() and torch.distributed.is_initialized()
    group, rank, here = init_from_env(device)
    if group is None:
        yield World(here, parallel, bf16)
        return
    try:
        with warnings.catch_warnings():
            # a block may return a view: nothing here writes into what a block returns
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
            yield _world(parallel, here, rank, bf16)
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2].rstrip(".")
        raise LostError(
            f"process {rank} stopped because another is gone ({reason}); the last whole checkpoint is kept: run the "
            "same command again and it goes on from there"
        ) from error
    finally:
        if not before:
            leave()


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error is of the talk between processes: gloo's are plain RuntimeErrors."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def _world(parallel: Parallel, device: torch.device, rank: int, bf16: bool) -> World:
    from torch.distributed.device_mesh import init_device_mesh

    size = torch.distributed.get_world_size()
    held = size if parallel.shard == "auto" else parallel.shard
    for name, count in (("shard", held), ("context", parallel.context)):
        if size % count:
            fit = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ConfigError(f"parallel.{name}: {size} processes are no multiple of {count}; choose one of {fit}")
    mesh = None
    if held == size:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    elif held > 1:
        mesh = init_device_mesh(device.type, (size // held, held), mesh_dim_names=("replicate", "shard"))
    context = None
    if parallel.context > 1:
        rows = init_device_mesh(
            device.type, (size // parallel.context, parallel.context), mesh_dim_names=("clips", "context")
        )
        context = rows["context"].get_group()
    writers = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return World(device, parallel, bf16, rank, size, mesh, context, writers)
