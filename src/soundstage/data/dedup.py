"""Step "dedup": one of each clip stays, whatever its file: by content, by fingerprints, then by embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import ClassVar

import numpy as np

from soundstage.data.flow import Drop, Item
from soundstage.data.prints import Print

__all__ = ["Dedup"]

CROWD = 200  # more clips than this that share a piece of a print share something meaningless, such as a logo


@dataclass(frozen=True)
class Dedup:
    """Groups clips that are one; the best keeps its place, the others drop as "duplicate" and name it.

    Same bytes and span: the same. Fingerprints (the fact "hash" of Scan) within `picture` and `sound` of each other:
    the same; both must agree where both have something to say, and one that has it alone must be within `alone`.
    embedding: name of vectors (of Embed) that also count, when their cosine is `cosine` or more and no fingerprint
    says otherwise.
    The best has the most pixels, then the highest rate of bits, then the longest span, then the least digest.
    """

    picture: float = 0.33
    sound: float = 0.3
    alone: float = 0.18
    embedding: str = ""
    cosine: float = 0.99
    version: ClassVar[int] = 1

    def groups(self, items: Sequence[Item]) -> Iterable[Sequence[Item]]:
        """Connected components of likeness, each sorted with the best first."""
        parent = list(range(len(items)))

        def root(index: int) -> int:
            while parent[index] != index:
                parent[index] = parent[parent[index]]
                index = parent[index]
            return index

        prints = [Print.of_facts(item.facts.get("hash") or {}) for item in items]
        pairs = {*_same_bytes(items)}
        pairs |= {pair for pair in _candidates(prints) if self._alike(prints[pair[0]], prints[pair[1]])}
        if self.embedding:
            pairs |= {pair for pair in self._near(items) if not _unlike(prints[pair[0]], prints[pair[1]])}
        for first, second in sorted(pairs):
            parent[root(second)] = root(first)
        members: dict[int, list[Item]] = defaultdict(list)
        for index, item in enumerate(items):
            members[root(index)].append(item)
        for group in members.values():
            yield sorted(group, key=_worth)

    def gather(self, group: Sequence[Item], folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        """The best of a group, and a Drop for each of the others."""
        best, *others = sorted(group, key=_worth)
        yield best
        for other in others:
            yield Drop(other.child(duplicate_of=best.digests.get("media")), "duplicate", float(len(group)))

    def _alike(self, a: Print, b: Print) -> bool:
        picture, sound = a.distance(b)
        if isnan(picture):  # sound alone counts where neither shows anything: two films may share a song
            return sound <= self.alone and not (a.pictures.any() or b.pictures.any())
        return picture <= (self.alone if isnan(sound) else self.picture) and not sound > self.sound

    def _near(self, items: Sequence[Item]) -> Iterator[tuple[int, int]]:
        role = f"embedding:{self.embedding}"
        held = [index for index, item in enumerate(items) if role in item.files]
        if not held:
            return
        vectors = np.stack([np.load(items[index].files[role], allow_pickle=False) for index in held])
        for begin in range(0, len(held), 1024):
            near = vectors[begin : begin + 1024] @ vectors.T >= self.cosine
            for row, column in zip(*np.nonzero(near), strict=True):
                if begin + row < column:
                    yield held[begin + row], held[column]


def _worth(item: Item) -> tuple[float, float, float, str, str]:
    media, span = item.facts.get("media") or {}, item.facts.get("span") or (0.0, 0.0)
    pixels = media.get("height", 0) * media.get("width", 0)
    seconds = span[1] - span[0] or media.get("duration", 0.0)
    return -pixels, -media.get("bit_rate", 0), -seconds, item.digests.get("media", ""), str(item.facts.get("url", ""))


def _same_bytes(items: Sequence[Item]) -> Iterator[tuple[int, int]]:
    first: dict[tuple[str, str], int] = {}
    for index, item in enumerate(items):
        digest = item.digests.get("media")
        if digest:
            key = digest, str(item.facts.get("span"))
            if key in first:
                yield first[key], index
            first.setdefault(key, index)


def _candidates(prints: Sequence[Print]) -> set[tuple[int, int]]:
    """Pairs that share a quarter of the bits of some picture, or two prints of sound in a row, exactly."""
    shelves: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for index, each in enumerate(prints):
        keys: set[tuple[str, int, int]] = set()
        for word in {int(print) for print in each.pictures if print}:
            keys |= {("picture", part, word >> (16 * part) & 0xFFFF) for part in range(4)}
        sounds = each.sounds.astype(np.int64)
        both = (sounds[:-1] != 0) & (sounds[1:] != 0)
        keys |= {("sound", 0, int(pair)) for pair in (sounds[:-1] << 16 | sounds[1:])[both]}
        for key in keys:
            shelves[key].append(index)
    pairs: set[tuple[int, int]] = set()
    for shelf in shelves.values():
        if len(shelf) <= CROWD:
            pairs |= {(a, b) for n, a in enumerate(shelf) for b in shelf[n + 1 :]}
    return pairs


def _unlike(a: Print, b: Print) -> bool:
    """Whether fingerprints speak clearly against it."""
    return any(distance > 0.45 for distance in a.distance(b))
