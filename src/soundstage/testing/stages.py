"""Toy stages of data work whose outcomes are known, and that crash, hang and stumble when their items say so."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from soundstage.data.flow import Drop, Item, Poison, Transient

__all__ = ["Bundle", "Gate", "Letters", "Once", "Split", "Stumble", "Write", "counted", "numbers"]


def numbers(count: int) -> Iterator[Item]:
    """Items without files that know their number."""
    return (Item(facts={"n": n}) for n in range(count))


def counted(log: str | Path) -> int:
    """How many calls wrote into a log."""
    path = Path(log)
    return path.stat().st_size if path.exists() else 0


def _log(path: str) -> None:
    """One byte for a call that begins."""
    if path:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, b".")
        os.close(handle)


@dataclass(frozen=True)
class Write:
    """A file of `size` bytes, told by the number. seconds: of sleep first."""

    version: ClassVar[int] = 1
    size: int = 100
    seconds: float = 0.0
    log: str = ""

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        """The item with the role "media"."""
        _log(self.log)
        time.sleep(self.seconds)
        path = folder / "a.txt"
        line = f"number {item.facts['n']}\n"
        path.write_text((line * (self.size // len(line) + 1))[: self.size])
        return [item.child({"media": path})]


@dataclass(frozen=True)
class Split:
    """Pieces of an item; pieces whose number is in `without` are dropped as "unwanted"."""

    version: ClassVar[int] = 1
    pieces: int = 3
    without: tuple[int, ...] = ()
    seconds: float = 0.0
    log: str = ""

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        """Each piece with a file of its own."""
        _log(self.log)
        time.sleep(self.seconds)
        for piece in range(self.pieces):
            path = folder / f"{piece}.txt"
            path.write_text(f"{item.facts['n']}.{piece}")
            child = item.child({"media": path}, piece=piece)
            yield Drop(child, "unwanted", float(piece)) if piece in self.without else child


@dataclass(frozen=True)
class Gate:
    """Only items whose number is below a bound, and, where `even` is set, even."""

    version: ClassVar[int] = 1
    below: int = 1_000_000
    even: bool = False
    log: str = ""

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        """The item itself, or why not."""
        _log(self.log)
        n = item.facts["n"]
        if n >= self.below:
            return [Drop(item, "high", n)]
        return [Drop(item, "odd", n)] if self.even and n % 2 else [item]


@dataclass(frozen=True)
class Stumble:
    """Does what an item's fact "fate" says, and hands it on where that leaves it alive.

    transient, error: the first `times` calls raise; memory of them is kept in `folder`. poison: raises Poison.
    segfault, kill, exit: ends its process; hang: sleeps for an hour. nothing: makes nothing.
    """

    version: ClassVar[int] = 1
    folder: str
    times: int = 1
    after: float | None = None

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        """The item with the fact "calls", how many there were."""
        (folder / "left.txt").write_text("left behind")
        path = Path(self.folder) / str(item.facts["n"])
        _log(str(path))
        calls, fate = path.stat().st_size, item.facts.get("fate", "")
        if fate == "poison":
            raise Poison("it says poison")
        if fate == "nothing":
            return []
        if calls <= self.times:
            if fate == "transient":
                raise Transient("busy", self.after)
            if fate == "error":
                raise RuntimeError("stumbled")
            _end(fate)
        return [item.child(calls=calls)]


def _end(fate: str) -> None:
    if fate == "segfault":
        ctypes.string_at(0)
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "exit":
        os._exit(3)
    if fate == "hang":
        time.sleep(3600)


@dataclass(frozen=True)
class Bundle:
    """Files of `size` items in a row, one after another in one file: a packer."""

    version: ClassVar[int] = 1
    size: int = 10
    seconds: float = 0.0
    log: str = ""

    def groups(self, items: Sequence[Item]) -> Iterable[Sequence[Item]]:
        """In the order of ids."""
        return (items[start : start + self.size] for start in range(0, len(items), self.size))

    def gather(self, group: Sequence[Item], folder: Path) -> Iterable[Item | Drop]:
        """One item for all."""
        _log(self.log)
        time.sleep(self.seconds)
        path = folder / "bundle.txt"
        path.write_bytes(b"".join(Path(each.files["media"]).read_bytes() + b"\n" for each in group))
        return [Item({"shard": path}, {"count": len(group)})]


@dataclass(frozen=True)
class Once:
    """Of items with the same number modulo `modulo` only the first goes on."""

    version: ClassVar[int] = 1
    modulo: int = 10

    def groups(self, items: Sequence[Item]) -> Iterable[Sequence[Item]]:
        """By remainder."""

        def remainder(item: Item) -> int:
            return item.facts["n"] % self.modulo

        return [list(group) for _, group in groupby(sorted(items, key=remainder), key=remainder)]

    def gather(self, group: Sequence[Item], folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        """The one with the least number."""
        first, *others = sorted(group, key=lambda item: item.facts["n"])
        return [first, *(Drop(each.child(same_as=first.facts["n"]), "duplicate") for each in others)]


@dataclass(frozen=True)
class Letters:
    """Writes a file of a million letters per item, to fill a disk with."""

    version: ClassVar[int] = 1
    size: int = 1_000_000

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:
        """The item with the role "media"."""
        path = folder / "a.bin"
        with path.open("wb") as file:
            for _ in range(0, self.size, 10_000):
                file.write(bytes([item.facts["n"] % 256]) * 10_000)
        return [item.child({"media": path})]
