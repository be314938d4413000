"""A system: everything needed to generate with one model, loaded from a folder.

A model folder holds `model.json` ({"loader": "soundstage.models.unified_dit:load_system", ...}), its weights in
`*.safetensors`, and `README.md` (the model card). The loader is named by the folder and imported when asked, so
nothing that uses a system imports the models. A loader is a function `(folder, device, dtype) -> System`.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.causal import Cache, Causal, causal
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import Codec, Denoiser
from soundstage.core.errors import ConfigError, WeightsError, one_of
from soundstage.core.schedule import check, explicit

DEFAULT = "world-tiny"
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


@dataclass(frozen=True)
class Sampling:
    """How a model likes to be sampled; every field can be overridden in a request.

    sampler: a name in core.causal.WAYS. steps: number of steps.
    shift: time shift of the grid per modality (1 = linear). guidance: scale per modality (1 = none).
    times: of a few-step student, per modality that it generates, the descending list of levels that it was trained at
    and then 0, in place of steps and shift; any_steps: it was trained at all levels, and other numbers of steps take
    steps and shift. baked: guidance scales that were built into its weights (the convention is that of core.guidance);
    guidance is then 1, or it would act twice. flow_map: the network is told two times, and asked for the mean velocity
    down to clean data (core.flow.ToData). tasks: names of those it was distilled for; None = all.
    start: first level of the grid, before the shift (Wan and Ovi: 0.999). negative: what guidance leads away from, in
    words, per modality. skip_layer: the block left out of the negative prediction; None leaves out none.
    """

    sampler: str = "euler"
    steps: int = 50
    shift: AV[float] = field(default_factory=lambda: AV(1.0, 1.0))
    guidance: AV[float] = field(default_factory=lambda: AV(1.0, 1.0))
    times: AV[tuple[float, ...]] | None = None
    start: float = 1.0
    negative: AV[str] = field(default_factory=lambda: AV("", ""))
    skip_layer: int | None = None
    any_steps: bool = False
    flow_map: bool = False
    baked: AV[float] | None = None
    tasks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.times is not None:
            steps = check(explicit(self.times))
            if self.steps != steps:
                raise ConfigError(f"Sampling.times: are of {steps} steps, and steps is {self.steps}; make them agree")
        if self.baked is not None and any(scale != 1 for scale in self.guidance.values()):
            raise ConfigError("Sampling.baked: guidance that is built in acts a second time; set guidance to 1")


class SizeRule(Protocol):
    """Which picture sizes a model makes. Sizes are (height, width) in pixels."""

    def check(self, height: int, width: int) -> None:
        """Raises RequestError, naming the nearest possible size, for one that cannot be made."""
        ...

    def of_aspect(self, text: str) -> tuple[int, int]:
        """The size for an aspect such as "16:9", width before height."""
        ...

    def of_image(self, height: int, width: int) -> tuple[int, int]:
        """The size for a first frame of that many pixels."""
        ...

    def image(self, frame: Any, size: tuple[int, int]) -> Tensor:  # noqa: ANN401
        """(H, W, 3) uint8 array -> (1, 3, 1, height, width) in [-1, 1], as the model was trained to be given it."""
        ...


class Deferred:
    """A denoiser built when it is first called, so that its weights come after the text encoder's have gone."""

    def __init__(self, build: Callable[[], Denoiser]) -> None:
        self._build: Callable[[], Denoiser] | None = build
        self._built: Denoiser | None = None

    @property
    def built(self) -> bool:
        """Whether it has been called."""
        return self._build is None

    def get(self) -> Denoiser:
        """The denoiser itself."""
        if self._build is not None:
            self._built, self._build = self._build(), None
        assert self._built is not None
        return self._built

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        return self.get()(x_t, t, cond, r=r)


class DeferredCausal(Deferred):
    """A causal denoiser (core.causal) built when it is first called. chunks: as its own, known before."""

    def __init__(self, build: Callable[[], Causal], chunks: Callable[[AV[int]], tuple[AV[slice], ...]]) -> None:
        super().__init__(build)
        self.chunks = chunks

    def extend(
        self, cache: Cache, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None
    ) -> tuple[AV[Tensor], Cache]:
        """The velocity of the next chunk, and the cache with it."""
        return causal(self.get()).extend(cache, x_t, t, cond, r=r)


