"""What the recipes of published models share: backbone, texts and codec from a folder of weights, and the way back.

Nothing here reads a file before `build` or a call, and a backbone built under torch.device("meta") needs none at all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from soundstage.core.av import AV
from soundstage.core.causal import Chunking
from soundstage.core.conditions import Conditions
from soundstage.core.denoiser import StreamGeometry
from soundstage.core.errors import ConfigError
from soundstage.core.rng import Rng
from soundstage.core.sampling import euler
from soundstage.core.schedule import shifted
from soundstage.core.system import Sampling, load_system
from soundstage.models import twin, wan
from soundstage.models.adapters.lora import Lora, merged
from soundstage.models.codecs.pair import PairCodec
from soundstage.models.layers.wan_ends import span_embedding
from soundstage.models.ovi import WAN_RULES
from soundstage.models.ovi_forms import VARIANTS, snap, to_form
from soundstage.models.published import PICTURE, SOUND, TEXT, TOKENIZER, Found
from soundstage.models.student import Student, write_student
from soundstage.models.text.umt5 import UMT5Text
from soundstage.models.weights import fingerprint, save_weights
from soundstage.models.zoo import OVI_FILES, locate, published
from soundstage.training.checkpoint import load_weights
from soundstage.training.config import Role, Shared, TrainConfig
from soundstage.training.state import Validation

Run = TypeVar("Run", bound=TrainConfig)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AT_ONCE = 32  # texts encoded between two looks at the progress


def shape_of(model: str) -> AV[tuple[int, ...]]:
    """Latents of one sample at the model's own size and length: video (C, F, H, W), audio (C, A)."""
    geometry = _geometry(model)
    if model in WAN_RULES:
        (height, width), frames, audio = WAN_RULES[model].size, WAN_RULES[model].frames, None
    else:
        variant = VARIANTS[_variant(model)]
        (height, width), frames = snap(1, 1, variant.area), variant.frames
        audio = (twin.OVI.audio.out_channels, variant.audio_latents)
    side = geometry.spatial_stride
    return AV(video=(geometry.channels, geometry.steps(frames), height // side, width // side), audio=audio)


def frame_rate(model: str) -> Fraction:
    """Frames per second of the model's pictures."""
    return _geometry(model).rate


def _geometry(model: str) -> StreamGeometry:
    return _clocks(model)["video"]


def _clocks(model: str) -> AV[StreamGeometry]:
    """Of the autoencoders that the model has."""
    parts = {part.role: part for part in published(model).parts}
    roles = {"video": PICTURE, "audio": SOUND}
    return AV(**{name: _named(str(parts[role].build)).geometry for name, role in roles.items() if role in parts})


def form_of(model: str) -> str | None:
    """How the model's prompts describe the sound; None where they describe none."""
    return None if model in WAN_RULES else VARIANTS[_variant(model)].form


def _variant(model: str) -> str:
    """A key of VARIANTS: that of the name, or of the file that plain "ovi" looks for first of all three."""
    return model.removeprefix("ovi-").replace("-", "_") if model != "ovi" else next(iter(OVI_FILES)).replace("-", "_")


def _named(name: str) -> Any:  # noqa: ANN401
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Backbone:
    """The denoiser of a published model, from the folder that holds its files in any layout.

    model: a name in models.zoo. dtype: that the weights are kept in; bf16 does for what does not move. two_times: made
    a flow map by an embedding of t - r that says nothing at first. causal: made block-causal, on the same weights.
    """

    model: str
    folder: str
    dtype: Literal["fp32", "bf16"] = "fp32"
    two_times: bool = False
    causal: Chunking | None = None

    def build(self) -> nn.Module:
        """The module with its weights; on the meta device without, and of the published size where there is no folder.

        Raises WeightsError for a folder without the model's files.
        """
        drawn = torch.get_default_device().type != "meta"
        if not drawn and not Path(self.folder).expanduser().is_dir():
            return self._config(self._whole()).build().to(TYPES[self.dtype])
        found = self._found()
        shapes = found.shapes()
        config = self._config(type(self._whole()).of(shapes))
        with torch.device("meta"):
            module = config.build()
        if not drawn:
            return module.to(TYPES[self.dtype])
        found = replace(found, form=replace(found.form, also=(*found.form.also, wan.SPAN)))
        found.load(module, dtype=TYPES[self.dtype])
        for name, part in list(module.named_modules()):
            if name.endswith("span_embedding") and any(p.is_meta for p in part.parameters()):
                owner: Any = module.get_submodule(name.rpartition(".")[0])
                owner.span_embedding = span_embedding(owner.config).to(TYPES[self.dtype])
        return module.requires_grad_(True)

    def describe(self) -> dict[str, Any]:
        """Latents and tokens of one clip at the model's own size and length, and FLOPs of one call."""
        config, shape = self._whole(), shape_of(self.model)
        video = shape["video"]
        tokens = AV(video=video[1] * video[2] * video[3] // 4, audio=shape["audio"][1] if "audio" in shape else None)
        joint = twin.flops(config, tokens) if "audio" in shape else wan.flops(config, tokens["video"])
        return {"latents": shape.as_dict(), "tokens": tokens.as_dict(), "flops": joint.total}

    def published_name(self, name: str) -> str:
        """The published name of one of the module's tensors."""
        return name if self.model in WAN_RULES else twin.twin_published(name)

    def file(self) -> Path:
        """Where the weights lie, or the index of their shards."""
        return self._found().path

    def _found(self) -> Found:
        return next(iter(locate(published(self.model), Path(self.folder).expanduser()).values()))

    def _whole(self) -> Any:  # noqa: ANN401
        return _named(str(published(self.model).parts[0].build))

    def _config(self, config: Any) -> Any:  # noqa: ANN401
        config = config.as_flow_map() if self.two_times else config
        return config if self.causal is None else config.as_causal(self.causal, _clocks(self.model))


@dataclass(frozen=True)
class Texts:
    """Prompts to umT5 features by the encoder in a model's folder; the answers are kept on disk, in safetensors.

    cache: folder of the answers; where it has them all, the encoder's weights are not needed. also: texts to be encoded
    with the rest, such as negatives. device: where the encoder runs.
    """

    model: str
    folder: str
    cache: str = "runs/texts"
    also: tuple[str, ...] = ()
    device: str = "cpu"

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """One row per prompt, on the CPU."""
        return self._encoder(self._written(prompts)).to("cpu")

    def prepare(self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Encode what the cache lacks, with the encoder loaded once."""
        texts = list(dict.fromkeys((*self._written(prompts), *self.also)))
        encoder = self._made(keep=True)
        for start in range(0, len(texts), AT_ONCE):
            encoder(texts[start : start + AT_ONCE])
            if progress is not None:
                progress(min(start + AT_ONCE, len(texts)), len(texts))

    def _written(self, prompts: Sequence[str]) -> list[str]:
        """The prompts in the model's own form."""
        form = form_of(self.model)
        return list(prompts) if form is None else [to_form(prompt, form) for prompt in prompts]

    @cached_property
    def _encoder(self) -> UMT5Text:
        return self._made(keep=False)

    def _made(self, *, keep: bool) -> UMT5Text:
        found = locate(published(self.model), Path(self.folder).expanduser())
        cache = Path(self.cache).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        modalities = shape_of(self.model).modalities
        return UMT5Text(
            found[TEXT].path, found[TOKENIZER].path, device=self.device, cache=cache, keep=keep, modalities=modalities
        )


@dataclass(frozen=True)
class Negative:
    """What guidance leads away from, in words per modality; samples that are told no text get no negative either."""

    words: AV[str]
    texts: Texts

    def __call__(self, cond: Conditions) -> Conditions:
        """Conditions of one row, where those of the batch are."""
        if cond.text is None:
            return Conditions()
        names = cond.text.modalities
        like = next(cond.text.values())
        rows = {name: self._rows[name].map(lambda x: x.to(like.device)) for name in names}
        return Conditions(
            text=AV(**{name: row.text[name] for name, row in rows.items() if row.text is not None}),
            text_mask=AV(**{name: row.text_mask[name] for name, row in rows.items() if row.text_mask is not None}),
        )

    @cached_property
    def _rows(self) -> dict[str, Conditions]:
        return {name: self.texts([words]).only(name) for name, words in self.words.items()}


@dataclass(frozen=True)
class Codec:
    """The autoencoders of a published model, to encode clips with."""

    model: str
    folder: str

    def build(self) -> PairCodec:
        """Them, with their weights."""
        late: Any = load_system(self.model, weights=self.folder).codec
        return PairCodec(late.streams.map(lambda stream: stream.ready((), None)))


def sharable(config: TrainConfig) -> bool:
    """Whether the student can be an adapter on its teacher: a network of its own, of the teacher's form."""
    causal = getattr(config.model, "causal", None) is not None
    return "teacher" in config.roles and not isinstance(config.model, Shared) and not causal


def shared(config: Run, rank: int = 64, critic: int = 32, **changes: Any) -> Run:  # noqa: ANN401
    """The run on one frozen base: student and fake score become adapters on the teacher, 5 % of its size together.

    changes: other settings, as in dataclasses.replace; adapters want a higher learning rate than whole networks.
    """
    if not sharable(config):
        raise ConfigError(
            "shared: the run has no whole student beside a teacher of the same form, as a causal student has none; "
            "give it roles={'teacher': ...}"
        )
    roles = {
        name: role if role.optim is None else Role(Lora("teacher", critic), role.optim)
        for name, role in config.roles.items()
    }
    settings = {"name": f"{config.name}-shared", "model": Lora("teacher", rank), "roles": roles, **changes}
    return replace(config, **settings)


def backbone_of(config: TrainConfig) -> Backbone:
    """The published model of a run's student, or of the base it is on; raises ConfigError for another model."""
    model: Any = config.roles[config.model.base].model if isinstance(config.model, Shared) else config.model
    if not isinstance(model, Backbone):
        raise ConfigError(f"model: {type(model).__name__} is no published model, and has no published format")
    return model


def export_student(
    config: TrainConfig,
    run: str | Path,
    folder: str | Path,
    sampling: Sampling,
    *,
    name: str | None = None,
    dtype: Literal["fp32", "bf16"] = "bf16",
    shard_bytes: int | None = None,
) -> Path:
    """Write the averaged student of a run as its model is published, described, beside the model's other files.

    The weights get the published names, adapters added to their base; NAME.sampling.json tells the loader how the
    student is sampled; text encoder, tokenizer and codecs are links to the folder that the run's weights came from. So
    `soundstage generate --model ovi --weights FOLDER` runs the student. Returns the folder.
    """
    backbone, folder = backbone_of(config), Path(folder)
    source = Path(backbone.folder).expanduser().resolve()
    parts = locate(published(backbone.model), source)
    file = folder / backbone.file().name.removesuffix(".index.json")
    save_weights(_exported(config, backbone, run, TYPES[dtype]), file, backbone.published_name, shard_bytes)
    for found in list(parts.values())[1:]:
        for path in _files(found):
            link = folder / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(path)
    base = replace(backbone, dtype="bf16", two_times=False, causal=None).build().state_dict()
    about = {"name": backbone.model, "sha256": fingerprint(base)}
    sampling = replace(sampling, flow_map=backbone.two_times)
    write_student(file, Student(name or config.name, sampling, about, backbone.causal))
    return folder


def _exported(config: TrainConfig, backbone: Backbone, run: str | Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The student's tensors, whole."""
    if isinstance(config.model, Shared):
        adapted: Any = config.model.on(backbone.build().requires_grad_(False), "student")
        load_weights(adapted, run)
        tensors = merged(adapted)
    else:
        with torch.device("meta"):
            module = config.model.build()
        module = module.to_empty(device="cpu")
        load_weights(module, run)
        tensors = module.state_dict()
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _files(found: Found) -> list[Path]:
    """The files of a part: a tokenizer's folder, or a file with the shards that it may list."""
    path = found.path
    return sorted(path.parent.glob(f"{path.name.partition('.')[0]}*")) if path.suffix == ".json" else [path]


@dataclass(frozen=True)
class Agreement:
    """Validation: how far the student's few steps end from its teacher's many, from the same noise and prompts.

    steps: of the student's grid; the teacher takes `substeps` times as many. Returns "gap", root mean square of the
    difference over that of the teacher's samples, and "gap/video" ... guidance: of the teacher, as in the objective.
    """

    steps: int
    substeps: int = 2
    shift: AV[float] = AV(5.0, 5.0)  # noqa: RUF009 (AV is frozen)
    guidance: Any = None
    samples: int = 4

    def __call__(self, validation: Validation) -> Mapping[str, float]:
        """One sample at a time."""
        data = validation.config.data.build()
        wrong: dict[str, float] = {}
        size: dict[str, float] = {}
        for index in range(self.samples):
            batch = data.batch(index, 1).to(validation.device)
            noise = Rng.of(index, 1).fold("agreement").normal_like(batch.x0)
            teacher: Any = validation.nets["teacher"]
            if self.guidance is not None:
                teacher = self.guidance(teacher, batch.cond)
            with torch.no_grad():
                few = euler(validation.student, noise, self._grid(self.steps, noise), batch.cond)
                many = euler(teacher, noise, self._grid(self.steps * self.substeps, noise), batch.cond)
            for name, made in few.items():
                wrong[name] = wrong.get(name, 0.0) + float((made - many[name]).square().sum())
                size[name] = size.get(name, 0.0) + float(many[name].square().sum())
        each = {f"gap/{name}": (wrong[name] / size[name]) ** 0.5 for name in wrong}
        return {"gap": max(each.values()), **each}

    def _grid(self, steps: int, like: AV[torch.Tensor]) -> AV[torch.Tensor]:
        return shifted(steps, self.shift).only(*like.modalities)
