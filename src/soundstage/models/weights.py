"""Published weights into modules: key maps, a strict report, and loading straight to the type and device asked for.

    report = load_weights(module, Path("model.safetensors"), TWIN_KEYS, dtype=torch.bfloat16)

The module is usually built under `torch.device("meta")`, so it takes no memory before its tensors arrive. On the CPU a
tensor that keeps its type stays mapped: its pages are read on first use and belong to the file. Every other tensor goes
through a window of 64 MB, so the peak of host memory is the loaded tensors and that window.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from soundstage.core.errors import WeightsError
from soundstage.models.weight_files import (
    DTYPES,
    INDEX,
    Header,
    Mapped,
    check_whole,
    headers,
    shapes,
    stored_bytes,
    weight_files,
)

__all__ = [
    "KeyMap",
    "Report",
    "Source",
    "check_weights",
    "check_whole",
    "fingerprint",
    "headers",
    "identity",
    "load_weights",
    "renamed",
    "save_weights",
    "shapes",
    "weight_files",
]

PIECE = 16 * 2**20
NAMED = 3
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """Where one tensor of a module comes from: names in the file, and what makes the tensor of theirs (None: it is)."""

    names: tuple[str, ...]
    build: Callable[..., Tensor] | None = None


KeyMap = Callable[[Sequence[str]], dict[str, Source]]
"""Names in a file -> {name in our module: Source}. A name of the file that no Source uses is unexpected."""
OnBytes = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def renamed(*rules: tuple[str, str]) -> KeyMap:
    """The key map that applies (pattern, replacement) rules in turn, with `re.sub`, to every name of the file."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def keys(names: Sequence[str]) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for name in names:
            ours = name
            for pattern, replacement in compiled:
                ours = pattern.sub(replacement, ours)
            if ours in found:
                raise WeightsError(f"{name} and {found[ours].names[0]} are both {ours!r}; the file holds two formats")
            found[ours] = Source((name,))
        return found

    return keys


def identity(names: Sequence[str]) -> dict[str, Source]:
    """The key map of a file that names its tensors as the module does."""
    return {name: Source((name,)) for name in names}


