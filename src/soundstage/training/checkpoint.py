"""Checkpoints: written whole or not at all. Weights are safetensors; optimisers are torch.load(weights_only=True)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from soundstage.core.errors import SoundstageError, WeightsError


class SaveError(SoundstageError, OSError):
    """A checkpoint could not be written; the one before is whole."""


def save(folder: Path, step: int, nets: Mapping[str, nn.Module], state: Mapping[str, Any], *, keep: int = 3) -> Path:
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
        (part / "checkpoint.json").write_text(json.dumps({"step": step, "roles": sorted(nets)}))
        for path in part.iterdir():
            _flush(path)
        _flush(part)
        part.rename(target)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save raises RuntimeError and safetensors SafetensorError when the disk is full
        shutil.rmtree(part, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SaveError(
            f"checkpoint {target}: could not be written ({reason}); the one before is kept. Free some space "
            "on the disk and run the same command again"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder of checkpoints, or None."""
    found = _all(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The number of steps taken before the checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


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
    try:
        load_model(module, str(file))
    except (RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{file}: {_misfit(module, file) or str(error).splitlines()[0]}") from error


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        inside = latest(path / "checkpoints") or latest(path) or path
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
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    kinds = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "of another shape": [
            f"{name} {saved[name]} for {own[name]}" for name in own.keys() & saved.keys() if own[name] != saved[name]
        ],
    }
    told = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
    return "these weights are of another model: " + "; ".join(told) if told else ""


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".part")


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
