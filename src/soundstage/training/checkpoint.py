"""Checkpoints: written whole or not at all.

One process writes weights as safetensors and optimisers for torch.load(weights_only=True); several write as in
`shards`. Everything here reads both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from soundstage.core.errors import WeightsError
from soundstage.data.store import flush as _flush
from soundstage.training import shards
from soundstage.training.optim import Optimizer
from soundstage.training.parallel import divided, local, part_of
from soundstage.training.shards import SaveError

__all__ = ["SaveError", "export", "latest", "load", "load_weights", "restore", "samples_of", "save", "step_of"]


def save(
    folder: Path,
    step: int,
    nets: Mapping[str, nn.Module],
    state: Mapping[str, Any],
    samples: int = 0,
    *,
    keep: int = 3,
) -> Path:
    """Write folder/step-XXXXXXXX with <role>.safetensors and state.pt, then drop all but the newest `keep`.

    The files are written to a .part folder, flushed to disk, and renamed: killed at any point, the last whole
    checkpoint remains. Raises SaveError (disk full), also then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    if target.exists():
        return target
    part = folder / f"{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for role, module in nets.items():
            save_model(module, str(part / f"{role}.safetensors"))
        torch.save(dict(state), part / "state.pt")
        (part / "checkpoint.json").write_text(json.dumps({"step": step, "samples": samples, "roles": sorted(nets)}))
        for path in part.iterdir():
            _flush(path)
        _flush(part)
        part.rename(target)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save raises RuntimeError and safetensors SafetensorError when the disk is full
        shutil.rmtree(part, ignore_errors=True)
        raise SaveError(target, error) from error
    drop_old(folder, keep)
    return target


def save_divided(
    writer: shards.Writer,
    folder: Path,
    step: int,
    nets: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    samples: int = 0,
    *,
    keep: int = 3,
) -> None:
    """The same from several processes, in the background: returns when the tensors are copied, not yet written."""
    about = {
        "step": step,
        "samples": samples,
        "roles": sorted(nets),
        "optimizers": {role: optimizer.about() for role, optimizer in optimizers.items()},
    }
    writer.save(folder / f"step-{step:08d}", nets, optimizers, about, lambda: drop_old(folder, keep))


def drop_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder of checkpoints, or None."""
    found = _all(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The number of steps taken before the checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def samples_of(checkpoint: Path) -> int | None:
    """The number of samples taken before the checkpoint was written; None where an older one does not tell."""
    return json.loads((checkpoint / "checkpoint.json").read_text()).get("samples")


def restore(checkpoint: Path, nets: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
    """Bring networks and optimisers, divided or not, to the moment of a checkpoint.

    Raises WeightsError when it is of other networks or optimisers.
    """
    if shards.is_divided(checkpoint):
        shards.read(checkpoint, nets, optimizers)
        return
    saved = load(checkpoint, nets)
    for role, optimizer in optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][role])


def load(checkpoint: Path, nets: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Load every role's weights in place and return the state; raises WeightsError when they do not fit."""
    for role, module in nets.items():
        load_weights(module, checkpoint / f"{role}.safetensors")
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a safetensors file, a checkpoint or a run's folder (its averaged student, else its student) in place.

    Raises WeightsError that names the first tensors that are missing, unexpected or of another shape.
    """
    file = _weights_file(Path(path))
    if file.suffix != ".safetensors":
        shards.read_weights(file.parent, module, file.name)
        return
    try:
        if any(map(divided, module.parameters())):
            _load_parts(module, file)
        else:
            load_model(module, str(file))
    except (RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{file}: {_misfit(module, file) or str(error).splitlines()[0]}") from error


def _load_parts(module: nn.Module, file: Path) -> None:
    """This process's part of every tensor of a file, one after the other."""
    own = module.state_dict()
    with safe_open(str(file), "pt") as opened, torch.no_grad():
        found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        wrong = shards.misfit({name: tensor.shape for name, tensor in own.items()}, found)
        if wrong:
            raise WeightsError(f"{file}: {wrong}")
        for name, tensor in own.items():
            local(tensor).copy_(local(part_of(opened.get_tensor(name), tensor)))


def export(run: str | Path, file: str | Path, names: Callable[[str], str] | None = None) -> Path:
    """Write the averaged student of a run (its student where there is no average) as one safetensors file.

    run: its folder, or one of its checkpoints. names: our names to the published ones, such as
    models.twin.twin_published. Raises WeightsError when two tensors get one name.
    """
    source, file = _weights_file(Path(run)), Path(file)
    whole = source.suffix == ".safetensors"
    tensors = load_file(str(source)) if whole else shards.weights(source.parent, source.name)
    renamed = {name if names is None else names(name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise WeightsError(f"{source}: {len(tensors)} tensors get only {len(renamed)} names; give another name map")
    part = file.with_name(file.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, str(part))
    part.replace(file)
    return file


def _weights_file(path: Path) -> Path:
    """A safetensors file; in a checkpoint of several processes CHECKPOINT/ROLE, which is no file."""
    if path.is_dir():
        inside = latest(path / "checkpoints") or latest(path) or path
        if shards.is_divided(inside):
            roles = {name.split("/")[0] for name in shards.shapes(inside)}
            return inside / next(role for role in ("ema", "student", *sorted(roles)) if role in roles)
        choices = [inside / f"{name}.safetensors" for name in ("ema", "student")] + sorted(inside.glob("*.safetensors"))
        path = next((choice for choice in choices if choice.exists()), inside / "student.safetensors")
    if not path.is_file():
        raise WeightsError(f"{path}: there are no weights here; give a .safetensors file or the folder of a run")
    return path


def _misfit(module: nn.Module, file: Path) -> str:
    """The difference between a module's tensors and a file's, in words; "" when it cannot be told."""
    try:
        saved = {name: tuple(tensor.shape) for name, tensor in load_file(str(file)).items()}
    except SafetensorError:
        return ""
    return shards.misfit({name: tensor.shape for name, tensor in module.state_dict().items()}, saved)


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".part")