@dataclass(frozen=True)
class Report:
    """How the tensors at a path fit a module.

    loaded: tensors of the module that the file has, with their shape. missing: names in the module. unexpected: names
    in the file. wrong_shape: (name in the module, shape in the file, shape in the module). path: the file.
    """

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    path: Path

    @property
    def fits(self) -> bool:
        """Every tensor of the module is there with its shape, and nothing else is."""
        return self.loaded > 0 and not (self.missing or self.unexpected or self.wrong_shape)

    def demand(self, what: str) -> None:
        """Raise WeightsError unless the file fits; what: what the module is, such as "Ovi's denoiser"."""
        if self.fits:
            return
        wanted = self.loaded + len(self.missing) + len(self.wrong_shape)
        if self.loaded == 0 and not self.wrong_shape:
            raise WeightsError(
                f"{self.path}: is no file of {what}: none of its {len(self.unexpected)} names "
                f"({_first(self.unexpected)}) is one of the {wanted} asked for ({_first(self.missing)}); "
                "give the file of that model"
            )
        wrong = [
            f"{name} is {list(there)} in the file and {list(here)} in the model"
            for name, there, here in self.wrong_shape
        ]
        told = {"missing": self.missing, "unexpected": self.unexpected, "of wrong shape": wrong}
        parts = [f"{len(names)} {kind} ({_first(names)})" for kind, names in told.items() if names]
        raise WeightsError(
            f"{self.path}: fits {what} in part only, {self.loaded} of {wanted} tensors; {', '.join(parts)}; "
            "is this file of another model?"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def check_weights(
    module: nn.Module, path: Path, keys: KeyMap = identity, optional: Iterable[str] = (), *, inside: str | None = None
) -> Report:
    """How the file fits, from headers alone; see load_weights."""
    return _plan(module, headers(path, inside), keys, optional, path)[1]


def load_weights(
    module: nn.Module,
    path: Path,
    keys: KeyMap = identity,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    optional: Iterable[str] = (),
    inside: str | None = None,
    what: str | None = None,
    strict: bool = True,
    on_bytes: OnBytes | None = None,
) -> Report:
    """Give a module the tensors at a path, each put in place of the module's own (which may be on the meta device).

    path: .safetensors, .pth, .pt, .bin, an index.json, or a folder of shards. keys: the key map from the file to the
    module. dtype: of numbers with a point, None = as stored; whole numbers stay as stored. optional: patterns of names
    that the file may lack and of names that it may have besides, each matched in full. inside: the key of a nested dict
    in a .pth. what: what the module is, for the error. strict: demand a full fit before reading; otherwise what fits is
    loaded and the caller reads the report. A tensor that stays mapped may be written to: the file does not change.

    Raises WeightsError for a file that is missing, truncated, refused or of another model.
    """
    mapped = Mapped(path, inside)
    plan, report = _plan(module, mapped.headers, keys, optional, path)
    if strict:
        report.demand(what or type(module).__name__)
    device = torch.device(device)
    total = sum(stored_bytes(mapped.headers[name]) for source in plan.values() for name in source.names)
    uses = Counter(name for source in plan.values() for name in source.names)
    done = 0
    with torch.no_grad():
        for name, source in plan.items():
            _assign(module, name, _tensor(mapped, source, device, dtype))
            for used in source.names:
                done += stored_bytes(mapped.headers[used])
                uses[used] -= 1
                if not uses[used]:
                    mapped.forget(used)
            if on_bytes is not None:
                on_bytes(done, total)
    return report


def _plan(
    module: nn.Module, found: Mapping[str, Header], keys: KeyMap, optional: Iterable[str], path: Path
) -> tuple[dict[str, Source], Report]:
    """The sources of the tensors that fit, in the order of the file, and the report."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    try:
        sources = keys(list(found))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in optional) or "(?!)")
    plan, used, wrong = {}, set(), []
    for name, source in sources.items():
        if name not in wanted or not set(source.names) <= set(found):
            continue
        used |= set(source.names)
        shape = _shape(source, found)
        if shape == wanted[name]:
            plan[name] = source
        else:
            wrong.append((name, shape, wanted[name]))
    present = {*plan, *(name for name, *_ in wrong)}
    missing = tuple(name for name in wanted if name not in present and not allowed.fullmatch(name))
    unexpected = tuple(name for name in found if name not in used and not allowed.fullmatch(name))
    return plan, Report(len(plan), missing, unexpected, tuple(wrong), path)


def _shape(source: Source, found: Mapping[str, Header]) -> tuple[int, ...]:
    if source.build is None:
        return found[source.names[0]][0]
    parts = [torch.empty(*found[name][:1], dtype=found[name][1], device="meta") for name in source.names]
    return tuple(source.build(*parts).shape)


def _tensor(mapped: Mapped, source: Source, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """One tensor of a module: mapped where it stays as it is stored, read through the window otherwise."""
    stored = [mapped.headers[name][1] for name in source.names]
    stays = device.type == "cpu" and all(_target(kind, dtype) == kind for kind in stored)
    if source.build is None:
        if stays:
            return mapped.keep(source.names[0]).contiguous()
        return _through(mapped, source.names[0], device, dtype)
    if stays:
        made = source.build(*(mapped.keep(name) for name in source.names))
        return made.to(_target(made.dtype, dtype)).contiguous()
    made = source.build(*(mapped.passing(name) for name in source.names))
    made = made.to(device, _target(made.dtype, dtype), copy=True).contiguous()
    mapped.spent(sum(stored_bytes(mapped.headers[name]) for name in source.names))
    return made


def _target(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored


def _through(mapped: Mapped, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A tensor converted or moved piece by piece, so that no second copy of it is ever whole in memory."""
    shape, stored = mapped.headers[name]
    out = torch.empty(shape, dtype=_target(stored, dtype), device=device)
    if not mapped.passing(name).is_contiguous():
        out.copy_(mapped.passing(name))
        mapped.spent(out.numel() * stored.itemsize)
        return out
    flat, step = out.view(-1), PIECE // stored.itemsize
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        piece.copy_(mapped.passing(name).view(-1)[start : start + step])
        mapped.spent(piece.numel() * stored.itemsize)
    return out


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    mine = getattr(place, leaf)
    if isinstance(mine, nn.Parameter):
        grows = mine.requires_grad and tensor.is_floating_point()
        setattr(place, leaf, nn.Parameter(tensor, requires_grad=grows))
    else:
        setattr(place, leaf, tensor)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: of their names, types, shapes and bytes in the order of the names, 64 hexadecimal digits.

    It does not depend on the file that they are in, nor on the device.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return found.hexdigest()


# Writing


def save_weights(
    module_or_tensors: nn.Module | Mapping[str, Tensor],
    path: Path,
    names: Callable[[str], str] = str,
    shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    on_bytes: OnBytes | None = None,
) -> tuple[Path, ...]:
    """Write tensors as safetensors, one after another, and return the files; each is written aside and then renamed.

    path: NAME.safetensors. names: our name -> the published one. shard_bytes: when all together are larger, files
    NAME-00001-of-0000N of at most that size (or of one tensor), with NAME.safetensors.index.json beside them, by which
    `load_weights(path)` finds them. Raises WeightsError when two tensors get one name, or for a type that the format
    does not have.
    """
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: weights are written as .safetensors; name the file so")
    tensors = _named(module_or_tensors, path, names)
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(done, total)

    path.parent.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    index = path.with_name(path.name + INDEX)
    if len(shards) == 1:
        _write(path, tensors, metadata or {}, advance)
        index.unlink(missing_ok=True)
        return (path,)
    count = len(shards)
    files = tuple(path.with_name(f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1))
    for file, shard in zip(files, shards, strict=True):
        _write(file, {name: tensors[name] for name in shard}, metadata or {}, advance)
    where = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    aside = index.with_name(index.name + ".part")
    aside.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2), encoding="utf-8")
    aside.replace(index)
    path.unlink(missing_ok=True)
    return files


def _named(
    module_or_tensors: nn.Module | Mapping[str, Tensor], path: Path, names: Callable[[str], str]
) -> dict[str, Tensor]:
    held = module_or_tensors.state_dict() if isinstance(module_or_tensors, nn.Module) else module_or_tensors
    tensors: dict[str, Tensor] = {}
    for ours, tensor in held.items():
        if not isinstance(tensor, Tensor):
            continue
        if names(ours) in tensors:
            raise WeightsError(f"{path}: two tensors would be named {names(ours)!r}, one of them {ours!r}; rename one")
        if tensor.dtype not in CODES:
            raise WeightsError(f"{path}: {ours} is of {tensor.dtype}, which safetensors cannot hold; convert it first")
        tensors[names(ours)] = tensor.detach()
    return tensors


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """Names by shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], advance: Callable[[int], None]
) -> None:
    """One safetensors file: 8 bytes of header length, the JSON header, the data; wide types first, so aligned."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    told: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        told[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(told, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            flat = tensors[name].contiguous().view(-1)
            step = PIECE // flat.dtype.itemsize
            for start in range(0, flat.numel(), step):
                piece = flat[start : start + step].cpu().view(torch.uint8)
                file.write(memoryview(piece.numpy()))
                advance(piece.numel())
    aside.replace(path)
