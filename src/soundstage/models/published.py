"""What a published model is made of: parts, the files and forms they come in, and where they lie below a folder.

The table itself is in `zoo`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soundstage.core.errors import WeightsError
from soundstage.models.weight_files import check_whole, peek, shapes, weight_files
from soundstage.models.weights import KeyMap, Report, check_weights, identity, load_weights

APACHE = "Apache-2.0"
NON_COMMERCIAL = "CC-BY-NC-4.0"
AUDIO_VIDEO, VIDEO = "video+audio denoiser", "video denoiser"
TEXT, TOKENIZER, IMAGE = "text encoder", "tokenizer", "image encoder"
PICTURE, SOUND, VOCODER = "video autoencoder", "sound autoencoder", "vocoder"
DIFFUSERS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "image_encoder", "vocoder")
"""Folders of a diffusers pipeline; a file in one of them is never taken for an original one of the same name."""
DEEP = 6
Stems = Collection[tuple[int, ...] | None]


@dataclass(frozen=True)
class HubFile:
    """One published file. repo: on the hub; path: in it; below: where the model's own downloader puts the repository.

    bytes: its numbers x bytes of one, where that is known. Of an index, the bytes of its shards.
    """

    repo: str
    path: str
    below: str = ""
    bytes: int | None = None

    @property
    def to(self) -> str:
        """Where it goes below the folder of the model."""
        return f"{self.below}/{self.path}" if self.below else self.path


@dataclass(frozen=True)
class Form:
    """A way in which a part is stored. tails: ends of its path, in the order in which they are looked for.

    keys: "module:NAME" of the key map; None where there are no tensors. inside: the key of a nested dict. ignored:
    "module:NAME" of patterns of names that the file may have besides, and also: more of them. holds: a name that a file
    of this form must hold.
    """

    tails: tuple[str, ...]
    keys: str | None = None
    inside: str | None = None
    ignored: str | None = None
    also: tuple[str, ...] = ()
    holds: str | None = None


@dataclass(frozen=True)
class Part:
    """One part of a model. role: what it is for. forms: how it may lie in a folder. files: what `fetch` gets.

    build: "module:CONFIG" of the full-size config, whose build() gives the module; inner: the submodule of it.
    stem: a tensor of the denoiser with its full-size shape, which tells models with equal file names apart.
    """

    role: str
    forms: tuple[Form, ...]
    files: tuple[HubFile, ...]
    licence: str = APACHE
    build: str | None = None
    inner: str = ""
    stem: tuple[int, ...] | None = None

    @property
    def non_commercial(self) -> bool:
        """Its licence forbids commercial use."""
        return "-NC" in self.licence

    @property
    def bytes(self) -> int | None:
        """Bytes of its files, where all but the smallest are known."""
        known = [file.bytes for file in self.files if file.bytes is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Published:
    """A published model: title, "module:function" of its loader, and its parts, the denoiser first."""

    name: str
    title: str
    loader: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(part.bytes or 0 for part in self.parts)

    @property
    def licences(self) -> tuple[str, ...]:
        """Licences of the parts, each once."""
        return tuple(dict.fromkeys(part.licence for part in self.parts))


# Finding


@dataclass(frozen=True)
class Found:
    """A part as it lies in a folder: its path and form."""

    part: Part
    form: Form
    path: Path

    @property
    def keys(self) -> KeyMap:
        """The key map of this form."""
        return _named(self.form.keys) if self.form.keys else identity

    @property
    def optional(self) -> tuple[str, ...]:
        """Patterns of names that may be missing or besides."""
        return (*(_named(self.form.ignored) if self.form.ignored else ()), *self.form.also)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in the file."""
        return shapes(self.path, self.form.inside)

    def check(self, module: nn.Module) -> Report:
        """How the file fits a module, from headers alone."""
        return check_weights(module, self.path, self.keys, self.optional, inside=self.form.inside)

    def load(self, module: nn.Module, **how: Any) -> Report:  # noqa: ANN401
        """load_weights of this file into a module; how: device, dtype, strict, on_bytes."""
        form, what = self.form, f"the {self.part.role}"
        return load_weights(module, self.path, self.keys, optional=self.optional, inside=form.inside, what=what, **how)


