"""The published models: what their files are called, where they come from, under which licence, how they are loaded.

`find("ovi", folder)` gives the files of a model wherever they lie below a folder, by their published names; `check`
compares them with the full-size modules from headers alone; `recognise` says which model a folder holds. One entry of
MODELS is one model; nothing is imported and nothing is read before it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from soundstage.core.errors import WeightsError, one_of
from soundstage.models.published import (
    AUDIO_VIDEO,
    IMAGE,
    NON_COMMERCIAL,
    PICTURE,
    SOUND,
    TEXT,
    TOKENIZER,
    VIDEO,
    VOCODER,
    Form,
    Found,
    HubFile,
    Part,
    Published,
    Row,
    files_below,
    namesakes,
    row,
    search,
    stem_of,
)
from soundstage.models.weight_files import HALF, peek

# Parts that several models share

WAN22 = "Wan-AI/Wan2.2-TI2V-5B"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WORDS = ("tokenizer_config.json", "tokenizer.json", "spiece.model", "special_tokens_map.json")
SHARDED = "diffusion_pytorch_model.safetensors"


def _in_diffusers(folder: str, stem: str) -> tuple[str, ...]:
    return (f"{folder}/{stem}.index.json", f"{folder}/{stem}")


def _text(repo: str, below: str = "") -> tuple[Part, Part]:
    keys, extra = "soundstage.models.text.umt5:UMT5_KEYS", "soundstage.models.text.umt5:IGNORED"
    encoder = Part(
        TEXT,
        (
            Form((T5,), keys, ignored=extra),
            Form(_in_diffusers("text_encoder", "model.safetensors"), keys, ignored=extra),
        ),
        (HubFile(repo, T5, below, 2 * 5_680_910_336),),
        build="soundstage.models.text.umt5:UMT5_XXL",
    )
    tails = ("umt5-xxl/tokenizer_config.json", "tokenizer/tokenizer_config.json", "tokenizer_config.json")
    words = tuple(HubFile(repo, f"google/umt5-xxl/{name}", below) for name in WORDS)
    return encoder, Part(TOKENIZER, (Form(tails),), words)


def _picture(version: str, repo: str, numbers: int, below: str = "") -> Part:
    name, keys = f"Wan{version}_VAE.pth", "soundstage.models.codecs.wan_vae:WAN_VAE_KEYS"
    return Part(
        PICTURE,
        (Form((name,), keys), Form(_in_diffusers("vae", SHARDED), keys, holds="decoder.conv_in.weight")),
        (HubFile(repo, name, below, 4 * numbers),),
        build=f"soundstage.models.codecs.wan_vae:WAN{version.replace('.', '')}_VAE",
    )


def _mmaudio() -> tuple[Part, Part]:
    repo, below, module = "hkchengrex/MMAudio", "MMAudio", "soundstage.models.codecs"
    vae = Part(
        SOUND,
        (Form(("v1-16.pth",), f"{module}.mmaudio:MMAUDIO_VAE_KEYS"),),
        (HubFile(repo, "ext_weights/v1-16.pth", below, 4 * 171_657_378),),
        NON_COMMERCIAL,
        f"{module}.mmaudio:MMAUDIO_16K",
        "vae",
    )
    vocoder = Part(
        VOCODER,
        (Form(("best_netG.pt",), f"{module}.bigvgan:BIGVGAN_KEYS", inside="generator"),),
        (HubFile(repo, "ext_weights/best_netG.pt", below, 4 * 112_233_866),),
        NON_COMMERCIAL,
        f"{module}.bigvgan:BIGVGAN_16K",
    )
    return vae, vocoder


OVI_FILES = {
    "960x960-10s": "model_960x960_10s.safetensors",
    "960x960-5s": "model_960x960.safetensors",
    "720x720-5s": "model.safetensors",
}
"""Ovi's variants and their files, in the order in which plain "ovi" looks for them."""


