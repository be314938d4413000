"""Checking a set of shards against its manifest: exactly what is wrong, and where."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from soundstage.core.errors import ConfigError
from soundstage.data.manifest import FILM, MANIFEST, SOUND, Manifest, Shard, read_manifest
from soundstage.data.places import Member, Place
from soundstage.media import decode
from soundstage.media.errors import MediaError

__all__ = ["Problem", "Report", "validate"]

BLOCK = tarfile.BLOCKSIZE
READ = 2**22
OnProgress = Callable[[int, int], None]
"""Called with (shards checked, shards)."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. what: a sentence. key: of the sample, "" where it is the whole shard."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{f' sample {self.key}' if self.key else ''}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What was checked and what was found. decoded: samples whose media were decoded whole."""

    shards: int
    samples: int
    members: int
    bytes: int
    decoded: int
    problems: tuple[Problem, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def validate(
    url: str | Path, *, hashes: bool = True, decoded: int | None = 16, seed: int = 0, progress: OnProgress | None = None
) -> Report:
    """Check the shards at a URL against their manifest.

    hashes: read every byte; without, only sizes and tar headers. decoded: samples drawn by the seed whose picture and
    sound are decoded to their ends (None = all). Raises ConfigError where there is no manifest that can be read.
    """
    manifest = read_manifest(url)
    rows = _by_shard(manifest)
    problems = list(_strange(manifest, rows))
    members = size = 0
    for index, shard in enumerate(manifest.shards):
        found = list(_shard(manifest.place, shard, rows.get(shard.name, []), hashes=hashes))
        problems += found
        members += sum(len(row["members"]) for row in rows.get(shard.name, ()))
        size += shard.bytes
        if progress:
            progress(index + 1, len(manifest.shards))
    num = len(manifest) if decoded is None else min(decoded, len(manifest))
    drawn = np.random.default_rng(seed).choice(len(manifest), num, replace=False) if num else ()
    bad = {problem.key for problem in problems} | {problem.shard for problem in problems if not problem.key}
    for row in sorted(int(index) for index in drawn):
        problems += _media(manifest, row, bad)
    ordered = sorted(problems, key=lambda problem: (problem.shard, problem.key))
    return Report(len(manifest.shards), len(manifest), members, size, num, tuple(ordered))


def _by_shard(manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in manifest.rows():
        rows.setdefault(row["shard"], []).append({name: row[name] for name in ("key", "shard", "members")})
    return rows


def _strange(manifest: Manifest, rows: dict[str, list[dict[str, Any]]]) -> Iterator[Problem]:
    """What the manifest itself gets wrong, and what lies about beside it."""
    told = {shard.name: shard for shard in manifest.shards}
    for name in sorted(set(rows) - set(told)):
        yield Problem(name, "", f"holds {len(rows[name])} samples but is no shard of the manifest")
    for shard in manifest.shards:
        if len(rows.get(shard.name, ())) != shard.samples:
            yield Problem(shard.name, "", f"is to hold {shard.samples} samples, {len(rows.get(shard.name, ()))} listed")
    keys = [row["key"] for each in rows.values() for row in each]
    for key in sorted({key for key in keys if keys.count(key) > 1} if len(keys) != len(set(keys)) else ()):
        yield Problem("", key, "is listed more than once")
    for name in sorted(set(manifest.place.names()) - set(told) - {MANIFEST}):
        if name.endswith(".tar"):
            yield Problem(name, "", "is no shard of the manifest; it belongs to another set, or was left over")


def _shard(where: Place, shard: Shard, rows: Sequence[dict[str, Any]], *, hashes: bool) -> Iterator[Problem]:
    """What is wrong with one shard."""
    size = where.size(shard.name)
    if size is None:
        yield Problem(shard.name, "", "is missing")
        return
    if size != shard.bytes:
        yield Problem(shard.name, "", f"has {size} bytes instead of {shard.bytes}")
    if hashes and size == shard.bytes and _digest(where, shard.name, 0, size) == shard.sha256:
        # every byte is as it was written; what remains is whether the manifest points at the right ones
        yield from _headers(where, shard, rows, size)
        return
    before = list(_headers(where, shard, rows, size))
    yield from before
    wrong = {(problem.key) for problem in before}
    if not hashes:
        return
    found = [problem for row in rows for problem in _members(where, shard, row, size) if problem.key not in wrong]
    yield from found
    if size == shard.bytes and not (before or found):
        yield Problem(shard.name, "", "differs from what was packed, outside of the files it holds")


def _headers(where: Place, shard: Shard, rows: Sequence[dict[str, Any]], size: int) -> Iterator[Problem]:
    """Every member's tar header says its name and size, and the members fill the shard without gaps."""
    at = 0
    for row in rows:
        for member in row["members"]:
            name = f"{row['key']}.{member['ext']}"
            if member["offset"] != at + BLOCK:
                yield Problem(
                    shard.name,
                    row["key"],
                    f".{member['ext']} is to begin at byte {at + BLOCK}, manifest: {member['offset']}",
                )
            at = member["offset"] + -(-member["size"] // BLOCK) * BLOCK
            if member["offset"] + member["size"] > size:
                yield Problem(
                    shard.name,
                    row["key"],
                    f".{member['ext']} is cut off: it ends at byte "
                    f"{member['offset'] + member['size']}, the shard at {size}",
                )
                continue
            try:
                header = tarfile.TarInfo.frombuf(
                    where.read(shard.name, member["offset"] - BLOCK, BLOCK), "ascii", "strict"
                )
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                yield Problem(shard.name, row["key"], f".{member['ext']} has a damaged tar header ({error})")
                continue
            if (header.name, header.size) != (name, member["size"]):
                yield Problem(
                    shard.name,
                    row["key"],
                    f"the tar holds {header.name} ({header.size} bytes) where the "
                    f"manifest has {name} ({member['size']} bytes)",
                )


def _members(where: Place, shard: Shard, row: dict[str, Any], size: int) -> Iterator[Problem]:
    for member in row["members"]:
        end = member["offset"] + member["size"]
        if end <= size and _digest(where, shard.name, member["offset"], end) != member["sha256"]:
            yield Problem(shard.name, row["key"], f".{member['ext']} differs from what was packed")


def _digest(where: Place, name: str, start: int, end: int) -> str:
    digest = sha256()
    for at in range(start, end, READ):
        digest.update(where.read(name, at, min(READ, end - at)))
    return digest.hexdigest()


def _media(manifest: Manifest, index: int, bad: set[str]) -> Iterator[Problem]:
    """What cannot be decoded of a sample that is as it was packed."""
    row = manifest.row(index)
    if row["key"] in bad or row["shard"] in bad:
        return
    for ext, member in manifest.members(index).items():
        if ext not in (*FILM, *SOUND):
            continue
        try:
            _whole(member, picture=ext in FILM and row["video_seconds"] is not None)
        except (MediaError, ConfigError, io.UnsupportedOperation) as error:
            yield Problem(row["shard"], row["key"], f".{ext} cannot be decoded: {getattr(error, 'reason', error)}")


def _whole(member: Member, *, picture: bool) -> None:
    if picture:
        for _ in decode.frames(member):
            pass
    else:
        decode.read(member, video=False)