@dataclass(frozen=True, eq=False)
class System:
    """A model ready to generate.

    denoiser: velocity field on latents. codec: media to latents and back; its geometry gives rates and strides.
    encode_text: prompts to Conditions of one row each; "" is the negative prompt.
    modalities: what it can generate, video first. shape: latent shape of one sample at the default length, without
        the batch: video (C, F, H, W), audio (C, A).
    info: what the card says (name, version, hash ...) and "folder", where it was loaded from.
    form: a prompt as the user wrote it -> in the words that the model was trained on; warns where it changes them.
    skipping: blocks to leave out -> the same denoiser without them; None where the model cannot.
    sizes: which picture sizes it makes; None = only its own.
    other_lengths: for a model of one length, where other lengths are to be had; None = any length.
    needs: inputs that every request must give, such as "image". cautions: by task, why it may disappoint.
    encode_image: a first frame (1, 3, 1, H, W) in [-1, 1] and the latent shape of one sample -> Conditions, for a model
        that is told its first frame; None for one whose first frame is known latents.
    activation_bytes: latent shapes of one sample -> bytes that one call on it needs beside the weights.
    """

    name: str
    denoiser: Denoiser
    codec: Codec
    encode_text: Callable[[Sequence[str]], Conditions]
    sampling: Sampling
    modalities: tuple[str, ...]
    shape: AV[tuple[int, ...]]
    info: dict[str, Any] = field(default_factory=dict)
    form: Callable[[str], str] | None = None
    skipping: Callable[[tuple[int, ...]], Denoiser] | None = None
    sizes: SizeRule | None = None
    other_lengths: str | None = None
    needs: tuple[str, ...] = ()
    cautions: Mapping[str, str] = field(default_factory=dict)
    encode_image: Callable[[Tensor, AV[tuple[int, ...]]], Conditions] | None = None
    activation_bytes: Callable[[AV[tuple[int, ...]]], int] | None = None


def known_systems() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/model.json")))


Prepare = Callable[[nn.Module, torch.device], nn.Module]
"""What is done to a backbone before it is used: moved to a device, quantised, compiled ..."""


def load_system(
    name_or_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    weights: str | Path | None = None,
    prepare: Prepare | None = None,
) -> System:
    """The model of that name (default "world-tiny") or in that folder.

    weights: the folder with a published model's own files, for a name in models.zoo. prepare: see Prepare.
    Raises ConfigError for an unknown name or a loader outside this package, WeightsError for a folder that is missing
    or partial.
    """
    if weights is not None:
        return _published(str(name_or_dir), Path(weights).expanduser(), torch.device(device), dtype, prepare)
    folder = model_folder(name_or_dir)
    described = _described(folder)
    for path in weight_files(folder, described):
        _check_complete(path)
    system = _loader(folder, described)(folder, torch.device(device), dtype)
    if prepare is not None:
        assert isinstance(system.denoiser, nn.Module)
        system = replace(system, denoiser=prepare(system.denoiser, torch.device(device)))
    return replace(system, info={**system.info, "folder": str(folder)})


def _published(
    name: str, folder: Path, device: torch.device, dtype: torch.dtype | None, prepare: Prepare | None
) -> System:
    """A published model from a folder with its own files, by the loader that the zoo names."""
    known = _zoo()
    if name not in known:
        raise one_of("model", name, known)
    if not folder.is_dir():
        raise WeightsError(
            f"weights: there is no folder {str(folder)!r}; `soundstage models fetch {name} FOLDER` fills one"
        )
    loader = _function(known[name].loader, f"the zoo's entry {name!r}")
    system = loader(folder, device, dtype, name=name, prepare=prepare)
    return replace(system, info={**system.info, "folder": str(folder)})


def _zoo() -> Mapping[str, Any]:
    """Published models by name; found by its name, since core imports no room above it."""
    return importlib.import_module("soundstage.models.zoo").MODELS


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
    if asked in _zoo():
        raise ConfigError(
            f"model: {asked!r} is a published model whose files do not come with the package; name their folder "
            f"(--weights FOLDER), which `soundstage models fetch {asked} FOLDER` fills"
        )
    raise one_of("model", asked, [*known_systems(), *_zoo()])


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
    return _function(described["loader"], str(folder / "model.json"))


def _function(name: str, where: str) -> Callable[..., System]:
    module, _, function = name.partition(":")
    if not module.startswith("soundstage.") or not function:
        raise ConfigError(
            f'{where}: loader {name!r} is not of the form "soundstage.MODULE:FUNCTION"; '
            "only loaders of this package are run"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(
            f"{where}: loader {name!r} is not in this version of soundstage ({error}); update it"
        ) from error