def _ovi(name: str, title: str, variants: Sequence[str]) -> Published:
    keys, holds = "soundstage.models.twin:TWIN_KEYS", "video_model.patch_embedding.weight"
    denoiser = Part(
        AUDIO_VIDEO,
        tuple(Form((OVI_FILES[variant],), keys, holds=holds) for variant in variants),
        (HubFile("chetwinlow1/Ovi", OVI_FILES[variants[0]], "Ovi", 2 * 11_660_753_108),),
        build="soundstage.models.twin:OVI",
        stem=(3072, 48, 1, 2, 2),
    )
    below = "Wan2.2-TI2V-5B"
    parts = (denoiser, *_text(WAN22, below), _picture("2.2", WAN22, 704_688_668, below), *_mmaudio())
    return Published(name, title, "soundstage.models.ovi:load_ovi", parts)


def _wan(name: str, title: str, repo: str, config: str, numbers: int, stem: tuple[int, int]) -> Published:
    """stem: width and input channels."""
    module = "soundstage.models.wan"
    denoiser = Part(
        VIDEO,
        (
            Form((f"{SHARDED}.index.json", SHARDED), f"{module}:WAN_KEYS", holds="head.modulation"),
            Form(_in_diffusers("transformer", SHARDED), f"{module}:WAN_DIFFUSERS_KEYS", holds="scale_shift_table"),
        ),
        (HubFile(repo, SHARDED if numbers < 2e9 else f"{SHARDED}.index.json", bytes=4 * numbers),),
        build=f"{module}:{config}",
        stem=(*stem, 1, 2, 2),
    )
    picture = _picture("2.2", repo, 704_688_668) if stem[1] == 48 else _picture("2.1", repo, 126_892_531)
    image = _clip(repo) if stem[1] == 36 else ()
    return Published(name, title, "soundstage.models.ovi:load_wan", (denoiser, *_text(repo), picture, *image))


def _clip(repo: str) -> tuple[Part]:
    """The image encoder of a model that is told its first frame."""
    keys, extra = "soundstage.models.vision:CLIP_KEYS", "soundstage.models.vision:IGNORED"
    last = (r"(visual\.transformer|(vision_model\.)?encoder\.layers)\.31\..*",)  # features leave before this block
    forms = (
        Form((CLIP,), keys, ignored=extra, also=last),
        Form(_in_diffusers("image_encoder", "model.safetensors"), keys, ignored=extra, also=last),
    )
    return (Part(IMAGE, forms, (HubFile(repo, CLIP),), build="soundstage.models.vision:VIT_H"),)


_OVI = tuple(OVI_FILES)
_T2V, _I2V = "Wan-AI/Wan2.1-T2V", "Wan-AI/Wan2.1-I2V-14B"
_ALL = (
    _ovi("ovi", "Ovi: sound and picture together", _OVI),
    *(_ovi(f"ovi-{variant}", f"Ovi, variant {variant}", (variant,)) for variant in _OVI),
    _wan("wan2.2-5b", "Wan2.2 5B: picture, also from a first frame", WAN22, "WAN22_TI2V_5B", 4_999_787_712, (3072, 48)),
    _wan("wan2.1-t2v-1.3b", "Wan2.1 1.3B: picture", f"{_T2V}-1.3B", "WAN21_T2V_1_3B", 1_418_996_800, (1536, 16)),
    _wan("wan2.1-t2v-14b", "Wan2.1 14B: picture", f"{_T2V}-14B", "WAN21_T2V_14B", 14_288_491_584, (5120, 16)),
    *(
        _wan(name, title, f"{_I2V}-{size}", "WAN21_I2V_14B", 16_394_878_784, (5120, 36))
        for size in ("480P", "720P")
        for name, title in ((f"wan2.1-i2v-14b-{size.lower()}", f"Wan2.1 14B: picture from a first frame, {size}"),)
    ),
)
MODELS: Mapping[str, Published] = {entry.name: entry for entry in _ALL}
"""The published models by name."""


def published(name: str) -> Published:
    """The model of that name; raises ConfigError naming the nearest one."""
    if name not in MODELS:
        raise one_of("model", name, MODELS)
    return MODELS[name]


