"""One sample over several processes: each holds a part of the tokens and, while it attends, a part of the heads.

`torchrun --nproc-per-node 2 PROGRAM`: every process runs the same program with the same seed, so noise is the same
everywhere; every process ends with the whole result, and one of them writes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from soundstage.core.attention import Attend, Tokens
from soundstage.core.errors import ConfigError, SoundstageError

Group = Any
"""A torch.distributed.ProcessGroup; None where there is one process."""
T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # that a process waits for the first to decode and write


def init_from_env(device: str | torch.device | None = None) -> tuple[Group, int, torch.device]:
    """(group, rank, device) as torchrun's environment says; (None, 0, device) without it or for one process.

    device: "cpu" or "cuda"; default CUDA where there is a device. Joins over gloo, for what is on CUDA over nccl.
    Raises ConfigError for part of an environment or more processes than devices.
    """
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return None, 0, torch.device(device or ("cuda" if cuda else "cpu"))
    rank, local = _number("RANK"), _number("LOCAL_RANK")
    if cuda and local >= torch.cuda.device_count():
        raise ConfigError(
            f"torchrun: process {local} of this machine has no device, there are {torch.cuda.device_count()}; "
            "lower --nproc-per-node"
        )
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
            device_id=here if cuda else None,
        )
    return torch.distributed.group.WORLD, rank, here


def leave() -> None:
    """Leave the group that `init_from_env` joined; nothing where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def context_parallel(module: nn.Module, group: Group) -> nn.Module:
    """Split the tokens of every call over the processes of `group`, in place (Ulysses, arXiv:2309.14509).

    Any module whose attention goes through core.attention.Attend and whose ends go through Tokens; inputs, conditions
    and outputs are whole on every process. None as the group: one process again. Raises ConfigError where the module
    has no such parts, or its heads (`num_heads` of a module with an Attend) do not divide over the processes.
    """
    attends = [part for part in module.modules() if isinstance(part, Attend)]
    ends = [part for part in module.modules() if isinstance(part, Tokens)]
    size = 1 if group is None else torch.distributed.get_world_size(group)
    if size > 1:
        if not attends or not ends:
            raise ConfigError(
                f"context parallel: the attention of {type(module).__name__} cannot be shared between processes; "
                "start one process"
            )
        heads = math.gcd(*_heads(module))
        if heads % size:
            *few, most = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise ConfigError(
                f"context parallel: {size} processes cannot share the {heads} attention heads of "
                f"{type(module).__name__}; start {', '.join(few)} or {most}"
            )
    for part in (*attends, *ends):
        part.group = group
    return module


def only_rank_zero(work: Callable[[], T], group: Group) -> T | None:
    """What `work()` gives, on the first process; None on the others, which wait until it is done.

    An error in `work` ends every process: the first raises it, the others a SoundstageError that tells it.
    """
    if group is None:
        return work()
    told: list[str | None] = [None]
    if torch.distributed.get_rank(group) != 0:
        torch.distributed.broadcast_object_list(told, src=torch.distributed.get_global_rank(group, 0), group=group)
        if told[0] is not None:
            raise SoundstageError(f"the first process stopped: {told[0]}")
        return None
    try:
        return work()
    except BaseException as error:
        told = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        torch.distributed.broadcast_object_list(told, src=torch.distributed.get_global_rank(group, 0), group=group)


def _heads(module: nn.Module) -> list[int]:
    """Numbers of heads that the modules with an Attend tell; 0, which every number divides, where none does."""
    told = [
        getattr(parent, "num_heads", 0)
        for parent in module.modules()
        if any(isinstance(child, Attend) for child in parent.children())
    ]
    return [n for n in told if n] or [0]


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ConfigError(f"torchrun: {name} is {text!r} in the environment, not a number; start with torchrun")
    return int(text)