def files_below(folder: Path) -> list[Path]:
    """Files below a folder, the nearest first; hidden folders and those deeper than six are left out."""
    found: list[tuple[int, str]] = []
    for where, folders, names in os.walk(folder, followlinks=True):
        depth = len(Path(where).relative_to(folder).parts)
        folders[:] = [each for each in folders if not each.startswith(".")] if depth < DEEP else []
        found += [(depth, str(Path(where, name))) for name in names if not name.startswith(".")]
    return [Path(path) for _, path in sorted(found)]


def search(part: Part, files: Iterable[Path], known: Stems) -> Found | None:
    """The first file of the first form that is not another model's; known: the full-size shapes of all models."""
    for form in part.forms:
        for tail in form.tails:
            for file in files:
                if _ends(file, tail) and _fits(part, form, file, known):
                    return Found(part, form, file.parent if part.role == TOKENIZER else file)
    return None


def namesakes(part: Part, files: Iterable[Path]) -> list[Path]:
    """Files that are called like this part, whatever they hold."""
    return [file for file in files if any(_ends(file, tail) for form in part.forms for tail in form.tails)]


def _ends(file: Path, tail: str) -> bool:
    return file.match(tail) and ("/" in tail or file.parent.name not in DIFFUSERS)


def _fits(part: Part, form: Form, file: Path, known: Stems) -> bool:
    """It holds the form's name, and its shape is not exactly that of another known model.

    A file that cannot be read counts, so that what is wrong with it is told when it is loaded.
    """
    found = peek(file) if form.holds is not None else {}
    stem = stem_of(found)
    return not found or (form.holds in found and (part.stem in (None, stem) or stem not in known))


def stem_of(found: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape of the tensor that tells denoisers apart, the embedding of picture patches."""
    return next((found[name] for name in found if name.endswith("patch_embedding.weight")), None)


# Checking


@dataclass(frozen=True)
class Row:
    """What became of one part in a check. state: "whole", "missing", "damaged" (truncated) or "other" (does not fit).

    bytes: of its files. report: how its tensors fit the full-size module, where there are tensors and it could be read.
    problem: one sentence, where something is wrong.
    """

    part: Part
    state: str
    path: Path | None = None
    bytes: int = 0
    report: Report | None = None
    problem: str | None = None

    @property
    def whole(self) -> bool:
        """The part is there, complete and of this model."""
        return self.state == "whole"


def row(what: str, part: Part, found: Found) -> Row:
    """Check one part as it lies; what: the name of its model."""
    try:
        if found.path.is_dir():
            return _words(part, found.path)
        check_whole(found.path)
        size = sum(file.stat().st_size for file in weight_files(found.path))
        found.shapes()
    except WeightsError as error:
        return Row(part, "damaged", found.path, _size(found.path), problem=str(error))
    report = found.check(module(part))
    try:
        report.demand(f"{what}'s {part.role}")
    except WeightsError as error:
        return Row(part, "other", found.path, size, report, str(error))
    return Row(part, "whole", found.path, size, report)


def _words(part: Part, folder: Path) -> Row:
    from soundstage.models.text.umt5 import tokenizer_files

    tokenizer_files(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return Row(part, "whole", folder, size)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def module(part: Part) -> nn.Module:
    """The full-size module of a part on the meta device, which takes no memory."""
    with torch.device("meta"):
        built = _named(str(part.build)).build()
    return built.get_submodule(part.inner)


def _named(name: str) -> Any:  # noqa: ANN401
    where, _, attribute = name.partition(":")
    return getattr(importlib.import_module(where), attribute)
