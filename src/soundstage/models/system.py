"""The small joint model as a folder: configuration, weights of denoiser and codecs in one file, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.causal import Chunking
from soundstage.core.errors import WeightsError
from soundstage.core.system import Sampling, System
from soundstage.models.codecs.audio import AudioCodecConfig
from soundstage.models.codecs.pair import PairCodec
from soundstage.models.codecs.video import VideoCodecConfig
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.unified_dit import UnifiedDiTConfig

WEIGHTS = "model.safetensors"
CONVENTIONS = {
    "velocity": "noise - x0",
    "time": "1 = noise, 0 = data",
    "guidance": "v + (scale - 1) (v - v_negative), 1 = none",
}
"""What the numbers in "sampling" mean."""


def load_system(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> System:
    """Read a folder written by save_system. dtype None = float32. Raises WeightsError when a tensor does not fit."""
    told = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    config, codec = _configs(told)
    denoiser = config.build()
    tensors = load_file(str(folder / WEIGHTS))
    _load(denoiser, tensors, "denoiser.", folder)
    _load(codec, tensors, "codec.", folder)
    if told.get("conventions", CONVENTIONS) != CONVENTIONS:
        raise WeightsError(f"{folder / 'model.json'}: was written under other conventions; update soundstage")
    return System(
        name=told["name"],
        denoiser=denoiser.to(device, dtype or torch.float32).eval().requires_grad_(False),
        codec=codec.to(device, torch.float32).eval().requires_grad_(False),
        encode_text=lambda prompts: tokenize(prompts, config.text.max_bytes).to(device),
        sampling=sampling_from(told["sampling"]),
        modalities=config.geometry.modalities,
        shape=config.shape,
        info={"name": told["name"], "version": told.get("version"), "config": told},
    )


def save_system(
    folder: Path,
    name: str,
    config: UnifiedDiTConfig,
    denoiser: nn.Module,
    codec: PairCodec,
    sampling: Sampling,
    dtype: torch.dtype = torch.bfloat16,
    version: str = "1",
    base: Mapping[str, str] | None = None,
) -> Path:
    """Write model.json and model.safetensors (codec statistics stay float32); returns the folder.

    base: of a distilled model, {"name", "sha256"} of its teacher, by models.weights.fingerprint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"denoiser.{k}": v.to(dtype) for k, v in denoiser.state_dict().items()}
    for key, value in codec.state_dict().items():
        keep = key.endswith((".mean", ".std"))
        tensors[f"codec.{key}"] = value.float() if keep else value.to(dtype)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(folder / WEIGHTS))
    streams = {n: asdict(stream.config) for n, stream in codec.streams.items()}  # type: ignore[arg-type]
    scalars = {k: v for k, v in asdict(config).items() if k not in ("geometry", "seconds", "chunk", "window")}
    told = {
        "loader": "soundstage.models.system:load_system",
        "name": name,
        "version": version,
        "files": [WEIGHTS],
        "denoiser": scalars | {"seconds": str(config.seconds)},
        "codec": streams,
        "sampling": sampling_to(sampling),
        "conventions": CONVENTIONS,
    }
    if config.chunking is not None:
        told["causal"] = config.chunking.written()
    if base is not None:
        told["base"] = dict(base)
    (folder / "model.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return folder


def sampling_to(sampling: Sampling) -> dict[str, Any]:
    """A Sampling as JSON."""
    return {k: v.as_dict() if isinstance(v, AV) else v for k, v in vars(sampling).items()}


def sampling_from(told: Mapping[str, Any]) -> Sampling:
    """A Sampling from JSON."""
    return Sampling(**{k: _read(v) for k, v in told.items()})


def _read(value: Any) -> Any:  # noqa: ANN401
    """A field of Sampling from JSON."""
    if isinstance(value, dict):
        return AV(**{name: _read(item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


def _configs(told: Mapping[str, Any]) -> tuple[UnifiedDiTConfig, PairCodec]:
    streams = told["codec"]
    video = dict(streams["video"])
    codec = PairCodec(
        AV(
            video=VideoCodecConfig(**video | {"size": tuple(video["size"])}).build(),
            audio=AudioCodecConfig(**streams["audio"]).build(),
        )
    )
    scalars = dict(told["denoiser"])
    text, seconds = ByteTextConfig(**scalars.pop("text")), Fraction(scalars.pop("seconds"))
    config = replace(UnifiedDiTConfig(**scalars), text=text, seconds=seconds, geometry=codec.geometry)
    return config.as_causal(Chunking.read(told["causal"])) if told.get("causal") else config, codec


def _load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, folder: Path) -> None:
    mine = {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}
    wanted = module.state_dict()
    wrong = sorted(set(mine) ^ set(wanted)) or [k for k, v in wanted.items() if v.shape != mine[k].shape]
    if wrong:
        raise WeightsError(
            f"{folder / WEIGHTS}: {len(wrong)} tensors do not fit model.json, first {prefix}{wrong[0]}; "
            "take both files from the same place"
        )
    module.load_state_dict(mine)
