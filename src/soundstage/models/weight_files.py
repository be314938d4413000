"""Weight files as they lie on disk: names and shapes from their headers, and tensors mapped without a copy.

Read: `.safetensors`; `.pth`, `.pt` and `.bin` as torch writes them (tensors only, pickled code is refused); shards
named by an index or numbered `-0000x-of-0000y`. Nothing here reads the numbers of a tensor before they are asked for.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from soundstage.core.errors import WeightsError

Header = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a stored tensor."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of types."""
INDEX = ".index.json"
PICKLED = (".pth", ".pt", ".bin")
HALF = (".incomplete", ".part", ".partial", ".aria2", ".crdownload")
AGAIN = "fetch or copy the file again"
WIDTHS = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "ComplexFloat": 8}
"""Bytes of a number in torch's storages by name, 1 for all others."""
WINDOW = 64 * 2**20
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights at a path: a file, an index of shards, or a folder of one of them.

    Raises WeightsError when there is none, when a shard is missing, or when a folder holds several that are no shards.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(INDEX) and path.is_file():
        return _indexed(path)
    index = path.with_name(path.name + INDEX)
    if index.is_file() and not path.is_file():
        return _indexed(index)
    if not path.is_file():
        half = [path.with_name(path.name + end) for end in HALF]
        begun = next((other for other in half if other.is_file()), None)
        if begun is None:
            raise WeightsError(f"{path}: the weights are missing; {AGAIN}")
        raise WeightsError(f"{path}: half downloaded, {begun.stat().st_size} bytes are in {begun.name}; {AGAIN}")
    return (path,)


def headers(path: Path, inside: str | None = None) -> dict[str, Header]:
    """Name to (shape, type) of every tensor at a path, without reading their numbers.

    path: .safetensors, .pth, .pt, .bin, an index.json, or a folder of shards. inside: the key of a nested dict, such as
    "generator" in {"generator": {...}}. Raises WeightsError for a file that is missing, truncated or no weight file.
    """
    found: dict[str, Header] = {}
    for file in weight_files(path):
        found |= file_headers(file, inside)
    return found


def shapes(path: Path, inside: str | None = None) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor at a path; see `headers`."""
    return {name: shape for name, (shape, _) in headers(path, inside).items()}


def peek(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of what there is at a path, also of a truncated .safetensors or of some shards; {} of nothing."""
    if path.name.endswith(INDEX) and path.is_file():
        try:
            files = [file for file in _shards_of(path) if file.is_file()]
        except WeightsError:
            files = []
    else:
        files = [path] if path.is_file() and path.suffix == ".safetensors" else []
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            told = _safetensors_header(file, whole=False)
        except WeightsError:
            continue
        found |= {name: tuple(entry["shape"]) for name, entry in told.items()}
    return found


def metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself; raises WeightsError for a file that is missing or is none."""
    (file,) = weight_files(path)
    check_whole(file)
    with safe_open(str(file), framework="pt") as opened:
        return dict(opened.metadata() or {})


def stored_bytes(header: Header) -> int:
    """Bytes that a tensor takes in its file."""
    shape, dtype = header
    return math.prod(shape) * dtype.itemsize


def check_whole(path: Path) -> None:
    """Raise WeightsError when a weight file at a path is missing, half downloaded or truncated; reads headers alone."""
    for file in weight_files(path):
        if file.suffix in PICKLED:
            _check_pickled(file)
        else:
            _safetensors_header(file)


class Mapped:
    """The tensors at a path, mapped into memory and read when they are used.

    `keep(name)` is for a tensor that stays: its pages belong to the file and are read on first use; writing to it does
    not change the file. `passing(name)` is for a tensor to be converted or copied elsewhere: call `spent(bytes)` after
    each piece, so that at most 64 MB of the file stay in memory.
    """

    def __init__(self, path: Path, inside: str | None = None) -> None:
        self.headers: dict[str, Header] = {}
        self._file: dict[str, Path] = {}
        self._inside = inside
        self._kept: dict[Path, Callable[[str], Tensor]] = {}
        self._passing: dict[Path, Callable[[str], Tensor]] = {}
        self._whole: dict[Path, dict[str, Tensor]] = {}  # the older stream of pickles cannot be mapped
        self._read = 0
        for file in weight_files(path):
            found = file_headers(file, inside)
            self.headers |= found
            self._file |= dict.fromkeys(found, file)

    def keep(self, name: str) -> Tensor:
        return self._tensor(self._kept, name)

    def passing(self, name: str) -> Tensor:
        return self._tensor(self._passing, name)

    def spent(self, count: int) -> None:
        """That many bytes were read through `passing` and are not needed again; no tensor of it may be held."""
        self._read += count
        if self._read >= WINDOW:
            self._read = 0
            self._passing.clear()

    def forget(self, name: str) -> None:
        """A tensor that will not be asked for again; frees it where the file could not be mapped."""
        self._whole.get(self._file[name], {}).pop(name, None)

    def _tensor(self, opened: dict[Path, Callable[[str], Tensor]], name: str) -> Tensor:
        file = self._file[name]
        if file in self._whole:
            return self._whole[file][name]
        if file not in opened:
            if opened is self._passing:
                opened.clear()  # one file at a time passes
            if file.suffix in PICKLED:
                tensors = _pickled(file, self._inside, "cpu")
                if not zipfile.is_zipfile(file):
                    self._whole[file] = tensors
                    return tensors[name]
                opened[file] = tensors.__getitem__
            else:
                opened[file] = _safetensors(file)
        return opened[file](name)


def file_headers(path: Path, inside: str | None = None) -> dict[str, Header]:
    """`headers` of one file."""
    if path.suffix in PICKLED:
        tensors = _pickled(path, inside, "meta")
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if inside is not None:
        raise WeightsError(f"{path}: safetensors hold no nested dict {inside!r}; leave `inside` out")
    told = _safetensors_header(path)
    unknown = sorted({entry["dtype"] for entry in told.values()} - set(DTYPES))
    if unknown:
        raise WeightsError(f"{path}: holds numbers of a type that is not read here ({', '.join(unknown)})")
    return {name: (tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in told.items()}


def _safetensors(path: Path) -> Callable[[str], Tensor]:
    from safetensors import safe_open

    return safe_open(path, framework="pt").get_tensor


# Folders and shards


def _in_folder(folder: Path) -> tuple[Path, ...]:
    indices = sorted(folder.glob(f"*{INDEX}"), key=lambda p: (".safetensors" not in p.name, p.name))
    if indices:
        return _indexed(indices[0])
    for endings in ((".safetensors",), PICKLED):
        found = sorted(path for path in folder.iterdir() if path.suffix in endings)
        if len(found) == 1 and not _NUMBERED.fullmatch(found[0].name):
            return (found[0],)
        if found:
            return _numbered(folder, found)
    raise WeightsError(f"{folder}: holds no weights (*.safetensors, *.pth, *.pt); give the folder or file of them")


def _numbered(folder: Path, found: list[Path]) -> tuple[Path, ...]:
    named = [_NUMBERED.fullmatch(path.name) for path in found]
    series = {(match[1], match[3], match[4]) for match in named if match}
    if not all(named) or len(series) != 1:
        some = ", ".join(path.name for path in found[:4])
        raise WeightsError(f"{folder}: holds several weight files ({some}); name the one to read")
    stem, count, ending = series.pop()
    wanted = [folder / f"{stem}-{i:05d}-of-{count}{ending}" for i in range(1, int(count) + 1)]
    _demand_shards(folder, wanted)
    return tuple(wanted)


def _indexed(index: Path) -> tuple[Path, ...]:
    wanted = _shards_of(index)
    _demand_shards(index, wanted)
    return tuple(wanted)


def _shards_of(index: Path) -> list[Path]:
    try:
        told = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(told.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: is no index of shards; {AGAIN}") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise WeightsError(f"{index}: names shards outside its folder; {AGAIN}")
    return [index.parent / name for name in names]


def _demand_shards(where: Path, wanted: list[Path]) -> None:
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        some = ", ".join(path.name for path in missing[:3])
        raise WeightsError(f"{where}: {len(missing)} of {len(wanted)} shards are missing ({some}); fetch or copy them")


# safetensors: 8 bytes of header length, a JSON header, and data up to the largest end in it


def _safetensors_header(path: Path, whole: bool = True) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            told = json.loads(file.read(length)) if length <= size - 8 else None
        except ValueError:
            told = None
    if not isinstance(told, dict):
        raise WeightsError(f"{path}: {size} bytes that are not safetensors, or a truncated file; {AGAIN}")
    told.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in told.values()), default=0)
    if whole and size < end:
        raise WeightsError(f"{path}: truncated, {size} of {end} bytes; {AGAIN}")
    return told


# torch archives: a zip whose first record is the pickle of names and storages, or the older stream of pickles


def _pickled(path: Path, inside: str | None, device: str) -> dict[str, Tensor]:
    _check_pickled(path)
    mapped = zipfile.is_zipfile(path) and device == "cpu"
    try:
        told = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except (EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: {path.stat().st_size} bytes, truncated or damaged; {AGAIN}") from error
    if inside is not None:
        if not isinstance(told, Mapping) or inside not in told:
            raise WeightsError(f"{path}: holds no {inside!r}; it has {_some(told)}")
        told = told[inside]
    tensors = (
        {str(k): v.detach() for k, v in told.items() if isinstance(v, Tensor)} if isinstance(told, Mapping) else {}
    )
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors by name but {_some(told)}; open one of them with `inside`")
    return tensors


def _some(told: Any) -> str:  # noqa: ANN401
    return ", ".join(map(repr, list(told)[:5])) if isinstance(told, Mapping) else f"a {type(told).__name__}"


def _refused(path: Path, message: str) -> WeightsError:
    named = re.search(r"(?:GLOBAL |class |function )([\w.]+\.\w+)", message)
    what = f" ({named[1]})" if named else ""
    return WeightsError(
        f"{path}: refused, since it holds pickled Python objects{what} and reading them could run any code; "
        "take a file of tensors alone, such as .safetensors, or save its tensors again where you trust it"
    )


def _check_pickled(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            whole = _promised(path)
            of = f"{size} of at least {whole} bytes" if whole > size else f"{size} bytes without their end"
            raise WeightsError(f"{path}: truncated, {of}; {AGAIN}")
    elif start[:2] != b"\x80\x02":
        raise WeightsError(f"{path}: {size} bytes that are no weights of torch, or a truncated file; {AGAIN}")


def _promised(path: Path) -> int:
    """Bytes of all storages that the first record of a torch zip names; 0 when it does not reach that far."""
    with path.open("rb") as file:
        fixed = file.read(30)
        if len(fixed) < 30:
            return 0
        name, extra = struct.unpack("<HH", fixed[26:30])
        file.seek(30 + name + extra)
        sizes = _Sizes(file)
        try:
            sizes.load()
        except (EOFError, pickle.UnpicklingError, struct.error, ValueError, TypeError, AttributeError, KeyError):
            return 0
    return sum(sizes.found.values())


class _Nothing(dict):  # stands for every class and function that a pickle names, so that none is imported or called
    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None: ...


class _Sizes(pickle.Unpickler):
    """Bytes of the storages that a pickle names; it imports nothing."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401
        super().__init__(file)
        self.found: dict[str, int] = {}

    def find_class(self, _: str, name: str) -> type:
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: tuple[Any, ...]) -> None:
        _, kind, key, _, numel = pid
        self.found[key] = numel * WIDTHS.get(kind.__name__.removesuffix("Storage"), 1)
