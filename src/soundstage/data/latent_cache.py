"""Encoded clips on disk, each known by what it was made from: safetensors files of a few hundred, written once."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from soundstage.core.av import AV

__all__ = ["Entry", "LatentCache"]

SUFFIX = ".safetensors"
OPEN = 64
"""Files kept open (mapped, not read) at a time."""


@dataclass(frozen=True)
class Entry:
    """A clip in the cache. caption, id: as its source told them when it was encoded."""

    file: Path
    place: int
    caption: str
    id: str


class LatentCache:
    """A folder of the latents that one codec made; many processes may read it, and add to it.

    A file is named by the clips in it and never changes; one that is damaged is removed and counts as not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self.entries: dict[str, Entry] = {}
        for file in sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else ():
            self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def add(self, keys: Sequence[str], latents: Sequence[AV[Tensor]], words: Sequence[tuple[str, str]]) -> None:
        """Store clips, in half precision, in one file that appears whole. words: caption and name of each."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"clips-{sha256(json.dumps(list(keys)).encode()).hexdigest()[:24]}{SUFFIX}"
        tensors = {f"{i}.{name}": x.half().contiguous() for i, one in enumerate(latents) for name, x in one.items()}
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, str(part), {"keys": json.dumps(list(keys)), "words": json.dumps([list(w) for w in words])})
        part.replace(file)
        self._read(file)

    def get(self, key: str) -> AV[Tensor]:
        """The latents of a clip, (C, F, H, W) and (C, A), in half precision."""
        entry = self.entries[key]
        opened = self._opened(entry.file)
        found = {}
        for name in ("video", "audio"):
            if f"{entry.place}.{name}" in opened[1]:
                found[name] = opened[0].get_tensor(f"{entry.place}.{name}")
        return AV(**found)

    def bytes(self, keys: Sequence[str]) -> int:
        """About how much these are."""
        files: dict[Path, int] = {}
        for key in keys:
            file = self.entries[key].file
            files[file] = files.get(file, 0) + 1
        held: dict[Path, int] = {}
        for entry in self.entries.values():
            held[entry.file] = held.get(entry.file, 0) + 1
        return sum(file.stat().st_size * num // held[file] for file, num in files.items())

    def _opened(self, file: Path) -> tuple[Any, frozenset[str]]:
        if file not in self._open:
            opened = safe_open(str(file), "pt")
            self._open[file] = opened, frozenset(opened.keys())
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]

    def _read(self, file: Path) -> None:
        try:
            with safe_open(str(file), "pt") as opened:
                told = opened.metadata()
                keys, words = json.loads(told["keys"]), json.loads(told["words"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            file.unlink(missing_ok=True)
            return
        for place, (key, (caption, name)) in enumerate(zip(keys, words, strict=True)):
            self.entries[key] = Entry(file, place, caption, name)
