"""Checkpoints that many processes write together, each its part, while training goes on (torch.distributed.checkpoint).

They are read by any number of processes, one included; `checkpoint` tells the two kinds of checkpoint apart.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soundstage.core.errors import SoundstageError, WeightsError
from soundstage.core.parallel import only_rank_zero
from soundstage.data.store import flush
from soundstage.training.optim import Optimizer
from soundstage.training.parallel import World, divided, local


class SaveError(SoundstageError, OSError):
    """A checkpoint could not be written; the one before is whole."""

    def __init__(self, target: Path, error: BaseException) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        super().__init__(
            f"checkpoint {target}: could not be written ({reason}); the one before is kept. Free some space "
            "on the disk and run the same command again"
        )


STATE = "optimizers"
"""Names: `student/blocks.0.mlp.weight`, and `optimizers/student/0/12/exp_avg`."""


def gathered(nets: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """Every tensor of a run by its name in a checkpoint, divided as it is."""
    found = {f"{role}/{name}": tensor for role, module in nets.items() for name, tensor in module.state_dict().items()}
    for role, optimizer in optimizers.items():
        found |= _flat(role, optimizer.state_dict())
    return found


def _flat(role: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"{STATE}/{role}/{number}/{index}/{key}": value
        for number, part in enumerate(state["parts"])
        for index, moments in part["state"].items()
        for key, value in moments.items()
    }


class Writer:
    """Writes the checkpoints of a run in the background, one at a time, in a folder that is renamed when it is whole.

    Every process calls `save` and `wait` alike.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        target: Path,
        nets: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        about: Mapping[str, Any],
        drop: Any,  # noqa: ANN401
    ) -> None:
        """Copy the tensors to the CPU's memory and begin to write them; `drop()` is called once they are whole."""
        self.wait()
        if self._world.told(target.exists()):
            return
        tensors = {name: _copied(tensor) for name, tensor in gathered(nets, optimizers).items()}
        self._writing = self._pool.submit(self._write, target, tensors, about, drop)

    def wait(self) -> None:
        """Return when what was begun is whole; raises what stopped it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """End the thread, without raising what stopped it."""
        self._pool.shutdown()

    def _write(self, target: Path, tensors: dict[str, Tensor], about: Mapping[str, Any], drop: Any) -> None:  # noqa: ANN401
        group = self._world.writers
        part = target.with_name(f"{target.name}.part")

        def begin() -> None:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

        def end() -> None:
            (part / "checkpoint.json").write_text(json.dumps(about))
            for written in (part / "checkpoint.json", part):
                flush(written)
            part.rename(target)
            flush(target.parent)
            drop()

        import torch.distributed.checkpoint as dcp

        try:
            only_rank_zero(begin, group)
            dcp.save(tensors, checkpoint_id=part, process_group=group)
            only_rank_zero(end, group)
        except (dcp.CheckpointException, OSError) as error:  # the former is no Exception
            raise SaveError(target, _reason(error)) from error


def _reason(error: BaseException) -> BaseException:
    """The first failure among those of all processes."""
    failures = getattr(error, "failures", {})
    return next((failure for failure, _ in failures.values()), error)


def _copied(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, divided as the tensor is."""
    held = local(tensor.detach()).to("cpu", copy=True)
    if not divided(tensor):
        return held
    from torch.distributed.tensor import DTensor

    where: Any = tensor
    return DTensor.from_local(
        held, where.device_mesh, where.placements, run_check=False, shape=where.shape, stride=where.stride()
    )


def is_divided(path: Path) -> bool:
    """Whether a checkpoint was written by several processes."""
    return (path / ".metadata").is_file()


def shapes(path: Path) -> dict[str, torch.Size]:
    """Names and shapes of what a checkpoint holds."""
    return {name: tensor.size for name, tensor in _described(path).items()}


def read(path: Path, nets: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
    """Fill networks and optimisers from a checkpoint, this process's part of each; raises WeightsError on a misfit."""
    found = shapes(path)
    states = {role: _blank(path, role, optimizer, found) for role, optimizer in optimizers.items()}
    wanted = gathered(nets, {})
    for role, state in states.items():
        wanted |= _flat(role, state)
    _fill(path, wanted)
    for role, optimizer in optimizers.items():
        optimizer.load_state_dict(states[role])


def read_weights(path: Path, module: nn.Module, role: str) -> None:
    """Fill one network from what a checkpoint holds of a role; raises WeightsError on a misfit."""
    _fill(path, gathered({role: module}, {}))


def weights(path: Path, role: str) -> dict[str, Tensor]:
    """Every tensor of a role, whole, in the CPU's memory."""
    kept = {n: t for n, t in _described(path).items() if n.startswith(f"{role}/")}
    blank = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in kept.items()}
    _fill(path, blank)
    return {name.removeprefix(f"{role}/"): tensor for name, tensor in blank.items()}


def _blank(path: Path, role: str, optimizer: Optimizer, found: Mapping[str, torch.Size]) -> dict[str, Any]:
    told = json.loads((path / "checkpoint.json").read_text())["optimizers"].get(role)
    if told != optimizer.about():
        raise WeightsError(
            f"{path}: the optimiser of {role} there is {told}, here {optimizer.about()}; they do not fit"
        )
    kept = {}
    for name, shape in found.items():
        if name.startswith(f"{STATE}/{role}/"):
            number, index, key = name.split("/")[2:]
            kept[int(number), int(index), key] = shape
    return optimizer.blank(kept)


def _fill(path: Path, wanted: dict[str, Tensor]) -> None:
    """Read into tensors in place; each process reads by itself."""
    import torch.distributed.checkpoint as dcp

    roles = {name.split("/")[0] for name in wanted} - {STATE}
    found = {name: shape for name, shape in shapes(path).items() if name in wanted or name.split("/")[0] in roles}
    wrong = misfit({name: tensor.shape for name, tensor in wanted.items()}, found)
    if wrong:
        raise WeightsError(f"{path}: {wrong}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is meant to be
        dcp.load(wanted, checkpoint_id=path, no_dist=True)


def _described(path: Path) -> dict[str, Any]:
    """What torch wrote about each tensor."""
    from torch.distributed.checkpoint import FileSystemReader

    return dict(FileSystemReader(path).read_metadata().state_dict_metadata)


def misfit(own: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """The difference between a module's names and shapes and a checkpoint's, in words; "" when there is none."""
    kinds = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(saved[name])} for {tuple(own[name])}"
            for name in sorted(own.keys() & saved.keys())
            if tuple(own[name]) != tuple(saved[name])
        ],
    }
    told = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
    return "these weights are of another model: " + "; ".join(told) if told else ""
