"""A system: everything needed to generate with one model, loaded from a folder.

A model folder holds `model.json` ({"loader": "soundstage.models.unified_dit:load_system", ...}), its weights in
`*.safetensors`, and `README.md` (the model card). The loader is named by the folder and imported when asked, so
nothing that uses a system imports the models. A loader is a function `(folder, device, dtype) -> System`.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Codec, Denoiser
from soundstage.core.errors import ConfigError, WeightsError, one_of

DEFAULT = "world-tiny"
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


@dataclass(frozen=True)
class Sampling:
    """How a model likes to be sampled; every field can be overridden in a request.

    sampler: a name in core.sampling.SAMPLERS. steps: number of steps.
    shift: time shift of the grid per modality (1 = linear). guidance: scale per modality (1 = none).
    times: an explicit descending list of times from 1 to 0 (few-step students), in place of steps and shift.
    """

    sampler: str = "euler"
    steps: int = 50
    shift: AV[float] = field(default_factory=lambda: AV(1.0, 1.0))
    guidance: AV[float] = field(default_factory=lambda: AV(1.0, 1.0))
    times: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class System:
    """A model ready to generate.

    denoiser: velocity field on latents. codec: media to latents and back; its geometry gives rates and strides.
    encode_text: prompts to Conditions of one row each; "" is the negative prompt.
    modalities: what it can generate, video first. shape: latent shape of one sample at the default length, without
        the batch: video (C, F, H, W), audio (C, A).
    info: what the card says (name, version, hash ...) and "folder", where it was loaded from.
    """

    name: str
    denoiser: Denoiser
    codec: Codec
    encode_text: Callable[[Sequence[str]], Conditions]
    sampling: Sampling
    modalities: tuple[str, ...]
    shape: AV[tuple[int, ...]]
    info: dict[str, Any] = field(default_factory=dict)


def known_systems() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/model.json")))


def load_system(
    name_or_dir: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> System:
    """The model of that name (default "world-tiny") or in that folder.

    Raises ConfigError for an unknown name or a loader outside this package, WeightsError for a folder that is missing
    or partial.
    """
    folder = model_folder(name_or_dir)
    described = _described(folder)
    for path in weight_files(folder, described):
        _check_complete(path)
    system = _loader(folder, described)(folder, torch.device(device), dtype)
    return replace(system, info={**system.info, "folder": str(folder)})


def model_folder(name_or_dir: str | Path | None = None) -> Path:
    """The folder of a model by name or path; raises ConfigError for an unknown name, WeightsError for no folder."""
    asked = DEFAULT if name_or_dir is None else name_or_dir
    path = Path(asked).expanduser()
    if path.is_dir():
        return path
    if isinstance(asked, Path) or len(path.parts) != 1:
        raise WeightsError(f"model: there is no folder {str(asked)!r}; give a model folder or a name ({_names()})")
    if (WEIGHTS / asked / "model.json").is_file():
        return WEIGHTS / asked
    if name_or_dir is None or asked == DEFAULT:
        raise WeightsError(
            f"model: the weights of {DEFAULT!r} are not in this install; install again, or train them with "
            "`soundstage train soundstage.recipes.world:tiny` and give the run's model folder"
        )
    if not known_systems():
        raise ConfigError(f"model: {asked!r} is not the name of a model or a folder; give the path of a model folder")
    raise one_of("model", asked, known_systems())


def weight_files(folder: Path, described: dict[str, Any] | None = None) -> tuple[Path, ...]:
    """The weight files of a model folder: those that model.json lists under "files", or every safetensors file."""
    listed = (_described(folder) if described is None else described).get("files")
    if listed:
        return tuple(folder / name for name in listed)
    found = tuple(sorted(folder.glob("*.safetensors")))
    if not found:
        raise WeightsError(f"{folder}: holds model.json and no *.safetensors; copy the weights beside it")
    return found


def _names() -> str:
    return ", ".join(known_systems()) or "none is installed"


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: holds no model.json, so it is no model folder; give one or a name ({_names()})")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: is not JSON ({error}); copy the model folder again") from error
    if not isinstance(described, dict) or not isinstance(described.get("loader"), str):
        raise WeightsError(f'{path}: has no "loader", such as "soundstage.models.unified_dit:load_system"')
    return described


def _check_complete(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, a JSON header, and data up to the largest end in it."""
    remedy = "copy the weights again"
    if not path.is_file():
        raise WeightsError(f"{path}: the weights are missing; {remedy}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(file.read(length)) if length <= size - 8 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: {size} bytes that are not safetensors, or a truncated file; {remedy}")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise WeightsError(f"{path}: truncated, {size} of {whole} bytes; {remedy}")


def _loader(folder: Path, described: dict[str, Any]) -> Callable[..., System]:
    name = described["loader"]
    module, _, function = name.partition(":")
    if not module.startswith("soundstage.") or not function:
        raise ConfigError(
            f'{folder / "model.json"}: loader {name!r} is not of the form "soundstage.MODULE:FUNCTION"; '
            "only loaders of this package are run"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(
            f"{folder / 'model.json'}: loader {name!r} is not in this version of soundstage ({error}); update it"
        ) from error