STEMS = {model.parts[0].stem for model in _ALL}


# Folders


def find(name: str, folder: Path) -> dict[str, Path]:
    """Role to path of every part of a model, wherever below the folder; a tokenizer's path is its folder.

    Raises WeightsError, naming the files, when one is missing or the folder holds another model.
    """
    return {role: found.path for role, found in locate(published(name), folder).items()}


def locate(model: Published, folder: Path) -> dict[str, Found]:
    """`find` with the form of each part, which can load it."""
    if not folder.is_dir():
        raise WeightsError(_no_folder(model, folder))
    files = files_below(folder)
    found = _parts(model, files)
    missing = [part for part in model.parts if part.role not in found]
    if missing:
        raise WeightsError(_missing(model, folder, missing, files))
    return found


def lying(model: Published, folder: Path) -> dict[str, Path]:
    """Role to path of the parts of a model that a folder has, be they all or none."""
    return {role: found.path for role, found in _parts(model, files_below(folder)).items()}


def _parts(model: Published, files: Sequence[Path]) -> dict[str, Found]:
    found = {part.role: search(part, files, STEMS) for part in model.parts}
    return {role: each for role, each in found.items() if each is not None}


def recognise(folder: Path) -> str | None:
    """The name of the model whose denoiser the folder holds; None where that is none or not clear.

    Files of equal names are told apart by a tensor's shape, equal shapes (Wan2.1's two sizes) by the folder's name.
    """
    return _name(_recognised(files_below(folder)), folder) if folder.is_dir() else None


def _recognised(files: Sequence[Path]) -> list[str]:
    """Models whose denoiser is there in full size; else those of which every part is there by name."""
    stems = {model.name: search(model.parts[0], files, STEMS) for model in _ALL}
    exact = [
        model.name
        for model in _ALL
        if (found := stems[model.name]) is not None and stem_of(peek(found.path)) == model.parts[0].stem
    ]
    return exact or [model.name for model in _ALL if all(search(part, files, STEMS) for part in model.parts)]


def _name(names: Sequence[str], folder: Path) -> str | None:
    told = [name for name in names if name.endswith(("480p", "720p")) and name[-4:] in str(folder).lower()]
    return next(iter(told or names), None)


def _no_folder(model: Published, folder: Path) -> str:
    return f"{folder}: there is no such folder; `soundstage models fetch {model.name} {folder}` fills one"


def _missing(model: Published, folder: Path, missing: Sequence[Part], files: Sequence[Path]) -> str:
    names = ", ".join(f"{part.files[0].to} ({part.role})" for part in missing)
    remedy = f"`soundstage models fetch {model.name} {folder}` gets them"
    other = _name([name for name in _recognised(files) if name not in (model.name, "ovi")], folder)
    if model.parts[0] in missing and other is not None:
        return f"{folder}: this folder holds {other}'s files; of {model.name} it lacks {names}; {remedy}"
    half = [file.name for file in files if file.name.endswith(HALF)]
    foreign = [file.relative_to(folder) for part in missing for file in namesakes(part, files)]
    also = f" ({half[0]} is half downloaded)" if half else f" ({foreign[0]} is another model's)" if foreign else ""
    return f"{folder}: {len(missing)} of {len(model.parts)} parts of {model.name} are missing: {names}{also}; {remedy}"


def check(model: str | Published, folder: Path, roles: Collection[str] = ()) -> list[Row]:
    """Compare a folder with what a model needs, part by part (all parts when no role is given), from headers alone.

    Raises WeightsError when there is no such folder, MissingExtra without the packages that define the full-size parts.
    """
    model = published(model) if isinstance(model, str) else model
    if not folder.is_dir():
        raise WeightsError(_no_folder(model, folder))
    files = files_below(folder)
    rows = []
    for part in model.parts:
        if roles and part.role not in roles:
            continue
        found = search(part, files, STEMS)
        if found is None:
            rows.append(Row(part, "missing", problem=_missing(model, folder, [part], files)))
        else:
            rows.append(row(model.name, part, found))
    return rows
